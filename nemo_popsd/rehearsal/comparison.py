"""Compares the measured cost of a rank's step with its plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nemo_popsd.planning import compute, memory
from nemo_popsd.planning.checkpoint import stage_share
from nemo_popsd.planning.handover import handed_over
from nemo_popsd.planning.messages import Message, messages
from nemo_popsd.planning.parameters import stage_of
from nemo_popsd.planning.workload import Case
from nemo_popsd.rehearsal.counters import Collective
from nemo_popsd.rehearsal.rank import Rehearsed

GIB, TERA, MIB = 2**30, 1e12, 2**20
_SENT = {True: "adapters for vLLM", False: "weights for vLLM"}
_PLANNED = {"frozen": "frozen", "train": "training"}
"""Phases of the plan by phase of the step."""
_DIMENSIONS = {
    "tensor_model_parallel_group": "tensor",
    "context_parallel_group": "context",
    "pipeline_model_parallel_group": "pipeline",
    "expert_model_parallel_group": "expert",
    "expert_tensor_and_model_parallel_group": "expert",
    "expert_tensor_parallel_group": "expert tensor",
    "data_parallel_group_with_cp": "data",
    "expert_data_parallel_group": "expert data",
    "embedding_group": "embedding",
}
"""Dimensions of the plan by Megatron's description of the process group."""
_KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}
"""Kinds of collectives in the plan by torch's names."""


@dataclass(frozen=True)
class Quantity:
    """A measured quantity and its planned value."""

    name: str
    """Name of the quantity."""
    unit: str
    """GiB, TFLOP or MiB."""
    measured: float
    """Measured value in `unit`."""
    planned: float
    """Planned value in `unit`."""

    @property
    def ratio(self) -> float:
        """Measured divided by planned; 1 if both are 0."""
        if not self.planned:
            return 1.0 if not self.measured else float("inf")
        return self.measured / self.planned


def quantities(case: Case, rehearsed: Rehearsed) -> list[Quantity]:
    """Memory and operations of a rank."""
    stage = stage_of(case.sizes, case.layout, rehearsed.rank)
    planned = memory.of_stage(case, stage)
    flops = compute.of_stage(case, stage)
    found = [
        Quantity(name, "GiB", rehearsed.kinds[name] / GIB, planned.standing[name] / GIB)
        for name in rehearsed.kinds
        if rehearsed.kinds[name] or planned.standing[name]
    ]
    for phase, name in _PLANNED.items():
        cost = rehearsed.phases[phase]
        added = sum(planned.phases[name].values())
        found += [
            Quantity(f"{name}, added", "GiB", (cost.peak - rehearsed.standing) / GIB, added / GIB),
            Quantity(f"{name}, peak", "GiB", cost.peak / GIB, planned.peak(name) / GIB),
            Quantity(f"{name}, work", "TFLOP", cost.flops / TERA, getattr(flops, name).counted / TERA),
        ]
    share = stage_share(case, stage)
    found += [
        Quantity("checkpoint, shards", "GiB", rehearsed.checkpoint.held / GIB, share.held / GIB),
        Quantity("checkpoint, written", "GiB", rehearsed.checkpoint.written / GIB, share.most / GIB),
        Quantity(
            _SENT[rehearsed.handover.adapters], "GiB", rehearsed.handover.bytes / GIB, handed_over(case, stage) / GIB
        ),
    ]
    return found


def transfers(case: Case, rehearsed: Rehearsed) -> list[Quantity]:
    """Bytes of the collectives that carry model tensors, by phase, dimension and kind."""
    layout = case.layout
    stage = stage_of(case.sizes, layout, rehearsed.rank)
    planned = messages(case, stage, context_rank=rehearsed.rank // layout.tensor % layout.context)
    measured: Counter[Message] = Counter()
    for phase, cost in rehearsed.phases.items():
        for what in cost.calls:
            message = _message(_PLANNED.get(phase, phase), what)
            if message is not None:
                measured[message] += cost.bytes[what]
    ordered = sorted({*planned, *measured}, key=lambda each: (each.phase, each.dimension, each.kind))
    return [
        Quantity(
            f"{each.phase}, {each.dimension} {each.kind}", "MiB", measured[each] / MIB, planned.get(each, 0.0) / MIB
        )
        for each in ordered
    ]


def _message(phase: str, what: Collective) -> Message | None:
    """The planned kind of a collective; None for small values on which ranks agree, and for groups of one rank."""
    kind, group = _KINDS.get(what.name, what.name), what.group.lower()
    if kind in ("send", "receive"):  # between two stages the default group carries one direction
        return Message(phase, "pipeline", kind)
    dimension = _DIMENSIONS.get(group)
    if dimension is None or what.ranks == 1 or (dimension == "expert" and kind == "all-reduce"):
        return None
    return Message(phase, dimension, kind)
