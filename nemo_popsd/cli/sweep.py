"""`popsd train CONF --seeds 1,2,3 --grid key=a,b`: the runs of a sweep, sequentially, each in its own process.

Each run has its own output below the output of the configuration, so the same command continues a sweep and skips
finished runs.
"""

from __future__ import annotations

import itertools
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nemo_popsd.errors import SAVED_AND_STOPPED, UserError

MOST_RUNS = 200
"""Maximum number of runs in one sweep."""
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    label: str
    """Output relative to that of the sweep, e.g. ``lr_1e-5/seed_2``."""
    overrides: list[str]
    """Overrides of this run, in addition to those of the sweep."""


def runs_of(seeds: Sequence[int], grid: Sequence[str]) -> list[Run]:
    """Return the runs: every combination of the grid, with every seed.

    Args:
        seeds: values of `seed`; an empty sequence keeps that of the configuration.
        grid: entries ``key=value,value``; commas inside brackets belong to a value.

    Raises:
        UserError: an entry has no key or value, a key or value is repeated, or there are too many runs.
    """
    axes = [_axis(entry) for entry in grid]
    if seeds:
        axes.append(("seed", [str(seed) for seed in seeds]))
    keys = [key for key, _ in axes]
    repeated = [key for key in keys if keys.count(key) > 1]
    repeated += [f"{key}={value}" for key, values in axes for value in values if values.count(value) > 1]
    count = 1
    for _, values in axes:
        count *= len(values)
    if repeated or count > MOST_RUNS:
        got = f"{repeated[0]} more than once" if repeated else f"{count} runs"
        need = f"different values, and at most {MOST_RUNS} runs"
        raise UserError("sweep", got=got, need=need, fix="correct --seeds or --grid")
    found = []
    for chosen in itertools.product(*(values for _, values in axes)):
        point = dict(zip(keys, chosen, strict=True))
        label = "_".join(_label(key, value) for key, value in point.items() if key != "seed")
        parts = [label] if label else []
        if "seed" in point:
            parts.append(f"seed_{point['seed']}")
        found.append(Run("/".join(parts), [f"{key}={value}" for key, value in point.items()]))
    labels = [run.label for run in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError("sweep", got=f"two runs with the output {label}", need="one each", fix="correct --grid")
    return found


def train_in_sequence(conf: str, overrides: Sequence[str], runs: Sequence[Run], *, output: str, name: str) -> int:
    """Train all runs, each in its own process, and write a report about them.

    If a run fails, the next one is still trained. If a signal stops a run, the run saves and the sweep ends.

    Args:
        conf: configuration file.
        overrides: overrides of all runs.
        runs: runs to train.
        output: parent directory of the outputs of the runs.
        name: name of the sweep; the name of a run appends its label.

    Returns:
        0, `SAVED_AND_STOPPED`, or the exit status of the first run that failed.
    """
    failed: list[tuple[str, int]] = []
    for number, run in enumerate(runs, start=1):
        words = ["train", conf, *overrides, *own_overrides(run, output=output, name=name)]
        print(f"run {number} of {len(runs)}: popsd {shlex.join(words)}", flush=True)
        status = _run_in_process(words)
        if status in (SAVED_AND_STOPPED, 128 + signal.SIGINT):
            print(f"stopped in run {number} of {len(runs)}; the same command continues there", flush=True)
            return status
        if status:
            failed.append((run.label, status))
    from nemo_popsd.report import read_run, text_over_seeds, write_report
    from nemo_popsd.report.page import NAME

    failures = {label for label, _ in failed}
    finished = [Path(output) / run.label for run in runs if run.label not in failures]
    if finished:
        page = write_report(finished, Path(output) / NAME)
        print(text_over_seeds([read_run(directory) for directory in finished]) or f"{len(finished)} runs")
        print(f"report: {page}")
    for label, status in failed:
        print(f"popsd: run {label} ended with status {status}; its error is above", file=sys.stderr, flush=True)
    return failed[0][1] if failed else 0


def own_overrides(run: Run, *, output: str, name: str) -> list[str]:
    """Return all overrides of one run, including its output and name."""
    return [*run.overrides, f"output={output}/{run.label}", f"name={name}-{run.label.replace('/', '-')}"]


def _axis(entry: str) -> tuple[str, list[str]]:
    key, equals, text = entry.partition("=")
    values = re.split(r",(?![^\[{]*[\]}])", text)
    if not key.strip() or not equals or not all(value.strip() for value in values):
        raise UserError(
            "sweep", got=f"--grid {entry}", need="key=value,value, as in optimizer.lr=1e-5,3e-5", fix="correct it"
        )
    if key in ("output", "name", "overwrite"):
        raise UserError("sweep", got=f"--grid {entry}", need="a setting of the runs", fix=f"set {key} as an override")
    return key.strip(), [value.strip() for value in values]


def _label(key: str, value: str) -> str:
    """Return a directory name, e.g. ``lr_1e-5`` for ``optimizer.lr=1e-5``."""
    return re.sub(r"[^\w.+-]+", "-", f"{key.rpartition('.')[2]}_{value}").strip("-")


def _run_in_process(words: Sequence[str]) -> int:
    """Run ``popsd *words`` and return its exit status."""
    with subprocess.Popen([sys.executable, "-m", "nemo_popsd", *words]) as process, _signals_go_to(process):
        return process.wait()


@contextmanager
def _signals_go_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward the signals of the batch system to `process`; signals of the terminal reach it directly."""

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    def leave_to_the_run(number: int, frame: FrameType | None) -> None:
        """Do nothing: the run also receives the signal and handles it."""

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, leave_to_the_run)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
