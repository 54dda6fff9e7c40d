"""The output of `popsd rehearse`: some ranks' steps beside their plan."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import UserError
from nemo_popsd.planning import compute, memory
from nemo_popsd.planning.config import WorkloadConfig
from nemo_popsd.planning.layout import misfits
from nemo_popsd.planning.report import shape
from nemo_popsd.planning.settings import split_settings
from nemo_popsd.planning.sizes import read_model_file, read_sizes
from nemo_popsd.planning.workload import Case
from nemo_popsd.rehearsal.rank import Rehearsed, as_rehearsed, rehearse

GIB, TERA = 2**30, 1e12
PLANNED = {"frozen": "frozen", "train": "training"}
"""Phases of a plan by those of a step."""


@dataclass(frozen=True)
class Quantity:
    """A measured number beside its plan."""

    name: str
    """What it is."""
    unit: str
    """GiB or TFLOP."""
    measured: float
    """In `unit`."""
    planned: float
    """In `unit`."""

    @property
    def ratio(self) -> float:
        """Measured by planned."""
        return self.measured / self.planned if self.planned else float("nan")


def rehearsal_text(
    config: str | Path, words: Sequence[str], *, ranks: Sequence[str] = (), as_json: bool = False
) -> str:
    """Rehearses one step of some ranks.

    Args:
        config: configuration file of the run.
        words: ``key=value``, of the plan (nodes, gpus_per_node) and of the run.
        ranks: numbers, or ``last``; empty takes rank 0.
        as_json: the same as data.

    Raises:
        UserError: a setting is wrong, the layout does not divide, or cannot be rehearsed.
    """
    plan, rest = split_settings(words)
    if len(plan.nodes) != 1:
        raise UserError("rehearsal", got=f"nodes={plan.nodes}", need="one number of nodes", fix="set nodes=1")
    run = as_rehearsed(load_config(config, rest))
    sizes, origin = read_sizes(run.student.source)
    plan = dataclasses.replace(plan, workload=WorkloadConfig(layers="plain"))
    case = Case(run, plan, sizes, plan.nodes[0], device="cpu")
    _refuse(case)
    content = read_model_file(run.student.source).content
    found = []
    for rank in _chosen(case, ranks):
        started = time.monotonic()
        found.append((rehearse(case, content, rank), time.monotonic() - started))
    if as_json:
        return json.dumps([_as_data(case, rehearsed, seconds) for rehearsed, seconds in found], indent=2)
    head = [
        f"{sizes.name} ({origin}), {case.layout.world} GPUs: {shape(case)}",
        "One step without peers, weights or a GPU, on rows and responses of the longest lengths (docs/planning.md).",
        "Layers are Megatron's local ones, for which `popsd plan` has other formulas than for those of a GPU.",
    ]
    return "\n".join([*head, *(line for each in found for line in _described(case, *each))])


def _refuse(case: Case) -> None:
    reasons = misfits(case.layout, case.sizes, case.prompts)
    if reasons:
        raise UserError(
            f"rehearsal of {case.sizes.name} on {case.layout.nodes} x {case.layout.gpus_per_node} GPUs",
            got="; ".join(reasons),
            need="a layout that divides",
            fix="set parallel.*, or nodes",
        )
    if case.layout.pipeline > 1:
        raise UserError(
            "rehearsal",
            got=f"parallel.pipeline={case.layout.pipeline}",
            need="parallel.pipeline=1: a stage learns the shapes of its inputs from its peer, which a rehearsal lacks",
            fix="use `popsd plan`",
        )
    if case.sizes.experts:
        raise UserError(
            "rehearsal",
            got=f"{case.sizes.name}, a mixture of experts",
            need="a dense model: which expert a token visits depends on values, and a rehearsal has none",
            fix="use `popsd plan`",
        )


def _chosen(case: Case, ranks: Sequence[str]) -> list[int]:
    world, chosen = case.layout.world, []
    for text in ranks or ["0"]:
        rank = world - 1 if text == "last" else int(text) if text.isdecimal() else -1
        if not 0 <= rank < world:
            raise UserError("rehearsal", got=f"rank {text}", need=f"0 to {world - 1}, or last", fix="set --ranks")
        chosen.append(rank)
    return list(dict.fromkeys(chosen))


def quantities(case: Case, rehearsed: Rehearsed) -> list[Quantity]:
    """Memory and operations of a rank beside their plan."""
    planned, flops = memory.memory(case), compute.step(case)
    standing = sum(planned.standing.values())
    found = [
        Quantity("weights", "GiB", rehearsed.weights / GIB, planned.standing["weights"] / GIB),
        Quantity("between steps", "GiB", rehearsed.standing / GIB, standing / GIB),
    ]
    for phase, name in PLANNED.items():
        cost = rehearsed.phases[phase]
        found.append(Quantity(f"{name}, peak", "GiB", cost.peak / GIB, planned.peak(name) / GIB))
        found.append(Quantity(f"{name}, work", "TFLOP", cost.flops / TERA, getattr(flops, name).counted / TERA))
    return found


def _described(case: Case, rehearsed: Rehearsed, seconds: float) -> Iterator[str]:
    yield ""
    yield f"rank {rehearsed.rank}, rehearsed in {seconds:.0f} s"
    yield ""
    yield f"{'':<24}{'measured':>12}{'planned':>12}{'ratio':>8}"
    for item in quantities(case, rehearsed):
        name = f"{item.name}, {item.unit}"
        yield f"{name:<24}{item.measured:>12.3f}{item.planned:>12.3f}{item.ratio:>8.3f}"
    yield ""
    yield f"{'phase':<10}{'collective':<40}{'group':<44}{'calls':>6}{'MiB':>12}"
    for phase, cost in rehearsed.phases.items():
        for what, calls in sorted(cost.calls.items(), key=lambda entry: -cost.bytes[entry[0]]):
            group = f"{what.group.lower()} of {what.ranks}"
            yield f"{phase:<10}{what.name:<40}{group:<44}{calls:>6}{cost.bytes[what] / 2**20:>12.3f}"


def _as_data(case: Case, rehearsed: Rehearsed, seconds: float) -> dict[str, Any]:
    return {
        "rank": rehearsed.rank,
        "seconds": seconds,
        "quantities": [{**dataclasses.asdict(item), "ratio": item.ratio} for item in quantities(case, rehearsed)],
        "collectives": [
            {"phase": phase, **dataclasses.asdict(what), "calls": calls, "bytes": cost.bytes[what]}
            for phase, cost in rehearsed.phases.items()
            for what, calls in cost.calls.items()
        ],
    }
