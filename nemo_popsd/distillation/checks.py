"""Checks of the arguments of `loss_from_hidden`."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_popsd.distillation.decomposition import DiagnosedTokens
from nemo_popsd.distillation.main_gradient import MainGradient
from nemo_popsd.distillation.products import statistics_dtype
from nemo_popsd.distillation.target import HiddenPair
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.parallel.vocabulary import VocabShard

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    student_hidden: Tensor,
    student_weight: Tensor,
    vectors: HiddenPair,
    teacher_weight: Tensor,
    target: Target,
    shard: VocabShard,
    token_weights: Tensor | None,
    diagnosed: DiagnosedTokens | None,
    main_gradient: MainGradient | None,
    response_ids: Tensor | None,
) -> None:
    """Checks the arguments of `loss_from_hidden` against each other.

    Raises:
        ValueError: shapes, dtypes or vectors do not fit each other or the target, or `token_weights` requires grad.
    """
    tokens, width = student_hidden.shape
    matrix = (shard.width, width)
    _check_shape("student_weight", student_weight, matrix)
    _check_shape("teacher_weight", teacher_weight, matrix)
    _check_shape("token_weights", token_weights, (tokens,))
    _check_shape("response_ids", response_ids, (tokens,))
    _check_shape("vectors.anchor", vectors.anchor, (tokens, width))
    _check_shape("vectors.shift", vectors.shift, (tokens, width))
    if diagnosed is not None:
        count = diagnosed.index.shape[0]
        _check_shape("diagnosed.privileged", diagnosed.privileged, (count, width))
        _check_shape("diagnosed.reference", diagnosed.reference, (count, width))
    _check_dtype("student_hidden", student_hidden)
    _check_dtype("student_weight", student_weight)
    _check_dtype("teacher_weight", teacher_weight)
    _check_presence("vectors.anchor", vectors.anchor, target, needed=target.uses_anchor)
    _check_presence("vectors.shift", vectors.shift, target, needed=target.uses_shift)
    if token_weights is not None and token_weights.requires_grad:
        raise ValueError("token_weights requires grad; the loss is not differentiable in it: detach it")
    if main_gradient is not None:
        buffer, dtype = main_gradient.buffer, statistics_dtype(student_weight)
        if buffer.shape != student_weight.shape or buffer.dtype != dtype:
            got = f"{buffer.dtype} of shape {tuple(buffer.shape)}"
            raise ValueError(f"main_gradient is {got}; need {dtype} of shape {tuple(student_weight.shape)}")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; need {shape}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; need bfloat16, float32 or float64")


def _check_presence(name: str, tensor: Tensor | None, target: Target, *, needed: bool) -> None:
    if (tensor is not None) != needed:
        raise ValueError(f"{name} must {'' if needed else 'not '}be given for {target}; see hidden_pair")
