"""Checks the GPU code with the container's versions, without a container and without a GPU.

    make container-check                     an environment (gigabytes), then all checks
    python -m benchmarks.container --python .container-venv/bin/python [--only NAME ...] [--logs FOLDER] [--write]

Python 3.12, torch's CUDA build, megatron-core, Megatron-Bridge and NeMo have the versions of the NGC container
(`requirements/26.02/container.txt`). Checks: the fast tests; loss, sampling and local layers on fake CUDA tensors; the
kernels of the loss, compiled to machine code for an H100. `--write` replaces the sections of the checks that ran in
RESULTS-container.md; the other sections stay. `--logs` writes the complete output of each check while it runs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "RESULTS-container.md"
_TITLE = "# Results of `make container-check`"
_VERSIONS = """
from importlib import metadata
import os, platform
names = ("torch", "triton", "megatron-core", "megatron-bridge", "nemo-toolkit", "transformers", "lightning", "numpy")
versions = [f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in names)]
folder = [os.environ["TE_ENV"]] if os.environ.get("TE_ENV") else []
modules = metadata.distributions(name="transformer-engine", path=folder)
print(", ".join(versions + [f"transformer-engine {module.version} (Python modules)" for module in modules]))
"""
_MODEL = "import sys; from tests.tiny_models import save_tiny_model; save_tiny_model(sys.argv[1], 'qwen3', head_dim=16)"
_SUMMARY = ("FAILED", "ERROR", *map(str, range(10)))
"""Prefixes of lines in pytest's output that name failures and count tests."""
_NOISE = ("[Gloo]", " > padded vocab")
"""Prefixes of lines that libraries print between the tables."""


def checks(python: str, model: str) -> dict[str, list[str]]:
    """Command of each check by name."""
    return {
        "fast tests": [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"],
        "fake CUDA tensors": [python, "-m", "benchmarks.container.fake_cuda", model],
        "kernels for sm_90": [python, "-m", "benchmarks.container.compile_sm90"],
    }


def merge_sections(old: str, new: dict[str, str]) -> str:
    """The content of RESULTS-container.md with the sections `new`, by name of the check, replacing older ones.

    Args:
        old: content of the file.
        new: sections that start with ``## NAME:``.
    """
    sections = {
        match[1]: section.strip()
        for section in re.split(r"(?m)^(?=## )", old)
        if (match := re.match(r"## (.+?):", section)) and match[1] in checks("", "")
    }
    sections |= new
    return "\n\n".join([_TITLE, *(sections[name] for name in checks("", "") if name in sections)]) + "\n"


def main() -> int:
    """Runs the command; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of the environment with the container's versions")
    parser.add_argument("--only", nargs="+", default=[], choices=list(checks("", "")), help="run only these checks")
    parser.add_argument("--logs", help="folder for the complete output of each check")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(options.logs or folder)
        logs.mkdir(parents=True, exist_ok=True)
        model = f"{folder}/model"
        subprocess.run([options.python, "-c", _MODEL, model], cwd=ROOT, env=environment, check=True)
        versions = subprocess.run(
            [options.python, "-c", _VERSIONS], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout.strip()
        for name, command in checks(options.python, model).items():
            if options.only and name not in options.only:
                continue
            print(f"{name} ...", flush=True)
            log, start = logs / f"{name.replace(' ', '-')}.log", time.monotonic()
            with log.open("w") as file:
                status = subprocess.run(command, cwd=ROOT, env=environment, stdout=file).returncode
            if status:
                failed.append(name)
            section = _section(name, status, versions, time.monotonic() - start, log.read_text())
            print(section, flush=True)
            if options.write:
                RESULTS.write_text(merge_sections(RESULTS.read_text(), {name: section}))
    return int(bool(failed))


def _section(name: str, status: int, versions: str, seconds: float, output: str) -> str:
    outcome = "passed" if status == 0 else f"FAILED (exit status {status})"
    if name == "fast tests":
        body = "```\n" + "\n".join(line for line in output.splitlines() if line.startswith(_SUMMARY)) + "\n```"
    else:
        body = "\n".join(line for line in output.splitlines() if not line.startswith(_NOISE)).strip()
    head = f"## {name}: {outcome}\n\n{datetime.date.today():%d %B %Y}, {seconds:.0f} s. {versions}. No GPU, no driver."
    return f"{head}\n\n{body}"


if __name__ == "__main__":
    sys.exit(main())
