r"""Comparison of a predicted and an expected answer by the rules of `algebra`, and by math-verify for other LaTeX.

1. A missing answer is wrong.
2. `nemo_popsd.evaluation.algebra` decides all answers that it can parse, and all answers without LaTeX: numbers
   exactly, expressions with 50 and 100 digits, lists, intervals, equations, units and words by the rules of
   docs/evaluation.md.
3. An answer with a LaTeX command that these rules do not cover, such as an integral, is compared by math-verify in a
   separate process (`math_worker`), which accepts only answers that it has parsed completely. A comparison that exceeds
   the time limit or whose process dies counts as wrong and undecided; the next comparison starts a new process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.algebra.lexer import cleaned
from nemo_popsd.evaluation.algebra.sameness import same_answer
from nemo_popsd.evaluation.checkers import checked, load_checker

COMPARISON_RULES = 2
"""Version of the comparison rules; stored with the scores, since scores by different rules are not comparable.

1: exact for numbers, math-verify for other answers. 2: the rules of docs/evaluation.md.
"""
_WORKER = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0
"""Time limit for the start of the worker, which imports sympy; not part of the limit of the first comparison."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of one comparison."""

    correct: bool
    """Whether the answers are the same."""
    decided_by: str
    """`missing`, `exact`, `math-verify` or `checker`; `timeout` or `crash` for an undecided comparison."""

    @property
    def undecided(self) -> bool:
        """Whether the comparison was aborted, which counts as wrong."""
        return self.decided_by in ("timeout", "crash")


def require_math_verify() -> None:
    """Refuses to start an evaluation without math-verify.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "evaluation",
            got="no package math_verify",
            need="math-verify, which compares answers, with the antlr 4.9 of omegaconf",
            fix="pip install 'math-verify[antlr4_9_3]>=0.9,<0.10'",
        )


class AnswerVerifier:
    """Compares answers with one worker process, which starts when first needed, and caches the verdicts.

    Use as a context manager, or call `close`; the worker ends when its parent does.
    """

    def __init__(self, seconds: float, checker: str = "") -> None:
        """Stores the settings; does not start a process.

        Args:
            seconds: time limit of one comparison by math-verify.
            checker: name of the checker that replaces the rules (`nemo_popsd.evaluation.checkers`); empty means the
                rules.

        Raises:
            UserError: the checker does not exist.
        """
        self._seconds = seconds
        self._name = checker
        self._checker = load_checker(checker) if checker else None
        self._worker: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._known: dict[tuple[str, str], Verdict] = {}

    def __enter__(self) -> AnswerVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker if it is running."""
        if self._worker is None:
            return
        self._worker.kill()
        self._worker.communicate()
        self._worker, self._unread = None, b""

    def compare(self, predicted: str | None, expected: str) -> Verdict:
        """The verdict on `predicted`, by the rules of this module or by the checker.

        Raises:
            UserError: the checker fails.
        """
        if predicted is None:
            return Verdict(False, "missing")
        if self._checker is not None:
            key = (predicted, expected)
            if key not in self._known:
                decision = checked(self._checker, self._name, predicted, expected)
                self._known[key] = Verdict(decision, "checker")
            return self._known[key]
        pair = (cleaned(predicted), cleaned(expected))
        if pair not in self._known:
            same = same_answer(predicted, expected)
            self._known[pair] = self._ask(*pair) if same is None else Verdict(same, "exact")
        return self._known[pair]

    def _ask(self, predicted: str, expected: str) -> Verdict:
        worker = self._running()
        question = json.dumps({"expected": expected, "predicted": predicted}) + "\n"
        assert worker.stdin is not None
        try:
            worker.stdin.write(question.encode())
            worker.stdin.flush()
            line = self._line(worker, self._seconds)
        except TimeoutError:
            self.close()
            return Verdict(False, "timeout")
        except (BrokenPipeError, EOFError):
            self.close()
            return Verdict(False, "crash")
        return Verdict(json.loads(line)["equal"], "math-verify")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._worker is None:
            # -P: modules in the worker's directory must not shadow libraries of the same name.
            command = [sys.executable, "-P", str(_WORKER), str(self._seconds)]
            self._worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
            try:
                self._line(self._worker, _START_SECONDS)
            except (EOFError, TimeoutError) as error:
                self._worker.kill()
                _, complaint = self._worker.communicate()
                self._worker = None
                raise RuntimeError(f"math-verify did not start: {complaint.decode(errors='replace')}") from error
        return self._worker

    def _line(self, worker: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line of `worker`.

        Raises:
            TimeoutError: it does not arrive within `seconds`.
            EOFError: the worker ended.
        """
        assert worker.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([worker.stdout], [], [], left)[0]:
                raise TimeoutError
            read = os.read(worker.stdout.fileno(), 65536)
            if not read:
                raise EOFError
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line
