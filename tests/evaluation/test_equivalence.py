"""Comparison of answers by the rules and by math-verify in its real process."""

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
    with AnswerVerifier(seconds=20) as running:
        yield running


@pytest.mark.parametrize(
    ("predicted", "expected", "equal"),
    [
        (r"\int_0^1 x\,dx", r"\frac{1}{2}", True),
        (r"\int_0^1 x\,dx", r"\frac{1}{3}", False),
        (r"\sum_{k=1}^{10} k", "55", True),
        (r"\[\sum_{k=1}^{10} k\]", "$55$", True),
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)", True),
        (r"\mathbb{R}", r"(-\infty,0)", False),
        # Wrong answers that math-verify by itself accepts: an unparsed part, tiny numbers, the case of a letter.
        (r"\frac{1}{2}", r"\int_0^1 x\,dx + \unknown{3}", False),
        (r"10^{-20}\sum_{k=1}^{1} k", "10^{-21}", False),
        (r"\sum_{k=1}^{2} kx", "3X", False),
        (r"3\text{ cm}+\max(0,0)", "3", False),
    ],
)
def test_answers_beyond_the_rules_go_to_math_verify(
    verifier: AnswerVerifier, predicted: str, expected: str, equal: bool
) -> None:
    verdict = verifier.compare(predicted, expected)
    assert verdict.correct is equal
    assert verdict.decided_by in ("math-verify", "exact")


def test_a_known_command_of_algebra_goes_to_math_verify(verifier: AnswerVerifier) -> None:
    assert verifier.compare(r"\max(2,3)", "3") == Verdict(True, "math-verify")
    assert verifier.compare(r"\max(2,3)", "2") == Verdict(False, "math-verify")


@pytest.mark.parametrize(
    ("predicted", "expected", "verdict"),
    [
        (None, "5", Verdict(False, "missing")),
        ("1,234", "1234", Verdict(True, "exact")),
        ("0.333333", "1/3", Verdict(False, "exact")),
        ("x=5", "5", Verdict(True, "exact")),
        (r"\sqrt{8}", r"2\sqrt{2}", Verdict(True, "exact")),
        (r"\frac{1}{", "5", Verdict(False, "exact")),
        ("nothing at all", "5", Verdict(False, "exact")),
        (r"\text{seat}", "east", Verdict(False, "exact")),
        ("$", "5", Verdict(False, "exact")),
    ],
)
def test_the_rules_need_no_process(predicted: str | None, expected: str, verdict: Verdict) -> None:
    with AnswerVerifier(seconds=1) as verifier:
        assert verifier.compare(predicted, expected) == verdict
        assert verifier._worker is None


@pytest.mark.slow
def test_an_endless_comparison_is_killed_and_the_next_one_succeeds() -> None:
    with AnswerVerifier(seconds=1.5) as hasty:
        hasty._running()
        start = time.monotonic()
        verdict = hasty.compare(r"\sum_{k=1}^{10000000000} k^{k}", "5")
        assert verdict.undecided
        assert not verdict.correct
        assert time.monotonic() - start < 30
        hasty._seconds = 20
        assert hasty.compare(r"\max(2,3)", "3") == Verdict(True, "math-verify")


def test_a_worker_that_dies_is_replaced() -> None:
    with AnswerVerifier(seconds=20) as verifier:
        worker = verifier._running()
        worker.send_signal(signal.SIGSTOP)  # so that it dies during a comparison
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -KILL {worker.pid}"])
        assert verifier.compare(r"\max(1,9)", "9") == Verdict(False, "crash")
        killer.wait()
        assert verifier.compare(r"\max(1,16)", "16") == Verdict(True, "math-verify")
        (second,) = [verifier._worker]
        assert second is not None
        assert second.pid != worker.pid


def test_verdicts_are_cached_and_closing_ends_the_process() -> None:
    with AnswerVerifier(seconds=20) as verifier:
        first = verifier.compare(r"\max(1,5)", "5")
        worker = verifier._worker
        assert worker is not None
        verifier.close()
        assert verifier.compare(r" \max(1,5)", "5") == first
        assert verifier._worker is None
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_missing_library_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    require_math_verify()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'math-verify"):
        require_math_verify()
