"""From a checked command to the work: the heavy imports happen here and nowhere earlier."""

from __future__ import annotations

import importlib


def run_entry(name: str, *args: object) -> None:
    """Call ``nemo_popsd.model.entry.<name>(*args)`` with a console that shows our own lines."""
    from nemo_popsd.observability.console import set_up_console

    set_up_console()
    entry = importlib.import_module("nemo_popsd.model.entry")
    set_up_console()
    getattr(entry, name)(*args)
