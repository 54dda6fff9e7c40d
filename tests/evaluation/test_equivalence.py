"""Answers compared by the exact rules and by math-verify, in its real process."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.equivalence import AnswerVerifier, Verdict, require_math_verify


@pytest.fixture(scope="module")
def verifier() -> Iterator[AnswerVerifier]:
    with AnswerVerifier(seconds=20) as made:
        yield made


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ("x=5", "5"),
        ("5", "x = 5"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        ("4, 3", "3, 4"),
        (r"\pi/2", r"\frac{\pi}{2}"),
        ("2^{10}", "1024"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"18 \text{ cm}", "18"),
        (r"\pm 2", "2, -2"),
    ],
)
def test_what_takes_algebra(verifier: AnswerVerifier, predicted: str, expected: str) -> None:
    assert verifier.compare(predicted, expected) == Verdict(True, "math-verify")


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [(r"\sqrt{8}", r"2\sqrt{3}"), ("q-p", "p-q"), ("(1,2)", "(2,1)"), (r"\frac{1}{", "5"), ("nothing at all", "5")],
)
def test_what_algebra_tells_apart(verifier: AnswerVerifier, predicted: str, expected: str) -> None:
    assert verifier.compare(predicted, expected) == Verdict(False, "math-verify")


@pytest.mark.parametrize(
    ("predicted", "expected", "verdict"),
    [
        (None, "5", Verdict(False, "missing")),
        ("1,234", "1234", Verdict(True, "exact")),
        ("0.333333", "1/3", Verdict(False, "exact")),
        ("7", "8", Verdict(False, "exact")),
        ("monday", "Monday", Verdict(True, "exact")),
        (r"\text{seat}", "east", Verdict(False, "exact")),
        ("$", "5", Verdict(False, "exact")),
    ],
)
def test_exact_rules_need_no_process(predicted: str | None, expected: str, verdict: Verdict) -> None:
    with AnswerVerifier(seconds=1) as verifier:
        assert verifier.compare(predicted, expected) == verdict
        assert verifier._worker is None


def test_one_that_takes_for_ever_is_killed_and_the_next_is_compared(verifier: AnswerVerifier) -> None:
    verifier.compare(r"\sqrt{2}", "2")
    with AnswerVerifier(seconds=1.5) as hasty:
        hasty._running()
        start = time.monotonic()
        verdict = hasty.compare("10000000000!", "5")
        assert verdict.undecided
        assert not verdict.correct
        assert time.monotonic() - start < 30
        hasty._seconds = 20
        assert hasty.compare(r"\sqrt{4}", "2") == Verdict(True, "math-verify")


def test_a_worker_that_dies_is_replaced() -> None:
    with AnswerVerifier(seconds=20) as verifier:
        worker = verifier._running()
        worker.send_signal(signal.SIGSTOP)  # it dies in the middle of a comparison
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -KILL {worker.pid}"])
        assert verifier.compare(r"\sqrt{9}", "3") == Verdict(False, "crash")
        killer.wait()
        assert verifier.compare(r"\sqrt{16}", "4") == Verdict(True, "math-verify")
        (second,) = [verifier._worker]
        assert second is not None
        assert second.pid != worker.pid


def test_answers_are_remembered_and_closing_leaves_no_process() -> None:
    with AnswerVerifier(seconds=20) as verifier:
        first = verifier.compare(r"\sqrt{25}", "5")
        worker = verifier._worker
        assert worker is not None
        verifier.close()
        assert verifier.compare(r" \sqrt{25}", "5") == first
        assert verifier._worker is None
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_missing_library_is_told_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    require_math_verify()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'math-verify"):
        require_math_verify()
