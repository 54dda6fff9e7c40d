"""Runs a script in a process that is forked with vLLM imported; this file runs in vLLM's environment.

    python tests/rollout/forked_vllm.py OWNER SCRIPT ...    # OWNER: `tests.fork_servers.address()`
    python tests/rollout/forked_vllm.py                     # owns the server; prints its address, ends with its input

The forked process has the standard streams, the environment and the exit status of this one.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tests.fork_servers import VLLM, address, ask, run_forked, serve_own, use_shared


def _script(words: list[str]) -> None:
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    runpy.run_path(words[0], run_name="__main__")


def main(words: list[str]) -> int:
    """Returns the exit status of the script; ends by its signal if one has killed it."""
    if not words:
        serve_own(VLLM)
        print(address(), flush=True)
        sys.stdin.read()
        return 0
    owner, *script = words
    use_shared(ask(owner, VLLM))
    status = run_forked(VLLM, _script, script)
    if status < 0:
        os.kill(os.getpid(), signal.Signals(-status))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
