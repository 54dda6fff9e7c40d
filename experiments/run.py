"""Trains every arm with every seed: one `popsd train` each, some at a time.

    python -m experiments.run tune --workers 2      # first: two learning rates for each arm, on the tuning rows
    python -m experiments.run train --workers 2     # then: five seeds of each arm at its rate, on the held-out rows

What is finished is not done again: repeat a command that was killed. Runs lie in runs/experiments, with a log each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import ARMS, RATES, SEEDS, TUNING_SEED, Arm
from experiments.rows import FOLDER, write
from nemo_popsd.config.loading import load_config, save_resolved
from nemo_popsd.evaluation.records import EvaluationDirectory

RUNS = Path("runs/experiments")
CONF = Path(__file__).with_name("conf.yaml")
CHOSEN = Path(__file__).with_name("rates.json")
"""Learning rate of each arm, as chosen."""


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    arm: Arm
    seed: int
    rate: str
    output: Path
    rows: Path
    more: tuple[str, ...] = ()
    """Further overrides."""

    @property
    def overrides(self) -> list[str]:
        """What is set beyond `CONF`."""
        words = [f"name={self.arm.name}", f"output={self.output}", f"seed={self.seed}", f"optimizer.lr={self.rate}"]
        return [*words, f"data.validation.path={self.rows}", *self.arm.overrides, *self.more]

    @property
    def command(self) -> list[str]:
        """What is executed."""
        return [sys.executable, "-m", "nemo_popsd", "train", str(CONF), *self.overrides]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.output / "DONE").exists()

    def last_evaluation(self) -> EvaluationDirectory:
        """Of the trained weights."""
        return EvaluationDirectory(max((self.output / "validation").glob("step-*")))


def tuning_runs(arms: Sequence[Arm] = ARMS) -> list[Run]:
    """Every arm with every rate."""
    return [
        Run(arm, TUNING_SEED, rate, RUNS / "tuning" / f"{arm.name}-{rate}", FOLDER / "tuning.jsonl")
        for rate in RATES
        for arm in arms
    ]


def training_runs(arms: Sequence[Arm] = ARMS, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Every arm at its chosen rate with every seed; seeds outermost, so that an interrupted set is even."""
    rates = json.loads(CHOSEN.read_text())
    return [
        Run(arm, seed, rates[arm.name], RUNS / arm.name / f"seed-{seed}", FOLDER / "held_out.jsonl")
        for seed in seeds
        for arm in arms
    ]


def execute(runs: Sequence[Run], workers: int) -> None:
    """Carries out what is not finished, `workers` at a time with one thread each.

    Raises:
        RuntimeError: runs failed; the others were carried out.
    """
    waiting = [run for run in runs if not run.finished]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished, {len(waiting)} to do", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        statuses = pool.map(lambda run: _carry_out(run, runs), waiting)
        failed = [run for run, status in zip(waiting, statuses, strict=True) if status]
    if failed:
        raise RuntimeError(f"failed: {', '.join(str(run.output) for run in failed)}; see log.txt there")


def lend_first_evaluation(run: Run, finished: Sequence[Run]) -> None:
    """Gives a run that has not begun the answers of the untrained base, which follow from seed and rows alone.

    The directory is then as the run itself leaves it if it is cut off behind its first evaluation.

    Args:
        run: which would draw the same again.
        finished: runs that may have drawn them.
    """
    mine = run.output / "validation" / "step-000000"
    if (run.output / "config.yaml").exists() or mine.exists():
        return
    lender = next((other for other in finished if (other.seed, other.rows) == (run.seed, run.rows)), None)
    if lender is not None:
        # Under its name last: cut off before that, the run draws its own.
        unnamed = run.output / "lent.partial"
        shutil.rmtree(unnamed, ignore_errors=True)
        shutil.copytree(lender.output / "validation" / "step-000000", unnamed)
        save_resolved(load_config(str(CONF), run.overrides), run.output / "config.yaml")
        mine.parent.mkdir(exist_ok=True)
        unnamed.rename(mine)


def _carry_out(run: Run, runs: Sequence[Run]) -> int:
    run.output.mkdir(parents=True, exist_ok=True)
    lend_first_evaluation(run, [other for other in runs if other.finished])
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (run.output / "log.txt").open("w") as log:
        status = subprocess.run(run.command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    print(f"{run.output}: {'failed' if status else 'done'} in {time.monotonic() - started:.0f} s", flush=True)
    return status


def choose() -> dict[str, str]:
    """The rate of each arm that was right most often on the tuning rows; the smaller one of equals."""
    found: dict[str, dict[str, float]] = {}
    for run in tuning_runs():
        found.setdefault(run.arm.name, {})[run.rate] = float(run.last_evaluation().summary()["accuracy"])
    for name, of_rates in found.items():
        print(name, {rate: f"{100 * accuracy:.1f} %" for rate, accuracy in of_rates.items()})
    return {name: max(of_rates, key=of_rates.__getitem__) for name, of_rates in found.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "train"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="some of the arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="some of the seeds")
    options = parser.parse_args()
    arms = [arm for arm in ARMS if arm.name in options.arms]
    if not FOLDER.is_dir():
        write()
    if options.what == "tune":
        execute(tuning_runs(arms), options.workers)
        CHOSEN.write_text(json.dumps(choose(), indent=2) + "\n")
    else:
        execute(training_runs(arms, options.seeds), options.workers)


if __name__ == "__main__":
    main()
