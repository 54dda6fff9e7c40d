"""How a command is imported and called."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_popsd.cli.launch import run_command


@pytest.mark.parametrize("is_new", [True, False])
def test_a_new_process_imports_without_the_garbage_collector(is_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(gc, "freeze", lambda: seen.append("frozen"))
    torch: Any = SimpleNamespace(distributed=SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    if is_new:
        monkeypatch.delitem(sys.modules, "torch")

    def load() -> Callable[[], int]:
        seen.append(gc.isenabled())
        return lambda: 3

    assert run_command(load) == 3
    assert seen == ([False, "frozen"] if is_new else [True])
    assert gc.isenabled()
