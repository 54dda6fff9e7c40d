"""Irrelevant output of libraries, and only that, is logged at debug."""

from __future__ import annotations

import io
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.observability import console, foreign

NAME = "a_library_of_this_test"


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Replaces all modules by one module of Megatron with a print function; the loggers belong to this test."""
    module = types.ModuleType("megatron.of_this_test")
    module.print_rank_0 = print  # type: ignore[attr-defined]
    modules = {module.__name__: module, "unrelated": types.SimpleNamespace(print_rank_0=print)}
    monkeypatch.setattr(foreign, "sys", types.SimpleNamespace(modules=modules, stdout=sys.stdout, stderr=sys.stderr))
    monkeypatch.setattr(foreign, "_FILTERED_LOGGERS", (NAME,))
    monkeypatch.setattr(foreign, "_QUIET_LOGGERS", (f"{NAME}.quiet",))
    monkeypatch.setattr(logging.getLogger("nemo_popsd"), "propagate", True)
    with warnings.catch_warnings():
        yield module
    assert modules["unrelated"].print_rank_0 is print
    logging.getLogger(NAME).filters.clear()
    logging.getLogger("megatron").setLevel(logging.NOTSET)
    logging.getLogger(f"{NAME}.quiet").setLevel(logging.NOTSET)


def records(caplog: pytest.LogCaptureFixture, name: str) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == name]


def test_printed_lines_are_logged(
    libraries: types.ModuleType, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.catch_foreign_output()
    with caplog.at_level(logging.DEBUG, logger="nemo_popsd.libraries"):
        libraries.print_rank_0(" > padded vocab (size: 489)  with 23 dummy tokens")
        libraries.print_rank_0("[PEFT+Recompute] Patched TransformerBlock")
        libraries.print_rank_0("[PEFT+Recompute] Warning: Failed to patch")
    assert records(caplog, "nemo_popsd.libraries") == [
        ("DEBUG", "Megatron: > padded vocab (size: 489) with 23 dummy tokens"),
        ("DEBUG", "Megatron: [PEFT+Recompute] Patched TransformerBlock"),
        ("WARNING", "Megatron: [PEFT+Recompute] Warning: Failed to patch"),
    ]
    assert capsys.readouterr().out == ""


def test_expected_lines_of_a_logger_are_logged_at_debug_and_others_pass(
    libraries: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    foreign.catch_foreign_output()
    foreign.catch_foreign_output()
    assert len(logging.getLogger(NAME).filters) == 1
    with caplog.at_level(logging.DEBUG, logger="nemo_popsd.libraries"):
        logging.getLogger(NAME).warning("The tokenizer you are loading from 'x' with an incorrect regex pattern: ...")
        logging.getLogger(NAME).warning("something else")
    assert records(caplog, NAME) == [("WARNING", "something else")]
    ((level, text),) = records(caplog, "nemo_popsd.libraries")
    assert (level, text.partition(": ")[0]) == ("DEBUG", NAME)


def test_a_log_file_gets_no_bar_of_megatron_bridge(
    libraries: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.progress import Progress

    loading = types.ModuleType(foreign._LOADING)
    loading.Progress = Progress  # type: ignore[attr-defined]
    foreign.sys.modules[foreign._LOADING] = loading  # type: ignore[attr-defined]
    foreign.catch_foreign_output()
    assert loading.Progress(disable=False).disable  # type: ignore[attr-defined]
    silent = loading.Progress  # type: ignore[attr-defined]
    foreign.catch_foreign_output()
    assert loading.Progress is silent  # type: ignore[attr-defined]


def test_debug_shows_hidden_warnings(libraries: types.ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    before = list(warnings.filters)
    with caplog.at_level(logging.DEBUG, logger="nemo_popsd.libraries"):
        foreign.catch_foreign_output()
    assert warnings.filters == before
    assert logging.getLogger(f"{NAME}.quiet").level == logging.NOTSET
    with caplog.at_level(logging.INFO, logger="nemo_popsd.libraries"):
        foreign.catch_foreign_output()
    assert len(warnings.filters) > len(before)
    assert logging.getLogger(f"{NAME}.quiet").level == logging.ERROR


def test_a_level_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(console.LEVEL, "loud")
    with pytest.raises(UserError, match=r"POPSD_LOG_LEVEL='loud'; need one of debug, info, warning, error"):
        console.set_up_console()


def test_a_root_handler_of_a_library_shows_only_warnings(
    libraries: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    stream = io.StringIO()
    root, handler = logging.getLogger(), logging.StreamHandler(stream)
    root.addHandler(handler)
    try:
        foreign.catch_foreign_output()
        with caplog.at_level(logging.DEBUG):
            logging.getLogger(NAME).info("setting up")
            logging.getLogger(NAME).warning("a warning")
    finally:
        root.removeHandler(handler)
    assert stream.getvalue().splitlines() == [f"{NAME}: setting up", "a warning"]  # the first is this package's
    assert records(caplog, "nemo_popsd.libraries") == [("DEBUG", f"{NAME}: setting up")]


class _HandlerOfMegatron(logging.StreamHandler):  # type: ignore[type-arg]
    __module__ = "megatron.training.log_handler"


@pytest.mark.parametrize("kind", [logging.StreamHandler, _HandlerOfMegatron])
def test_a_root_handler_of_a_library_does_not_write_into_the_output_of_a_command(
    libraries: types.ModuleType, monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    output, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(foreign.sys, "stdout", output)
    monkeypatch.setattr(foreign.sys, "stderr", errors)
    root, handler = logging.getLogger(), kind(output)
    root.addHandler(handler)
    try:
        foreign.catch_foreign_output()
        logging.getLogger(NAME).warning("a warning")
    finally:
        root.removeHandler(handler)
    assert output.getvalue() == ""
    assert errors.getvalue() == "a warning\n"
