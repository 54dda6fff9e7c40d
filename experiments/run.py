"""Trains every arm with every seed: one `popsd train` each, several at a time.

    python -m experiments.run tune --workers 2      # first: two learning rates for each arm, on the tuning rows
    python -m experiments.run train --workers 2     # then: five seeds of each arm at its rate, on the held-out rows

Finished runs are skipped, so a killed command can be repeated. Runs are in runs/experiments, each with a log.
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
"""The chosen learning rate of each arm."""


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
        """The overrides of `CONF`."""
        words = [f"name={self.arm.name}", f"output={self.output}", f"seed={self.seed}", f"optimizer.lr={self.rate}"]
        return [*words, f"data.validation.path={self.rows}", *self.arm.overrides, *self.more]

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "nemo_popsd", "train", str(CONF), *self.overrides]

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return (self.output / "DONE").exists()

    def last_evaluation(self) -> EvaluationDirectory:
        """The evaluation of the trained weights."""
        return EvaluationDirectory(max((self.output / "validation").glob("step-*")))


def tuning_runs(arms: Sequence[Arm] = ARMS) -> list[Run]:
    """Every arm with every rate."""
    return [
        Run(arm, TUNING_SEED, rate, RUNS / "tuning" / f"{arm.name}-{rate}", FOLDER / "tuning.jsonl")
        for rate in RATES
        for arm in arms
    ]


def training_runs(arms: Sequence[Arm] = ARMS, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Every arm at its chosen rate with every seed; seeds are the outer loop, so that a partial set is balanced."""
    rates = json.loads(CHOSEN.read_text())
    return [
        Run(arm, seed, rates[arm.name], RUNS / arm.name / f"seed-{seed}", FOLDER / "held_out.jsonl")
        for seed in seeds
        for arm in arms
    ]


def execute(runs: Sequence[Run], workers: int) -> None:
    """Executes the unfinished runs, `workers` at a time with one thread each.

    Raises:
        RuntimeError: runs failed; the others were executed.
    """
    waiting = [run for run in runs if not run.finished]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished, {len(waiting)} left", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        statuses = pool.map(lambda run: _carry_out(run, runs), waiting)
        failed = [run for run, status in zip(waiting, statuses, strict=True) if status]
    if failed:
        raise RuntimeError(f"failed: {', '.join(str(run.output) for run in failed)}; see log.txt there")


def lend_first_evaluation(run: Run, finished: Sequence[Run]) -> None:
    """Copies the answers of the untrained base, which depend only on seed and rows, to a run that has not started.

    The directory is then the same as that of a run that is interrupted after its first evaluation.

    Args:
        run: that would generate the same answers.
        finished: runs that may have generated them.
    """
    mine = run.output / "validation" / "step-000000"
    if (run.output / "config.yaml").exists() or mine.exists():
        return
    lender = next((other for other in finished if (other.seed, other.rows) == (run.seed, run.rows)), None)
    if lender is not None:
        # Renamed last: if this is interrupted before, the run generates its own answers.
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
    """The rate of each arm with the highest accuracy on the tuning rows; the smaller one for a tie."""
    found: dict[str, dict[str, float]] = {}
    for run in tuning_runs():
        found.setdefault(run.arm.name, {})[run.rate] = float(run.last_evaluation().summary()["accuracy"])
    for name, of_rates in found.items():
        print(name, {rate: f"{100 * accuracy:.1f} %" for rate, accuracy in of_rates.items()})
    return {name: max(of_rates, key=of_rates.__getitem__) for name, of_rates in found.items()}


def main() -> None:
    """Runs the command."""
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
