"""The process in which math-verify compares answers; started by file name and spoken to by `equivalence`, line by line.

In:  {"expected": "...", "predicted": "..."}      Out:  {"ready": true} once, then {"equal": true} per line.

Symbolic algebra on what a model wrote may take for ever, all memory, or the process with it: that is why it happens
here. The kernel ends this process when a comparison outlasts the limit by a second, so none is left behind by a parent
that died. Imports nothing of the package.

math-verify alone lets wrong answers pass: its parser stops at what it cannot read and keeps what came before, it drops
units and the case of letters, it takes numbers out of any text, it rounds, and it takes what is below 1e-15 for zero.
So an answer counts here only if the grammar has read it to its end as one expression, nothing is dropped or rounded,
and what math-verify finds equal must have the same value to 40 digits, with numbers in the place of variables.
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
from typing import Any

_MEMORY_BYTES = 4 << 30
_GRACE_SECONDS = 1.0
_DIGITS = 60


def main(seconds: float) -> None:
    """Answers until standard input ends; `seconds` is the limit of one comparison."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    parse, equal = _reader(), _judge()

    def tell(**answer: bool) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    tell(ready=True)
    for line in sys.stdin:
        pair = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)  # nobody handles it: it ends the process
        try:
            verdict = equal(parse(pair["expected"]), parse(pair["predicted"]))
        except Exception:  # the libraries raise whatever comes up; what they cannot read is not equal
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        tell(equal=verdict)


def _reader() -> Callable[[str], Any]:
    """What makes an expression of sympy of LaTeX, or raises where a part of it would be passed over."""
    from antlr4 import CommonTokenStream, InputStream, Token
    from latex2sympy2_extended.antlr_parser import PSLexer, PSParser
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )

    def parse(text: str) -> Any:
        latex = normalize_latex(text, normalization)
        parser = PSParser(CommonTokenStream(PSLexer(InputStream(latex))))
        parser.removeErrorListeners()
        parser.math()
        if parser.getCurrentToken().type != Token.EOF or parser.getNumberOfSyntaxErrors():
            raise ValueError("read in part")
        return latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )

    return parse


def _judge() -> Callable[[Any, Any], bool]:
    """What says whether two expressions of sympy are equal."""
    from math_verify import verify
    from sympy import Expr, FiniteSet, Interval, N, Rational, Symbol

    def same_value(one: Any, other: Any) -> bool:
        names = sorted(one.free_symbols | other.free_symbols, key=str)
        for number in range(3):
            drawn = random.Random(number)
            values = {name: Rational(drawn.randrange(101, 499, 2), 128) for name in names}
            first, second = (N(side.subs(values).doit(), _DIGITS) for side in (one, other))
            if not abs(first - second) <= max(abs(first), abs(second)) * Rational(1, 10**40):
                return False
        return True

    def equal(expected: Any, predicted: Any) -> bool:
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
