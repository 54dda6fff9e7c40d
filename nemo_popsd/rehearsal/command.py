"""The output of `popsd rehearse`: the measured steps of some ranks compared with their plan."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import UserError
from nemo_popsd.planning.config import WorkloadConfig
from nemo_popsd.planning.plan import problems
from nemo_popsd.planning.report import shape
from nemo_popsd.planning.settings import split_settings
from nemo_popsd.planning.sizes import read_model_file, read_sizes
from nemo_popsd.planning.workload import Case
from nemo_popsd.rehearsal.comparison import quantities, transfers
from nemo_popsd.rehearsal.kinds import kinds
from nemo_popsd.rehearsal.rank import Rehearsed, as_rehearsed, rehearse

logger = logging.getLogger(__name__)


def rehearsal_text(
    config: str | Path,
    words: Sequence[str],
    *,
    ranks: Sequence[str] = (),
    all_kinds: bool = False,
    as_json: bool = False,
) -> str:
    """Rehearses one step of some ranks.

    Args:
        config: configuration file of the run.
        words: ``key=value`` settings of the plan (nodes, gpus_per_node) and of the run.
        ranks: rank numbers, or ``last``; if empty, the ranks selected by `nemo_popsd.rehearsal.kinds`.
        all_kinds: without `ranks`, rehearse one rank of every kind.
        as_json: return JSON instead of text.

    Raises:
        UserError: a setting is wrong; the layout does not divide, does not fit according to the plan, or cannot be
            rehearsed; or the weights for vLLM differ from those of transformers.
    """
    plan, rest = split_settings(words)
    if len(plan.nodes) != 1:
        raise UserError("rehearsal", got=f"nodes={plan.nodes}", need="one number of nodes", fix="set nodes=1")
    asked = load_config(config, rest)
    sizes, origin = read_sizes(asked.student.source)
    _refuse(Case(asked, plan, sizes, plan.nodes[0]))
    run = as_rehearsed(asked)
    plan = dataclasses.replace(plan, workload=WorkloadConfig(layers="plain"))
    case = Case(run, plan, sizes, plan.nodes[0], device="cpu")
    content = read_model_file(run.student.source).content
    found = []
    chosen = _chosen(case, ranks, all_kinds=all_kinds)
    for number, rank in enumerate(chosen, 1):
        logger.info("rehearsing rank %d of %d (%d/%d)", rank, case.layout.world, number, len(chosen))
        started = time.monotonic()
        with _errors_only():
            found.append((rehearse(case, content, rank), time.monotonic() - started))
    if as_json:
        return json.dumps([_as_data(case, rehearsed, seconds) for rehearsed, seconds in found], indent=2)
    head = [
        f"{sizes.name} ({origin}), {case.layout.world} GPUs: {shape(case)}",
        "One step without peers, weights or a GPU, on rows and responses of maximum length (docs/planning.md).",
        "Layers are Megatron's local ones, for which `popsd plan` uses other formulas than for TE layers.",
    ]
    if asked.fp8.passes:
        head.append(f"{', '.join(asked.fp8.passes)}: not rehearsed in FP8; these passes and their plan use bf16 here.")
    return "\n".join([*head, *(line for each in found for line in _described(case, *each))])


@contextmanager
def _errors_only() -> Iterator[None]:
    """Context in which only errors are logged, unless the level is debug: the other messages of a run concern rows and
    values, which a rehearsal does not have.
    """
    log = logging.getLogger("nemo_popsd")
    level = log.level
    if level > logging.DEBUG:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _refuse(case: Case) -> None:
    reasons = problems(case)
    if reasons:
        raise UserError(
            f"rehearsal of {case.sizes.name} on {case.layout.nodes} x {case.layout.gpus_per_node} GPUs",
            got="; ".join(reasons),
            need="a layout that divides and fits according to `popsd plan`",
            fix="set parallel.*, or nodes; `popsd plan` lists layouts",
        )


def _chosen(case: Case, ranks: Sequence[str], *, all_kinds: bool) -> list[int]:
    if not ranks:
        return kinds(case.layout, every=all_kinds)
    world, chosen = case.layout.world, []
    for text in ranks:
        rank = world - 1 if text == "last" else int(text) if text.isdecimal() else -1
        if not 0 <= rank < world:
            raise UserError("rehearsal", got=f"rank {text}", need=f"0 to {world - 1}, or last", fix="set --ranks")
        chosen.append(rank)
    return list(dict.fromkeys(chosen))


def _described(case: Case, rehearsed: Rehearsed, seconds: float) -> Iterator[str]:
    yield ""
    yield f"rank {rehearsed.rank}, {_place(case, rehearsed.rank)}, rehearsed in {seconds:.0f} s"
    yield ""
    yield f"{'':<44}{'measured':>12}{'planned':>12}{'ratio':>8}"
    for item in [*quantities(case, rehearsed), *transfers(case, rehearsed)]:
        name = f"{item.name}, {item.unit}"
        yield f"{name:<44}{item.measured:>12.3f}{item.planned:>12.3f}{item.ratio:>8.3f}"
    yield ""
    yield f"checkpoint: {', '.join(rehearsed.checkpoint.files) or 'this rank writes no weights or optimizer state'}"
    yield f"for vLLM: {rehearsed.handover.tensors} tensors of this stage, with the names and shapes of transformers"
    yield ""
    yield f"{'phase':<10}{'collective':<40}{'group':<44}{'calls':>6}{'MiB':>12}"
    for phase, cost in rehearsed.phases.items():
        for what, calls in sorted(cost.calls.items(), key=lambda entry: -cost.bytes[entry[0]]):
            group = f"{what.group.lower()} of {what.ranks}"
            yield f"{phase:<10}{what.name:<40}{group:<44}{calls:>6}{cost.bytes[what] / 2**20:>12.3f}"


def _place(case: Case, rank: int) -> str:
    layout = case.layout
    stage = f"stage {layout.stage_of(rank) + 1} of {layout.pipeline}"
    if not case.sizes.experts:
        return stage
    return f"{stage}, experts {rank // layout.expert_shards % layout.expert + 1} of {layout.expert}"


def _as_data(case: Case, rehearsed: Rehearsed, seconds: float) -> dict[str, Any]:
    both = [*quantities(case, rehearsed), *transfers(case, rehearsed)]
    return {
        "rank": rehearsed.rank,
        "seconds": seconds,
        "checkpoint_files": list(rehearsed.checkpoint.files),
        "vllm": dataclasses.asdict(rehearsed.handover),
        "quantities": [{**dataclasses.asdict(item), "ratio": item.ratio} for item in both],
        "collectives": [
            {"phase": phase, **dataclasses.asdict(what), "calls": calls, "bytes": cost.bytes[what]}
            for phase, cost in rehearsed.phases.items()
            for what, calls in cost.calls.items()
        ],
    }
