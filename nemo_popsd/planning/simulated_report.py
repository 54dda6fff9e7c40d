"""The output of `popsd plan --simulate` and `--failures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from nemo_popsd.planning.failures import Interval, Rates, daly, intervals, young
from nemo_popsd.planning.plan import Estimate, estimate
from nemo_popsd.planning.report import shape
from nemo_popsd.planning.simulation import SimulatedStep, simulate
from nemo_popsd.planning.workload import Case

LINEAR = 0.9
"""Scaling counts as linear above this ratio of prompts per second and node to that on the fewest nodes."""

_NOTE = "Simulated with the plan's seconds, not measured; assumptions: docs/planning.md"


def simulation_text(estimates: Sequence[Estimate]) -> str:
    """Steps by number of nodes, the part that ends linear scaling, and the effect of settings on the most nodes."""
    steps = [simulate(each) for each in estimates]
    rows = [_scaling_row(each, step, estimates[0], steps[0]) for each, step in zip(estimates, steps, strict=True)]
    lines = [_NOTE, "", *_table(_SCALING, rows), "", _limit(estimates, steps), ""]
    variants = [(name, estimates[-1].case.replace(changes)) for name, changes in _variants(estimates[-1].case)]
    simulated = [(name, simulate(estimate(case))) for name, case in variants]
    lines += _table(("on the most nodes", *_PARTS, "step s"), [(name, *_parts(step)) for name, step in simulated])
    return "\n".join(lines)


def failures_text(estimates: Sequence[Estimate]) -> str:
    """Goodput by interval between saves, for each number of nodes."""
    return "\n\n".join([_NOTE, *map(_failures_of, estimates)])


_PARTS = tuple(item.name for item in fields(SimulatedStep))
_SCALING = ("nodes", "layout", "prompts", "plan s", *_PARTS, "step s", "prompts/s", "linear")


def _parts(step: SimulatedStep) -> tuple[str, ...]:
    return (*(f"{getattr(step, name):.2f}" for name in _PARTS), f"{step.total:.2f}")


def _rate(each: Estimate, step: SimulatedStep) -> float:
    """Prompts per second and node."""
    return each.case.prompts / step.total / each.case.nodes


def _scaling_row(each: Estimate, step: SimulatedStep, first: Estimate, first_step: SimulatedStep) -> tuple[str, ...]:
    rate, case = _rate(each, step), each.case
    relative = rate / _rate(first, first_step)
    head = str(case.nodes), shape(case), str(case.prompts), f"{each.seconds.total:.2f}"
    return (*head, *_parts(step), f"{rate * case.nodes:.2f}", f"{relative:.3f}")


def _limit(estimates: Sequence[Estimate], steps: Sequence[SimulatedStep]) -> str:
    """Number of nodes at which scaling falls below `LINEAR`, and the part of a step that causes most of the loss."""
    base, first = _rate(estimates[0], steps[0]), steps[0]
    for each, step in zip(estimates, steps, strict=True):
        if _rate(each, step) < LINEAR * base:
            work = each.case.prompts / estimates[0].case.prompts * estimates[0].case.nodes / each.case.nodes
            lost = {name: getattr(step, name) - work * getattr(first, name) for name in _PARTS}
            worst = max(lost, key=lambda name: lost[name])
            return (
                f"linear to {LINEAR:.0%} on fewer than {each.case.nodes} nodes; most of the loss there: {worst}, "
                f"{lost[worst]:.2f} s of a step of {step.total:.2f} s"
            )
    return f"linear to {LINEAR:.0%} on all node counts"


def _variants(case: Case) -> list[tuple[str, Mapping[str, object]]]:
    """Settings that change the tail."""
    return [
        ("as planned", {}),
        ("rollout.overlap=true, dedicated servers", {"rollout.overlap": True, "rollout.vllm.launcher": "any"}),
        ("rollout.per_prompt=4", {"rollout.per_prompt": 4}),
        _halved("rollout.batch_rows", case.decoded_rows),
        _halved("training.microbatch_tokens", case.config.training.microbatch_tokens),
        _halved("rollout.max_response_tokens", case.limits.response),
    ]


def _halved(name: str, value: int) -> tuple[str, Mapping[str, object]]:
    """Half of a setting."""
    half = max(1, value // 2)
    return f"{name}={half}", {name: half}


def _failures_of(each: Estimate) -> str:
    rates, found = Rates.of(each), intervals(each)
    best = max(found, key=_goodput)
    rows = [
        (
            str(interval.steps),
            f"{interval.steps * rates.step / 60:.1f}",
            f"{interval.expected:.4f}",
            "" if interval.simulated is None else f"{interval.simulated:.4f}",
        )
        for interval in found
    ]
    chosen = each.case.config.training.checkpoint_every
    lines = [
        f"{each.case.nodes} nodes: a failure every {rates.between_failures / 3600:.1f} h, {rates.step:.1f} s per step, "
        f"{rates.save:.0f} s per save, {rates.requeue:.0f} s until training continues",
        "",
        *_table(("steps between saves", "minutes", "goodput by formula", "simulated"), rows),
        "",
        f"Young: {young(rates) / rates.step:.0f} steps, Daly: {daly(rates) / rates.step:.0f} steps; best in the table: "
        f"training.checkpoint_every={best.steps}, the run uses {chosen}",
    ]
    return "\n".join(lines)


def _goodput(interval: Interval) -> float:
    return interval.expected if interval.simulated is None else interval.simulated


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
