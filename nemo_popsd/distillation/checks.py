"""What `loss_from_hidden` refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_popsd.distillation.decomposition import DiagnosedTokens
from nemo_popsd.distillation.target import FrozenStates, HiddenPair, SeparateStates, Target, uses_anchor, uses_shift

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    student_hidden: Tensor,
    student_weight: Tensor,
    frozen: FrozenStates,
    teacher_weight: Tensor,
    target: Target,
    token_weights: Tensor | None,
    diagnosed: DiagnosedTokens | None,
    soft_cap: float | None,
) -> None:
    """Checks the arguments of `loss_from_hidden` against each other.

    Raises:
        ValueError: shapes, dtypes or vectors do not fit each other or the target.
    """
    tokens, width = student_hidden.shape
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "student_weight": (student_weight, (student_weight.shape[0], width)),
        "teacher_weight": (teacher_weight, (student_weight.shape[0], width)),
        "token_weights": (token_weights, (tokens,)),
    }
    for name, state in frozen._asdict().items():
        shapes[f"{name}_hidden"] = (state, (tokens, width))
    if diagnosed is not None:
        count = diagnosed.index.shape[0]
        shapes["diagnosed.privileged"] = (diagnosed.privileged, (count, width))
        shapes["diagnosed.reference"] = (diagnosed.reference, (count, width))
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; need {shape}")
    for name, tensor in {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_weight": teacher_weight,
    }.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; need bfloat16, float32 or float64")
    kind = HiddenPair if soft_cap is None else SeparateStates
    if not isinstance(frozen, kind):
        raise ValueError(f"frozen is {type(frozen).__name__}; with soft_cap={soft_cap} need {kind.__name__}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; need a number above 0")
    for name, tensor, used in _used(frozen, target):
        if (tensor is not None) != used:
            raise ValueError(f"{name}_hidden must {'' if used else 'not '}be given for {target}; see frozen_states")
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights requires grad; the loss is not differentiable in it: detach it")


def _used(frozen: FrozenStates, target: Target) -> list[tuple[str, Tensor | None, bool]]:
    if isinstance(frozen, HiddenPair):
        return [("anchor", frozen.anchor, uses_anchor(target)), ("shift", frozen.shift, uses_shift(target))]
    return [
        ("base", frozen.base, target.base != 0),
        ("privileged", frozen.privileged, target.privileged != 0),
        ("reference", frozen.reference, target.reference != 0),
    ]
