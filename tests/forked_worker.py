"""Replaces the interpreter of a worker of pytest-xdist: forks the worker from a server with all imports done.

    python tests/forked_worker.py OWNER -u -c CODE      # OWNER: address from `tests.fork_servers.share`

The forked process has the standard streams, the environment and the exit status of this one.
"""

from __future__ import annotations

import atexit
import io
import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from tests.fork_servers import CONTEXT, LOCAL, Descriptor, die_with_parent, forked_by, use_shared


def _work(code: str, variables: dict[str, str], *streams: None) -> None:
    """Runs `code` like ``python -c``; `streams` are descriptors that are already in place."""
    die_with_parent(group=False)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["-c"]
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing skips them


def main(owner: str, code: str) -> int:
    """Returns the exit status of the worker, which ends with this process."""
    use_shared(owner)
    worker = CONTEXT.Process(target=_work, args=(code, dict(os.environ), *map(Descriptor, range(3))))
    with forked_by(LOCAL):
        worker.start()
    worker.join()
    return worker.exitcode if worker.exitcode >= 0 else 128 - worker.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[-1]))
