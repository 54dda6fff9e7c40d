"""Measures this package on a GPU in eight minutes, the most valuable parts first.

    python -m benchmarks.gpu [--output DIR] [--minutes 8] [--only PART ...]    on a machine with a GPU
    python -m benchmarks.gpu --rehearse                                        tiny sizes on a CPU, two minutes

Each part has a separate process and time limit, so that a crash, a hang or a lack of memory does not affect the others.
Each result is appended to DIR/results.jsonl as soon as it is known, and DIR/results.md is written after each part.
For a machine without the packages, see `python -m benchmarks.bundle`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import sys
from pathlib import Path

from benchmarks.gpu.runner import Part, run_parts

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}

PARTS = (
    Part("doctor", "Machine and packages", "benchmarks.gpu.machine", 60),
    Part("exactness", "Loss, gradients and attention against float64", "benchmarks.gpu.exactness", 130),
    Part("training", "Self-check, three steps, peak memory of each phase", "benchmarks.gpu.training", 120),
    Part("speed", "Time and memory of the loss", "benchmarks.gpu.speed", 90),
    Part("decoding", "Decoding", "benchmarks.gpu.decoding", 90),
    Part("cpu", "The same three steps on the CPU, in fp32", "benchmarks.gpu.training_on_cpu", 120, ON_CPU),
    Part("switches", "One step under each of Megatron's switches", "benchmarks.gpu.switches", 150),
    Part("serving", "New weights to vLLM", "benchmarks.gpu.serving", 150),
)
_REHEARSED_LIMIT = 240.0
"""Seconds of a part in a rehearsal, which may share its cores with others."""


def main() -> int:
    """Runs the command; returns the exit status, 1 if a part failed or exceeded its time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_benchmark"), help="directory of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of all parts together")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some parts")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    if options.rehearse:
        parts = [Part(p.name, p.title, p.module, _REHEARSED_LIMIT, {**p.environment, **ON_CPU}) for p in parts]
        options.minutes = _REHEARSED_LIMIT * len(parts) / 60
    os.environ.setdefault("POPSD_VLLM_PYTHON", "")
    now = datetime.datetime.now().astimezone()
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    statuses = run_parts(
        parts,
        options.output,
        head=f"# Results of `{command}`\n\n{now:%d %B %Y, %H:%M %Z}. The first table names the card and the versions.",
        total_seconds=60 * options.minutes,
        rehearse=options.rehearse,
    )
    shutil.rmtree(options.output / "work", ignore_errors=True)
    print((options.output / "results.md").read_text())
    return int(any(status != "ok" for status in statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
