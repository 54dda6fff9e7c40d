"""Estimates of a layout with one setting changed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_popsd.planning.layout import misfits
from nemo_popsd.planning.plan import Changes, Estimate, estimate
from nemo_popsd.planning.workload import Case


@dataclass(frozen=True)
class Alternative:
    """One setting with another value; its estimate, or the reasons why the layout is impossible."""

    changes: Changes
    """The setting and those that depend on it, by dotted name."""
    estimate: Estimate | None
    """None if the sizes do not divide; otherwise the estimate, which may exceed the memory."""
    reasons: tuple[str, ...] = ()
    """Why the sizes do not divide."""


def alternatives(case: Case) -> list[Alternative]:
    """The neighbours of `case`: one size halved or doubled, or one switch flipped, at a time.

    Only settings that apply to the run are changed: no expert parallelism without experts, no frozen copy with LoRA.
    """
    found = []
    for changes in _neighbours(case):
        changed = case.replace(changes)
        reasons = misfits(changed.layout, changed.sizes, changed.prompts)
        found.append(Alternative(changes, None if reasons else estimate(changed), tuple(reasons)))
    return found


def _neighbours(case: Case) -> Iterator[Changes]:
    layout = case.layout
    for name in ("tensor", "pipeline", "context", "expert"):
        size = getattr(layout, name)
        if name == "expert" and not case.sizes.experts:
            continue
        for other in (size // 2, size * 2):
            if other:
                yield {f"parallel.{name}": other, **_following(case, name, other)}
    if layout.tensor > 1 and not case.sizes.experts:
        yield {"parallel.sequence": "false" if layout.sequence else "true"}
    yield {"student.recompute": "none" if case.config.student.recompute == "full" else "full"}
    if case.shards_state:
        yield {"optimizer.distributed": "false"}
    yield {"optimizer.overlap_grad_reduce": not case.config.optimizer.overlap_grad_reduce}
    if not case.lora:
        yield {"student.frozen_copy": "device" if case.config.student.frozen_copy == "host" else "host"}


def _following(case: Case, name: str, size: int) -> Changes:
    """Settings that must change together with a size: one rank has no sequence parallelism, a new number of stages
    makes them even, and `parallel.context_type` is reset to its default.
    """
    layout = case.layout
    if name == "tensor" and size == 1 and case.setting("parallel.sequence") == "true":
        return {"parallel.sequence": "auto"}
    if name == "context" and layout.context_type != "auto":
        return {"parallel.context_type": "auto", "parallel.context_sizes": []}
    if name == "pipeline" and (layout.first_stage_layers or layout.last_stage_layers):
        return {"parallel.first_stage_layers": 0, "parallel.last_stage_layers": 0}
    return {}
