"""From a checked command to the work: the heavy imports happen here and nowhere earlier."""

from __future__ import annotations

import importlib


def run_entry(name: str, *args: object, module: str = "entry", **options: object) -> None:
    """Call ``nemo_popsd.model.<module>.<name>(*args, **options)`` with a console that shows our own lines."""
    from nemo_popsd.observability.console import set_up_console

    set_up_console()
    entry = importlib.import_module(f"nemo_popsd.model.{module}")
    set_up_console()
    getattr(entry, name)(*args, **options)
