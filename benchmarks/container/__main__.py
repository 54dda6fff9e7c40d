"""Checks of the GPU code with the container's versions, without a container and without a GPU.

    make container-check                     an environment (gigabytes), then all checks
    python -m benchmarks.container --python .container-venv/bin/python [--only NAME ...] [--write]

Python 3.12, torch's CUDA build, megatron-core, Megatron-Bridge and NeMo are those of the NGC container
(`requirements/container-py312.txt`). Checks: the fast tests; loss, sampling and local layers on fake CUDA tensors; the
loss's kernels compiled to machine code for an H100. `--write` writes their output into RESULTS-container.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "RESULTS-container.md"
_VERSIONS = """
from importlib import metadata
import platform
names = ("torch", "triton", "megatron-core", "megatron-bridge", "nemo-toolkit", "transformers", "lightning", "numpy")
print(", ".join([f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)]))
"""
_MODEL = "import sys; from tests.tiny_models import save_tiny_model; save_tiny_model(sys.argv[1], 'qwen3', head_dim=16)"


def checks(python: str, model: str) -> dict[str, list[str]]:
    """Name and command of each."""
    return {
        "fast tests": [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"],
        "fake CUDA tensors": [python, "-m", "benchmarks.container.fake_cuda", model],
        "kernels for sm_90": [python, "-m", "benchmarks.container.compile_sm90"],
    }


def main() -> int:
    """Runs the command; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment with the container's versions")
    parser.add_argument("--only", nargs="+", default=[], help="some checks")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        subprocess.run([options.python, "-c", _MODEL, model], cwd=ROOT, env=environment, check=True)
        versions = subprocess.run(
            [options.python, "-c", _VERSIONS], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        command = shlex.join(["python", "-m", "benchmarks.container", *sys.argv[1:]])
        head = f"# Results of `{command}`\n\n{datetime.date.today():%d %B %Y}. {versions.stdout.strip()}. No GPU."
        parts = [head]
        for name, words in checks(options.python, model).items():
            if options.only and name not in options.only:
                continue
            print(f"{name} ...", flush=True)
            begin = time.monotonic()
            done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                failed.append(name)
            body = done.stdout.strip()
            if name == "fast tests":
                body = "```\n" + "\n".join(line for line in body.splitlines() if line.startswith(_SUMMARY)) + "\n```"
            status = "passed" if done.returncode == 0 else f"FAILED (exit status {done.returncode})"
            parts.append(f"## {name}: {status}, {time.monotonic() - begin:.0f} s\n\n{body}")
            print(parts[-1], flush=True)
    if options.write:
        RESULTS.write_text("\n\n".join(parts) + "\n")
    return int(bool(failed))


_SUMMARY = ("FAILED", "ERROR", *map(str, range(10)))
"""Prefixes of the lines of pytest's output with the failures and the number of passed tests."""


if __name__ == "__main__":
    sys.exit(main())
