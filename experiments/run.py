"""Trains every arm with every seed, several runs at a time, and writes the results to experiments/runs.jsonl.

    python -m experiments.run tune --workers 2      # five learning rates, three seeds of each arm, on the tuning rows
    python -m experiments.run train --workers 2     # each arm at its chosen rate, on the held-out rows
    python -m experiments.run all --workers 2       # both for the main arms, then both for the others
    python -m experiments.run views --workers 2     # a table of `experiments.tables`, to experiments/tables/views.jsonl
    python -m experiments.run views --cost          # what it would cost; `tables --cost` for all of them

Runs with a line in the file are skipped, so a killed command can be repeated; `--minutes` ends it between two runs. Run
directories, each with a log, are in runs/experiments.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from experiments.arms import ARMS, MAIN_ARMS, PURIFIED, Arm
from experiments.plan import (
    CONF,
    Run,
    chosen,
    missing_neighbours,
    rates_of,
    table_training_runs,
    table_tuning_runs,
    training_runs,
    tuning_runs,
)
from experiments.records import FILE, Record, alarms, answers, append, curves, load
from experiments.rows import make
from experiments.tables import TABLES, Table, cost_table
from nemo_popsd.config.loading import load_config, save_resolved
from nemo_popsd.errors import UserError
from nemo_popsd.observability.jsonl_logger import FILE_NAME as METRICS

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator: a server that forks has one thread
}


def execute(runs: Sequence[Run], workers: int, file: Path = FILE, until: float = math.inf) -> None:
    """Executes runs without a record, `workers` at a time with one thread each, and records them.

    Args:
        runs: runs to execute, in this order.
        workers: number of processes; each is forked from one that has imported the package.
        file: file of the records.
        until: time (`time.monotonic`) after which no run is started.

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
    failed, left = [], iter(waiting)
    pending: dict[Future[float | None], Run] = {}
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool, cancelled_on_error(pool):
        while True:
            while len(pending) < workers and time.monotonic() < until and (run := next(left, None)):
                pending[pool.submit(carry_out, run, runs)] = run
            if not pending:
                break
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run, seconds = pending.pop(future), future.result()
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
    """Context that starts no further run in the pool after an error; leaving it waits for started runs."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _record(run: Run, seconds: float) -> Record:
    from benchmarks.measure import machine

    (_, before), *between, (_, after) = answers(run.output).items()
    found = curves(run.output) if run.phase == "training" else {}
    return Record(
        *run.key,
        before,
        after,
        round(seconds, 1),
        _commit(),
        machine(),
        found,
        {str(step): one for step, one in between},
        alarms(run.output),
    )


def _commit() -> str:
    """Commit of this checkout, with a + if files have changed."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def carry_out(run: Run, others: Sequence[Run]) -> float | None:
    """Executes a run in this process; its output goes to log.txt.

    Args:
        run: run to execute.
        others: runs that may have the same answers before training.

    Returns:
        Seconds of the run, or None if it failed.
    """
    from nemo_popsd.cli.main import main as popsd

    started = time.monotonic()
    run.output.mkdir(parents=True, exist_ok=True)
    lend_first_evaluation(run, others)
    with (run.output / "log.txt").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        stages = [[f"training.steps={steps}"] for steps in run.stages] or [[]]
        failures = (status for stage in stages if (status := popsd(["train", str(CONF), *run.overrides, *stage])))
        status = next(failures, 0)  # a failed stage ends the run
    except BaseException:
        traceback.print_exc()
        status = 1
    return None if status else time.monotonic() - started


def lend_first_evaluation(run: Run, others: Sequence[Run]) -> None:
    """Copies the answers of the untrained base, which depend only on seed and rows, to a run that has not started.

    The directory is then the same as that of a run interrupted after its first evaluation.

    Args:
        run: run that would generate the same answers.
        others: runs that may have generated them.
    """
    mine = run.output / "validation" / "step-000000"
    if (run.output / "config.yaml").exists() or mine.exists():
        return
    same = (other for other in others if other.asked == run.asked)
    lender = next((other for other in same if (other.output / "DONE").exists()), None)
    if lender is not None:
        # Renamed last: if this is interrupted before, the run generates its own answers.
        unnamed = run.output / "lent.partial"
        shutil.rmtree(unnamed, ignore_errors=True)
        shutil.copytree(lender.output / "validation" / "step-000000", unnamed)
        stage = [f"training.steps={steps}" for steps in run.stages[:1]]
        save_resolved(load_config(str(CONF), [*run.overrides, *stage]), run.output / "config.yaml")
        with (lender.output / METRICS).open() as lines:
            (run.output / METRICS).write_text(next(lines))  # those of the first evaluation
        mine.parent.mkdir(exist_ok=True)
        unnamed.rename(mine)


def tune(arms: Sequence[Arm], workers: int) -> None:
    """Executes the runs that select the rates, and extends the grid of an arm whose best rate is at its edge."""
    execute(tuning_runs(arms), workers)
    while beyond := missing_neighbours(load(), arms):
        execute(beyond, workers)


def run_table(table: Table, workers: int, until: float) -> None:
    """Writes the rows of a table, selects the rates of the arms that it tunes, and executes its runs.

    Raises:
        UserError: the model of the table does not exist.
    """
    if table.needs and not (table.needs / "config.json").exists():
        raise UserError(
            f"table {table.name}",
            got=f"no model in {table.needs}",
            need="the larger model",
            fix=f"run python -m nemo_popsd.testbed.reasoner --output {table.needs.parent} until it is complete",
        )
    for name in table.files:
        make(name)
    execute(table_tuning_runs(table), workers, table.file, until)
    rates = rates_of(table, load(table.file), load())
    execute(table_training_runs(table, rates), workers, table.file, until)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "train", "all", "tables", *TABLES))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="some of the arms")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time after which no run of a table is started")
    parser.add_argument("--cost", action="store_true", help="print the estimated cost of a table and run nothing")
    options = parser.parse_args()
    tables = list(TABLES.values()) if options.what == "tables" else [t for n, t in TABLES.items() if n == options.what]
    if options.cost:
        seconds = [r.seconds for r in load() if (r.phase, r.arm) == ("training", PURIFIED.name)]
        print(cost_table(tables, statistics.median(seconds)))
        return
    until = time.monotonic() + 60 * options.minutes
    for table in tables:
        run_table(table, options.workers, until)
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
