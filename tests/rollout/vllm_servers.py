"""Where the tests find a real vLLM, and settings of runs that generate with it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests import fork_servers
from tests.rollout.vllm_location import PYTHON

ROOT = Path(__file__).parents[2]
os.environ["POPSD_TEST_FORK_SERVERS"] = fork_servers.address()

FORKING_PYTHON = str(Path(__file__).with_name("vllm_python.sh"))
"""Stands in for `PYTHON`: its servers have vLLM imported when they start."""

needs_vllm = pytest.mark.skipif(
    not Path(PYTHON).is_file(),
    reason=f"no vLLM at {PYTHON}; `make vllm-env` creates one, or set POPSD_VLLM_PYTHON",
)
SMALL = [
    "rollout.engine=vllm",
    f"rollout.vllm.python={FORKING_PYTHON}",
    "rollout.vllm.eager=true",
    f"rollout.vllm.cache_bytes={128 << 20}",
    "rollout.vllm.start_seconds=240",
    "rollout.vllm.answer_seconds=240",
]
"""Overrides of `conf/tiny.yaml`."""


def settings(output: Path, *words: str) -> Any:
    """The tiny run with `rollout.engine=vllm`."""
    from nemo_popsd.config.loading import load_config

    return load_config(str(ROOT / "conf" / "tiny.yaml"), [f"output={output}", *SMALL, *words])


def engine(config: Any, student: Any, *, version: Any = lambda: 0, longest: int = 400, **arguments: Any) -> Any:
    """The engine of `config` for `student`. Collective."""
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.embedded.names import asset
    from nemo_popsd.model.engines import build_engine

    return build_engine(
        config,
        student,
        HuggingFaceModel(asset("nemo_popsd:tiny_reasoner")),
        weights_version=version,
        longest=lambda: longest,
        stop_requested=arguments.pop("stop_requested", lambda: False),
    )


def gone(pid: int, *, within: float = 20) -> bool:
    """Whether a process ends `within` seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False
