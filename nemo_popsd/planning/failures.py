"""Goodput of a run whose nodes fail, and how often to save.

A job fails when one of its nodes fails. It is requeued, restarts, and repeats the steps since its last complete
checkpoint, as `slurm/train.sh` does (tests/slurm). The simulation uses simpy; the formulas are those of Young (1974)
and Daly (2006).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from nemo_popsd.planning.plan import Estimate

_FAILURES, _SEGMENTS = 400, 10_000
"""Maximum numbers of failures and segments that are simulated per interval."""
_FEWEST_FAILURES = 10
"""Minimum number of failures for a meaningful simulation."""
_CANDIDATES = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)
"""Simulated intervals, as multiples of Daly's."""


@dataclass(frozen=True)
class Rates:
    """Durations that determine the goodput, in seconds."""

    step: float
    """Time of one step."""
    save: float
    """Time for which one save pauses training."""
    requeue: float
    """Time from a failure until training continues."""
    between_failures: float
    """Mean time between failures of any node of the job."""

    @staticmethod
    def of(estimate: Estimate) -> Rates:
        """The rates of a plan."""
        settings = estimate.case.plan.simulation
        return Rates(
            estimate.seconds.total,
            settings.checkpoint_seconds,
            settings.requeue_seconds,
            settings.node_mtbf_hours * 3600 / estimate.case.nodes,
        )


def young(rates: Rates) -> float:
    """√(2·C·M), seconds between saves (J. W. Young 1974): C a save, M between failures."""
    return math.sqrt(2 * rates.save * rates.between_failures)


def daly(rates: Rates) -> float:
    """Daly's higher-order estimate (J. T. Daly 2006), seconds between saves: √(2CM)·[1 + ⅓·√(C/2M) + C/(18·M)] − C for
    C < 2M, else M.
    """
    save, mean = rates.save, rates.between_failures
    if save >= 2 * mean:
        return mean
    half = save / (2 * mean)
    return math.sqrt(2 * save * mean) * (1 + math.sqrt(half) / 3 + half / 9) - save


def expected_goodput(rates: Rates, steps: int) -> float:
    """Fraction of time spent on steps that are not lost, by formula.

    With exponential failures a segment of s seconds (`steps` steps and a save) takes M·e^(R/M)·(e^(s/M) − 1) on
    average, with R seconds for a requeue, during which nodes can fail as well (Daly 2006).
    """
    useful = steps * rates.step
    mean = rates.between_failures
    exponent, requeue = (useful + rates.save) / mean, rates.requeue / mean
    return useful / (mean * math.exp(requeue) * math.expm1(exponent)) if exponent + requeue < 300 else 0.0


def simulated_goodput(rates: Rates, steps: int, *, seed: int) -> float | None:
    """The same fraction from a simulation; None if failures are so rare that it would take too long."""
    segment = steps * rates.step + rates.save
    failures = min(_FAILURES, int(_SEGMENTS * segment / rates.between_failures))
    if failures < _FEWEST_FAILURES:
        return None
    random = np.random.default_rng(seed)
    job = replay(rates, steps, (float(random.exponential(rates.between_failures)) for _ in range(failures)))
    return job.lasting * rates.step / job.seconds


@dataclass
class Job:
    """A job until its last failure."""

    lasting: int = 0
    """Steps that are in a complete checkpoint."""
    repeated: int = 0
    """Steps that were computed and lost."""
    seconds: float = 0.0
    """Duration of the job."""


def replay(rates: Rates, steps: int, waits: Iterable[float]) -> Job:
    """Simulates a job that fails at given times.

    Args:
        rates: `between_failures` is not used.
        steps: steps between two saves.
        waits: seconds until the first failure, and from each to the next.
    """
    env, job = simpy.Environment(), Job()
    training = env.process(_training(env, rates, steps, job))
    env.run(until=env.process(_failures(env, training, waits)))
    job.seconds = env.now
    return job


def _training(env: simpy.Environment, rates: Rates, steps: int, job: Job) -> Generator[simpy.Event, Any, None]:
    """Runs segments of steps and a save, and restarts from the last complete checkpoint after each failure."""
    requeued, start = False, None
    while True:
        try:
            if requeued:
                yield env.timeout(rates.requeue)
                requeued = False
            start = env.now
            yield env.timeout(steps * rates.step + rates.save)
            start = None
            job.lasting += steps
        except simpy.Interrupt:
            if start is not None:
                job.repeated += min(steps, int((env.now - start) / rates.step))
            requeued, start = True, None


def _failures(
    env: simpy.Environment, training: simpy.Process, waits: Iterable[float]
) -> Generator[simpy.Event, Any, None]:
    for seconds in waits:
        yield env.timeout(seconds)
        training.interrupt()
    yield env.timeout(0)  # the last failure is counted


@dataclass(frozen=True)
class Interval:
    """Goodput with a save after every `steps` steps."""

    steps: int
    """Steps between two saves."""
    expected: float
    """Goodput by formula."""
    simulated: float | None
    """Goodput by simulation; None if failures are too rare for one."""


def intervals(estimate: Estimate) -> list[Interval]:
    """Intervals around Daly's, and that of the run (`training.checkpoint_every`), in ascending order."""
    rates, settings = Rates.of(estimate), estimate.case.config.training
    steps = {max(1, round(factor * daly(rates) / rates.step)) for factor in _CANDIDATES}
    if settings.checkpoint_every:
        steps.add(settings.checkpoint_every)
    seed = estimate.case.plan.simulation.seed
    return [
        Interval(count, expected_goodput(rates, count), simulated_goodput(rates, count, seed=seed))
        for count in sorted(steps)
    ]
