"""Discrete-event simulation (simpy) of steps with responses of unequal lengths, slow nodes, and ranks that wait.

The plan estimates a step in which all responses have the mean length and all nodes are equal. Here each generator (the
GPUs that decode a batch together) draws lengths and refills its slots as responses end; all ranks exchange rollouts
after the last generator has finished; each replica then trains on an equal share of the tokens; and the reduction of
gradients waits for the slowest replica. With `rollout.overlap` the next rollouts are generated at the same time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from nemo_popsd.planning.duration import StepSeconds
from nemo_popsd.planning.plan import Estimate
from nemo_popsd.planning.workload import Case


@dataclass(frozen=True)
class SimulatedStep:
    """Mean seconds of one step by activity; they sum to the time of a step."""

    decoding: float
    """Generation, averaged over the generators."""
    tail: float
    """Additional time of the last generator, whose responses are longer or whose node is slow."""
    computing: float
    """Frozen passes and training, averaged over the replicas."""
    stragglers: float
    """Additional time of the slowest replica."""
    reduction: float
    """Part of the gradient reduction that does not overlap, and its latency."""
    hidden: float
    """Time that overlapping rollouts hide; negative."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.decoding + self.tail + self.computing + self.stragglers + self.reduction + self.hidden


def simulate(estimate: Estimate) -> SimulatedStep:
    """Simulates `simulation.steps` steps of the run."""
    return _Run(estimate).result()


class _Run:
    def __init__(self, estimate: Estimate) -> None:
        self._case, self._seconds = estimate.case, estimate.seconds
        case, settings = self._case, self._case.plan.simulation
        self._random = np.random.default_rng(settings.seed)
        self._slowdowns = _slowdowns(case)
        responses = case.prompts * case.responses
        self._generators = max(1, round(responses / case.generated_rows))
        waves = case.decoding_waves * case.means.response
        self._token_seconds = self._seconds.rollout.total / waves
        self._env = simpy.Environment()
        self._ready = simpy.Store(self._env, capacity=1)
        self._generated: list[tuple[float, float]] = []
        """For each step: mean and maximum seconds of the generators."""
        self._trained: list[tuple[float, float, float]] = []
        """For each step: mean and maximum seconds of the replicas, and seconds of the reduction."""

    def result(self) -> SimulatedStep:
        steps = self._case.plan.simulation.steps
        self._env.process(self._rollouts(steps))
        training = self._env.process(self._training(steps))
        self._env.run(until=training)
        total = self._env.now / steps
        decoding, last = (sum(values) / steps for values in zip(*self._generated, strict=True))
        computing, slowest, reduction = (sum(values) / steps for values in zip(*self._trained, strict=True))
        parts = decoding, _above_zero(last - decoding), computing, _above_zero(slowest - computing), reduction
        return SimulatedStep(*parts, hidden=-_above_zero(sum(parts) - total))

    def _rollouts(self, steps: int) -> Generator[simpy.Event, Any, None]:
        """Generates the rollouts of each step; with overlap while the previous step trains."""
        for _ in range(steps):
            begin, ended = self._env.now, list[tuple[int, float]]()
            processes = [self._env.process(self._generator(index, ended)) for index in range(self._generators)]
            yield simpy.AllOf(self._env, processes)
            tokens = sum(tokens for tokens, _ in ended)
            times = [end - begin for _, end in ended]
            self._generated.append((sum(times) / len(times), max(times)))
            trained = self._env.event()
            yield self._ready.put((tokens, trained))
            if not self._seconds.overlap:
                yield trained

    def _generator(self, index: int, ended: list[tuple[int, float]]) -> Generator[simpy.Event, Any, None]:
        """Simulates one batch of slots: a slot starts the next response when its current one ends."""
        case = self._case
        lengths = _lengths(case, self._random, case.generated_rows)
        slots = [0] * min(case.decoded_rows, len(lengths))
        for length in lengths:
            heapq.heapreplace(slots, slots[0] + length)
        slowdown = self._slowdowns[index * len(self._slowdowns) // self._generators]
        yield self._env.timeout(max(slots) * self._token_seconds * slowdown)
        ended.append((sum(lengths), self._env.now))

    def _training(self, steps: int) -> Generator[simpy.Event, Any, None]:
        case, seconds = self._case, self._seconds
        reduction = _reduction(case, seconds)
        alone = seconds.frozen.total + seconds.training.total - seconds.reduction
        mean_tokens = case.prompts * case.responses * case.means.response
        for _ in range(steps):
            tokens, trained = yield self._ready.get()
            work = alone * _share_of_work(case, tokens / mean_tokens)
            begin, ends = self._env.now, dict[float, float]()
            # Replicas with equal work on equal nodes finish together: one process per kind of node.
            alike = [self._env.process(self._replicas(work, slowdown, ends)) for slowdown in set(self._slowdowns)]
            yield simpy.AllOf(self._env, alike)
            times = [ends[slowdown] - begin for slowdown in self._slowdowns]
            yield self._env.timeout(reduction)
            self._trained.append((sum(times) / len(times), max(times), reduction))
            trained.succeed()

    def _replicas(self, work: float, slowdown: float, ends: dict[float, float]) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(work * slowdown)
        ends[slowdown] = self._env.now


def _above_zero(seconds: float) -> float:
    """`seconds`, or 0 for a rounding error."""
    return seconds if seconds > 1e-9 else 0.0


def _slowdowns(case: Case) -> list[float]:
    """Slowdown of each replica, which is that of its slowest node. Slow nodes are evenly distributed."""
    settings, layout = case.plan.simulation, case.layout
    slow = min(settings.slow_nodes, layout.nodes)
    nodes = {number * layout.nodes // slow for number in range(slow)} if slow else set()
    found = []
    for replica in range(layout.data):
        ranks = range(replica * layout.tensor * layout.context, (replica + 1) * layout.tensor * layout.context)
        of_stage = layout.world // layout.pipeline
        hosts = {
            (stage * of_stage + rank) // layout.gpus_per_node
            for stage in range(layout.pipeline)
            for rank in (ranks.start, ranks.stop - 1)
        }
        found.append(settings.slowdown if hosts & nodes else 1.0)
    return found


def _lengths(case: Case, random: np.random.Generator, count: int) -> list[int]:
    """Log-normal lengths with the planned mean, truncated at the limit of the run."""
    spread, mean = case.plan.simulation.length_spread, case.means.response
    drawn = random.lognormal(math.log(mean) - spread**2 / 2, spread, count)
    return [int(length) for length in np.clip(np.rint(drawn), 1, case.limits.response)]


def _reduction(case: Case, seconds: StepSeconds) -> float:
    """Seconds of data-parallel communication: the planned part that does not overlap with the backward pass, and the
    latency of a tree.
    """
    layout = case.layout
    if layout.dense_replicas == 1:
        return 0.0
    levels = math.ceil(math.log2(layout.dense_replicas))
    return seconds.reduction + 2 * levels * case.plan.hardware.latency_us * 1e-6 * case.updates


def _share_of_work(case: Case, share: float) -> float:
    """Work of frozen passes and training relative to the plan if responses have `share` of the planned tokens."""
    mean = case.means
    planned = sum(mean.of(branch) for branch in case.branches) + 3 * mean.student
    of_responses = (len(case.branches) + 3) * mean.response
    return 1 + (share - 1) * of_responses / planned
