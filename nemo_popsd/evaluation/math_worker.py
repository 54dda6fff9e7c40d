"""The process in which math-verify compares answers; `equivalence` starts it by file name and exchanges lines with it.

In:  {"expected": "...", "predicted": "..."}      Out:  {"ready": true} once, then {"equal": true} per line.

Symbolic algebra on a model's output may not terminate, may exhaust the memory or may crash, so it runs in this process.
The kernel ends the process when a comparison exceeds the limit by a second, so that it does not outlive a dead parent.
This module does not import the package.

math-verify by itself accepts wrong answers: its parser stops at the first token that it cannot parse and keeps the
preceding part, it ignores units and the case of letters, it extracts numbers from any text, it rounds, and it treats
values below 1e-15 as zero. Here an answer is accepted only if the grammar parses all of it as one expression without
dropping or rounding, and if expressions that math-verify considers equal have the same value to 40 digits for given
variables.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Basic

_MEMORY_BYTES = 4 << 30
_GRACE_SECONDS = 1.0
_DIGITS = 60


def main(seconds: float) -> None:
    """Answers requests until standard input ends; `seconds` is the limit of one comparison."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # library output must not be mistaken for an answer
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    parse, equal = _make_parser(), _make_comparison()

    def send(**answer: bool) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    send(ready=True)
    for line in sys.stdin:
        pair = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)  # without a handler, it ends the process
        try:
            verdict = equal(parse(pair["expected"]), parse(pair["predicted"]))
        except Exception:  # the libraries raise various types; an answer that cannot be parsed is not equal
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(equal=verdict)


def _make_parser() -> Callable[[str], object]:
    """A function that converts LaTeX into an expression of sympy, and raises if a part of it would be skipped."""
    from antlr4 import CommonTokenStream, InputStream, Token
    from latex2sympy2_extended.antlr_parser import PSLexer, PSParser
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )

    def parse(text: str) -> object:
        latex = normalize_latex(text, normalization)
        parser = PSParser(CommonTokenStream(PSLexer(InputStream(latex))))
        parser.removeErrorListeners()
        parser.math()
        if parser.getCurrentToken().type != Token.EOF or parser.getNumberOfSyntaxErrors():
            raise ValueError("parsed in part")
        return latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )

    return parse


def _make_comparison() -> Callable[[object, object], bool]:
    """A function that returns whether two expressions of sympy are equal."""
    from math_verify import verify
    from sympy import Expr, FiniteSet, Interval, N, Rational, Symbol

    def same_value(one: Basic, other: Basic) -> bool:
        names = sorted(one.free_symbols | other.free_symbols, key=str)
        for seed in range(3):
            rng = random.Random(seed)
            values = {name: Rational(rng.randrange(101, 499, 2), 128) for name in names}
            first, second = (N(side.subs(values).doit(), _DIGITS) for side in (one, other))
            if not abs(first - second) <= max(abs(first), abs(second)) * Rational(1, 10**40):
                return False
        return True

    def equal(expected: object, predicted: object) -> bool:
        if isinstance(expected, Symbol) or isinstance(predicted, Symbol):
            return bool(expected == predicted)
        kinds = [Interval if isinstance(side, Interval) else FiniteSet for side in (expected, predicted)]
        if kinds[0] is not kinds[1] and any(isinstance(side, FiniteSet) for side in (expected, predicted)):
            return False
        if not verify(
            expected,
            predicted,
            float_rounding=_DIGITS,
            numeric_precision=_DIGITS,
            timeout_seconds=None,
            raise_on_error=False,
        ):
            return False
        if isinstance(expected, Expr) and isinstance(predicted, Expr):
            return same_value(expected, predicted)
        return True

    return equal


if __name__ == "__main__":
    main(float(sys.argv[1]))
