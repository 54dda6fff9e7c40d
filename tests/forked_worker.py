"""Replaces the interpreter of a worker of pytest-xdist: forks the worker from a server with all imports done.

    python tests/forked_worker.py OWNER -u -c CODE      # OWNER: address from `tests.fork_servers.share`

The forked process has the standard streams, the environment and the exit status of this one.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from tests.fork_servers import LOCAL, run_forked, use_shared


def _work(code: str) -> None:
    """Runs `code` as ``python -c`` does."""
    sys.argv = ["-c"]
    exec(code, {"__name__": "__main__"})


def main(owner: str, code: str) -> int:
    """Returns the exit status of the worker, which ends with this process."""
    use_shared(owner)
    status = run_forked(LOCAL, _work, code)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[-1]))
