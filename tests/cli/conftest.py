"""For tests of the command line that build no model."""

import sys
import types
from pathlib import Path

import pytest

from nemo_popsd.observability import console

TINY = str(Path(__file__).parents[2] / "conf" / "tiny.yaml")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of the functions in `nemo_popsd.commands`, which are replaced: no model is built."""
    recorded: list[tuple] = []
    entry = types.ModuleType("nemo_popsd.commands.entry")
    for name in ("train", "evaluate", "diagnose", "export", "export_adapter"):
        setattr(entry, name, lambda *args, name=name, **options: recorded.append((name, *args)))
    monkeypatch.setitem(sys.modules, "nemo_popsd.commands.entry", entry)
    conversion = types.ModuleType("nemo_popsd.commands.conversion")
    for name in ("hf_to_nemo", "nemo_to_hf"):
        setattr(conversion, name, lambda *args, name=name, **options: recorded.append((name, *args, options)))
    monkeypatch.setitem(sys.modules, "nemo_popsd.commands.conversion", conversion)
    # It changes the logging of the whole process, which other tests read.
    monkeypatch.setattr(console, "set_up_console", lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return recorded
