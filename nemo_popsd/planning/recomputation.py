"""Parts of the forward pass that the backward pass recomputes (`student.recompute`)."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_popsd.planning.parameters import linears
from nemo_popsd.planning.workload import Case

_MLP = ("mlp", "moe")


@dataclass(frozen=True)
class Recomputed:
    """Fractions of the forward pass of a stage's layers that the backward pass recomputes."""

    linear: float
    """Fraction of the linears."""
    attention: float
    """Fraction of attention, and of context-parallel collectives."""
    tensor_collectives: float
    """Fraction of tensor-parallel collectives."""
    expert_collectives: float
    """Fraction of expert-parallel collectives."""


def recomputed_layers(case: Case, layers: int) -> int:
    """Number of layers that are recomputed entirely in a stage with this number of layers."""
    student = case.config.student
    if student.recompute != "full":
        return 0
    if student.recompute_method == "uniform":
        return layers
    return min(layers, student.recompute_layers * case.layout.virtual_pipeline)


def recomputes_mlp(case: Case) -> bool:
    """Whether the MLP (in a mixture, the experts) is recomputed separately."""
    student = case.config.student
    return student.recompute == "selective" and _MLP[case.sizes.experts > 0] in student.recompute_modules


def recomputes(case: Case, module: str) -> bool:
    """Whether `module`, a name in `student.recompute_modules`, is recomputed separately."""
    student = case.config.student
    return student.recompute == "selective" and module in student.recompute_modules


def recomputed(case: Case, layers: int) -> Recomputed:
    """The recomputed fractions in a stage with this number of layers."""
    if case.config.student.recompute == "full":
        share = recomputed_layers(case, layers) / layers
        return Recomputed(share, share, share, share)
    mlp = recomputes_mlp(case)
    return Recomputed(
        linear=_mlp_share(case) if mlp else 0.0,
        attention=float(recomputes(case, "core_attn")),
        tensor_collectives=0.5 if mlp else 0.0,  # one of the two sums of a layer
        expert_collectives=float(mlp),
    )


def _mlp_share(case: Case) -> float:
    """Fraction of the products of one layer that belongs to the MLP, adapters included."""
    sizes, lora, layout = case.sizes, case.config.student.lora, case.layout
    totals = {True: sizes.hidden * sizes.experts / (layout.tensor if layout.sequence else 1), False: 0.0}
    for linear in linears(sizes):
        visits = sizes.experts_per_token if linear.expert else 1
        adapter = linear.adapter(lora.rank) if case.lora and linear.name in lora.targets else 0
        totals[linear.name in ("linear_fc1", "linear_fc2")] += (linear.weights + adapter) * visits / layout.tensor
    return totals[True] / sum(totals.values())
