"""Measures complete steps with and without `rollout.overlap`, and the cost of the reference-only branch in both.

    python -m benchmarks.overlap [--steps 12] [--repetitions 2] [key=value ...]

Runs `popsd train` on conf/tiny.yaml with rollouts by vLLM, alternating between the four combinations, trainer and
server with one thread each, and prints the median seconds of a step's parts from metrics.jsonl. Steps 1 and 2 are
excluded, since the server compiles and warms up in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import machine

TINY = Path(__file__).parents[1] / "conf" / "tiny.yaml"
WORDS = [
    "rollout.engine=vllm",
    "training.validate_every=0",
    "training.checkpoint_every=0",
    "training.export_huggingface=false",
    "data.validation.path=''",
    "diagnosis.in_training=false",
    "distillation.diagnosed_tokens=0",
    "observability.progress_bar=false",
]
METHODS = {"OPSD": "opsd", "Purified": "purified"}
PARTS = ("rollout", "frozen", "train")
_WARM_UP = 2


def seconds(output: Path, words: list[str]) -> dict[str, list[float]]:
    """Seconds of each part in each step of one run after the warm-up."""
    command = [sys.executable, "-m", "nemo_popsd", "train", str(TINY), f"output={output}", *WORDS, *words]
    core = str(max(os.sched_getaffinity(0)))
    one_each = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_OMP_THREADS_BIND": core}
    done = subprocess.run(command, env={**os.environ, **one_each}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line][_WARM_UP:]
    return {part: [step[f"train/seconds_{part}"] for step in steps] for part in PARTS}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of conf/tiny.yaml, e.g. rollout.vllm.python=...")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=2, help="runs of each combination")
    options = parser.parse_intermixed_args()
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(options.repetitions):
            for overlap in ("false", "true"):
                for method, family in METHODS.items():
                    output = Path(folder) / f"{repetition}-{overlap}-{method}"
                    words = [f"rollout.overlap={overlap}", f"distillation.target.family={family}"]
                    measured = seconds(output, [f"training.steps={options.steps}", *words, *options.overrides])
                    parts = found.setdefault((overlap, method), {part: [] for part in PARTS})
                    for part, values in measured.items():
                        parts[part] += values
    print(f"python -m benchmarks.overlap {' '.join(sys.argv[1:])}; {machine()}\n")
    print("| overlap | method | " + " | ".join((*PARTS, "step")) + " |\n|" + "---|" * (len(PARTS) + 3))
    for (overlap, method), parts in found.items():
        medians = [statistics.median(parts[part]) for part in PARTS]
        total = statistics.median([sum(step) for step in zip(*parts.values(), strict=True)])
        print(f"| {overlap} | {method} | " + " | ".join(f"{value:.2f}" for value in (*medians, total)) + " |")


if __name__ == "__main__":
    main()
