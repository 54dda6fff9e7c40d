"""The estimate of one layout, reasons why it is impossible, the nearest layouts that fit, and the fastest layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemo_popsd.planning import compute, duration, traffic
from nemo_popsd.planning.fp8 import misfits_of_fp8
from nemo_popsd.planning.layout import DIMENSIONS, misfits
from nemo_popsd.planning.memory import Memory, memory
from nemo_popsd.planning.workload import Case

GIB = 2**30

Changes = Mapping[str, object]
"""Settings of the run that differ from the requested ones, by dotted name."""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost per GPU of one step of a run on one layout."""

    case: Case
    """The run and its layout."""
    memory: Memory
    """Bytes, at the length limits."""
    flops: compute.StepFlops
    """Operations, at the mean lengths."""
    traffic: traffic.StepTraffic
    """Bytes sent, at the mean lengths."""
    seconds: duration.StepSeconds
    """Seconds, at the mean lengths."""

    @property
    def budget(self) -> float:
        """Bytes of a GPU that tensors may use."""
        hardware = self.case.plan.hardware
        return hardware.memory_gib * hardware.usable_memory * GIB

    @property
    def fits(self) -> bool:
        """Whether every phase stays within the budget."""
        return self.memory.worst <= self.budget


def estimate(case: Case) -> Estimate:
    """The estimate for a layout that divides (see `problems`)."""
    needed = memory(case)
    flops, moved = compute.step(case), traffic.step(case, from_host=needed.copy_on_host)
    return Estimate(case, needed, flops, moved, duration.step(case, flops, moved))


def problems(case: Case) -> list[str]:
    """Why the run is impossible: sizes that do not divide or, if all divide, memory. Empty if it is possible."""
    reasons = misfits(case.layout, case.sizes, case.prompts) or misfits_of_fp8(case)
    if reasons:
        return reasons
    result = estimate(case)
    if result.fits:
        return []
    return [f"{result.memory.worst / GIB:.1f} GiB per GPU of {result.budget / GIB:.1f} GiB usable"]


def fastest(case: Case) -> tuple[Changes, Estimate] | None:
    """The layout that fits with the shortest estimated step, and the settings that it changes; None if none fits."""
    best: tuple[Changes, Estimate] | None = None
    for changes in sorted(_candidates(case), key=lambda candidate: _distance(case, candidate)):
        result = _if_possible(case.replace(changes))
        if result is not None and (best is None or result.seconds.total < best[1].seconds.total):
            best = changes, result
    return best


def nearest(case: Case, limit: int = 4) -> list[tuple[Changes, Estimate]]:
    """Up to `limit` layouts that fit, sorted by their distance from the request, then by the time of a step.

    The number of prompts per step is changed only for layouts that do not divide it.
    """
    layouts: list[tuple[Changes, Estimate]] = []
    choices = [_with_batch(case, changes) for changes in _candidates(case)]
    ordered = sorted(choices, key=lambda changes: _distance(case, changes))
    for _, alike in itertools.groupby(ordered, key=lambda changes: _distance(case, changes)):
        results = [(changes, _if_possible(case.replace(changes))) for changes in alike]
        possible = [(changes, result) for changes, result in results if result is not None]
        layouts += sorted(possible, key=lambda layout: layout[1].seconds.total)
        if len(layouts) >= limit:
            break
    return layouts[:limit]


def _if_possible(case: Case) -> Estimate | None:
    if misfits(case.layout, case.sizes, case.prompts) or misfits_of_fp8(case):
        return None
    result = estimate(case)
    return result if result.fits else None


def _candidates(case: Case) -> Iterator[Changes]:
    """Changes to try: powers of two for sizes; memory-saving settings, unchanged or enabled."""
    layout = case.layout
    sizes = {
        "tensor": _powers(min(layout.gpus_per_node, case.sizes.groups)),
        "pipeline": _powers(min(layout.world, case.sizes.layers)),
        "context": _powers(min(layout.gpus_per_node, layout.world)),
        "expert": _powers(case.sizes.experts) if case.sizes.experts else [1],
    }
    choices: dict[str, list[object]] = {
        f"parallel.{name}": [*sorted({*values, getattr(layout, name)})]
        for name, values in sizes.items()
        if name in DIMENSIONS
    }
    for name, off, on in (("optimizer.distributed", "false", "true"), ("student.recompute", "none", "full")):
        choices[name] = [off, on] if case.setting(name) == off else [case.setting(name)]
    if not case.lora:
        choices["student.frozen_copy"] = [*sorted({case.config.student.frozen_copy, "host"})]
    for values in itertools.product(*choices.values()):
        changes = dict(zip(choices, values, strict=True))
        # Unchanged if the tensor-parallel size is unchanged; otherwise enabled if possible.
        kept = changes["parallel.tensor"] == layout.tensor and not case.sizes.experts
        changes["parallel.sequence"] = case.setting("parallel.sequence") if kept else "auto"
        if "virtual_pipeline" in DIMENSIONS and changes.get("parallel.pipeline") == 1:
            changes["parallel.virtual_pipeline"] = 1
            changes["parallel.overlap_transfers"] = False
        if changes["parallel.context"] != layout.context:
            changes["parallel.context_type"], changes["parallel.context_sizes"] = "auto", []
        if changes["parallel.pipeline"] != layout.pipeline:
            changes["parallel.first_stage_layers"] = changes["parallel.last_stage_layers"] = 0
        yield {name: value for name, value in changes.items() if value != case.setting(name)}


def _with_batch(case: Case, changes: Changes) -> Changes:
    """`changes`; if the layout does not divide the prompts per step, with the nearest number that it divides."""
    layout = case.replace(changes).layout
    fixed = case.plan.workload.prompts_per_node is not None or layout.world % layout.replica
    if fixed or case.prompts % layout.data == 0:
        return changes
    return {**changes, "training.prompts_per_step": max(1, round(case.prompts / layout.data)) * layout.data}


def _powers(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length())]


_FOLLOWING = tuple(
    f"parallel.{name}"
    for name in (
        *("sequence", "overlap_transfers", "first_stage_layers", "last_stage_layers"),
        *("context_type", "context_sizes"),
    )
)


def _distance(case: Case, changes: Changes) -> float:
    """Distance from the request: the number of doublings and halvings of sizes, plus 1 for each other setting.

    `parallel.sequence`, which follows the tensor-parallel size, does not count, nor do settings that are reset because
    the number of stages or context-parallel ranks changes.
    """
    distance = 0.0
    for name, value in changes.items():
        before = case.setting(name)
        if name in _FOLLOWING:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            distance += 1
        else:
            assert isinstance(before, int)
            distance += abs(math.log2(value / before))
    return distance
