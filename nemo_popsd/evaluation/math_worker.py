"""The process in which math-verify compares answers; started by file name and spoken to by `equivalence`, line by line.

In:  {"expected": "...", "predicted": "..."}      Out:  {"ready": true} once, then {"equal": true} per line.

Symbolic algebra on what a model wrote may take for ever, all memory, or the process with it: that is why it happens
here. The kernel ends this process when a comparison outlasts the limit by a second, so none is left behind by a parent
that died. Imports nothing of the package.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

_MEMORY_BYTES = 4 << 30
_GRACE_SECONDS = 1.0


def main(seconds: float) -> None:
    """Answers until standard input ends; `seconds` is the limit of one comparison."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    def tell(**answer: bool) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    tell(ready=True)
    for line in sys.stdin:
        pair = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)  # nobody handles it: it ends the process
        expected, predicted = (
            parse(f"${pair[side]}$", parsing_timeout=None, raise_on_error=False) for side in ("expected", "predicted")
        )
        equal = verify(expected, predicted, timeout_seconds=None, raise_on_error=False)
        signal.setitimer(signal.ITIMER_REAL, 0)
        tell(equal=bool(equal))


if __name__ == "__main__":
    main(float(sys.argv[1]))
