"""Trains every arm with every seed, several runs at a time, and writes the results to experiments/runs.jsonl.

    python -m experiments.run tune --workers 2      # five learning rates, three seeds of each arm, on the tuning rows
    python -m experiments.run train --workers 2     # each arm at its chosen rate, on the held-out rows
    python -m experiments.run all --workers 2       # both for the main arms, then both for the others

Runs that have a line in the file are skipped, so a killed command can be repeated. Run directories, each with a log,
are in runs/experiments.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from experiments.arms import ARMS, GRID, MAIN_ARMS, RATES, TUNING_SEEDS, Arm, seeds_of
from experiments.records import FILE, Record, answers, append, curves, load
from experiments.rows import FILE as TUNING_ROWS
from nemo_popsd.config.loading import load_config, save_resolved
from nemo_popsd.observability.jsonl_logger import FILE_NAME as METRICS

RUNS = Path("runs/experiments")
HELD_OUT = "nemo_popsd:tiny_validation"
CONF = Path(__file__).with_name("conf.yaml")
TUNING = ("distillation.diagnosed_tokens=0", "training.self_check=false")
"""What only costs time in a run that chooses a learning rate; neither changes the weights."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator: a server that forks has one thread
}


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    phase: str
    """"tuning" or "training"."""
    arm: Arm
    rate: str
    seed: int
    rows: str
    """Path or name of the rows that are answered before and after training."""
    output: Path
    more: tuple[str, ...] = ()
    """Further overrides."""

    @property
    def overrides(self) -> list[str]:
        """The overrides of `CONF`."""
        words = [f"name={self.arm.name}", f"output={self.output}", f"seed={self.seed}", f"optimizer.lr={self.rate}"]
        return [*words, f"data.validation.path={self.rows}", *self.arm.overrides, *self.more]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """As in `Record.key`."""
        return self.phase, self.arm.name, self.rate, self.seed


def tuning_run(arm: Arm, rate: str, seed: int) -> Run:
    """A run that is compared with those of the same arm and other rates."""
    output = RUNS / "tuning" / f"{arm.name}-{rate}-seed-{seed}"
    return Run("tuning", arm, rate, seed, str(TUNING_ROWS), output, TUNING)


def training_run(arm: Arm, rate: str, seed: int) -> Run:
    """A run that the results are made of."""
    output = RUNS / "training" / f"{arm.name}-{rate}-seed-{seed}"
    return Run("training", arm, rate, seed, HELD_OUT, output)


def tuning_runs(arms: Sequence[Arm]) -> list[Run]:
    """Every arm with every rate and seed; seeds are the outer loop, so that a partial set is balanced."""
    return [tuning_run(arm, rate, seed) for seed in TUNING_SEEDS for rate in GRID for arm in arms]


def training_runs(rates: dict[str, str], arms: Sequence[Arm]) -> list[Run]:
    """Every arm at its rate with every seed; seeds are the outer loop.

    Args:
        rates: by the name of the arm.
        arms: those that have a rate are run.
    """
    seeds = sorted({seed for arm in arms for seed in seeds_of(arm)})
    return [
        training_run(arm, rates[arm.name], seed)
        for seed in seeds
        for arm in arms
        if arm.name in rates and seed in seeds_of(arm)
    ]


def tuned(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Mean change of the accuracy on the tuning rows, by arm and rate, of rates that have all seeds."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        if record.phase == "tuning":
            of_rates = found.setdefault(record.arm, {})
            of_rates.setdefault(record.rate, {})[record.seed] = record.after.accuracy - record.before.accuracy
    return {
        arm: {
            rate: statistics.fmean(of_rates[rate].values())
            for rate in RATES
            if set(of_rates.get(rate, ())) >= set(TUNING_SEEDS)
        }
        for arm, of_rates in found.items()
    }


def chosen(records: Iterable[Record]) -> dict[str, str]:
    """The rate with the highest accuracy on the tuning rows, the smallest for a tie, of arms that have all rates."""
    found = tuned(records)
    return {
        arm: max(of_rates, key=of_rates.__getitem__) for arm, of_rates in found.items() if set(of_rates) >= set(GRID)
    }


def missing_neighbours(records: Sequence[Record], arms: Sequence[Arm]) -> list[Run]:
    """Runs with the next rate beyond the grid, for arms whose best rate is at its edge."""
    found, best = tuned(records), chosen(records)
    rates = {
        arm: RATES[place]
        for arm in arms
        if arm.name in best
        for place in (RATES.index(best[arm.name]) - 1, RATES.index(best[arm.name]) + 1)
        if 0 <= place < len(RATES) and RATES[place] not in found[arm.name]
    }
    return [tuning_run(arm, rate, seed) for seed in TUNING_SEEDS for arm, rate in rates.items()]


def execute(runs: Sequence[Run], workers: int, file: Path = FILE) -> None:
    """Executes the runs that have no record, `workers` at a time with one thread each, and records them.

    Args:
        runs: in this order.
        workers: processes; each is forked from one that has imported the package.
        file: of the records.

    Raises:
        RuntimeError: runs failed; the others were executed.
    """
    done = {record.key for record in load(file)}
    waiting = [run for run in runs if run.key not in done]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished, {len(waiting)} left", flush=True)
    if not waiting:
        return
    os.environ.update(_ENVIRONMENT)
    context = get_context("forkserver")
    context.set_forkserver_preload(["nemo_popsd.commands.entry"])
    failed = []
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool, cancelled_on_error(pool):
        pending = {pool.submit(carry_out, run, runs): run for run in waiting}
        for future in as_completed(pending):
            run, seconds = pending[future], future.result()
            if seconds is None:
                failed.append(run)
                print(f"{run.output}: failed", flush=True)
            else:
                append(_record(run, seconds), file)
                shutil.rmtree(run.output / "checkpoints", ignore_errors=True)  # gone if its line was lost
                print(f"{run.output}: {seconds:.0f} s", flush=True)
    if failed:
        raise RuntimeError(f"failed: {', '.join(str(run.output) for run in failed)}; see log.txt there")


@contextlib.contextmanager
def cancelled_on_error(pool: Executor) -> Iterator[None]:
    """On an error, the pool starts no further run: leaving it waits for those that it has started."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _record(run: Run, seconds: float) -> Record:
    from benchmarks.measure import machine

    before, after = answers(run.output)
    found = curves(run.output) if run.phase == "training" else {}
    return Record(*run.key, before, after, round(seconds, 1), _commit(), machine(), found)


def _commit() -> str:
    """Of this checkout; with a + if files have changed."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def carry_out(run: Run, others: Sequence[Run]) -> float | None:
    """Executes a run in this process; its output goes to log.txt.

    Args:
        run: to execute.
        others: runs that may have the same answers before training.

    Returns:
        Its seconds, or None if it failed.
    """
    from nemo_popsd.cli.main import main as popsd

    started = time.monotonic()
    run.output.mkdir(parents=True, exist_ok=True)
    lend_first_evaluation(run, others)
    with (run.output / "log.txt").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        status = popsd(["train", str(CONF), *run.overrides])
    except BaseException:
        traceback.print_exc()
        status = 1
    return None if status else time.monotonic() - started


def lend_first_evaluation(run: Run, others: Sequence[Run]) -> None:
    """Copies the answers of the untrained base, which depend only on seed and rows, to a run that has not started.

    The directory is then the same as that of a run that is interrupted after its first evaluation.

    Args:
        run: that would generate the same answers.
        others: runs that may have generated them.
    """
    mine = run.output / "validation" / "step-000000"
    if (run.output / "config.yaml").exists() or mine.exists():
        return
    same = (other for other in others if (other.seed, other.rows) == (run.seed, run.rows))
    lender = next((other for other in same if (other.output / "DONE").exists()), None)
    if lender is not None:
        # Renamed last: if this is interrupted before, the run generates its own answers.
        unnamed = run.output / "lent.partial"
        shutil.rmtree(unnamed, ignore_errors=True)
        shutil.copytree(lender.output / "validation" / "step-000000", unnamed)
        save_resolved(load_config(str(CONF), run.overrides), run.output / "config.yaml")
        with (lender.output / METRICS).open() as lines:
            (run.output / METRICS).write_text(next(lines))  # those of the first evaluation
        mine.parent.mkdir(exist_ok=True)
        unnamed.rename(mine)


def tune(arms: Sequence[Arm], workers: int) -> None:
    """Executes the runs that choose the rates, and extends the grid of an arm whose best rate is at its edge."""
    execute(tuning_runs(arms), workers)
    while beyond := missing_neighbours(load(), arms):
        execute(beyond, workers)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "train", "all"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="some of the arms")
    options = parser.parse_args()
    named = [arm for arm in ARMS if arm.name in options.arms]
    groups = [named]
    if options.what == "all":
        groups = [[a for a in named if a in MAIN_ARMS], [a for a in named if a not in MAIN_ARMS]]
    for arms in groups:
        if options.what in ("tune", "all"):
            tune(arms, options.workers)
        if options.what in ("train", "all"):
            execute(training_runs(chosen(load()), arms), options.workers)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
