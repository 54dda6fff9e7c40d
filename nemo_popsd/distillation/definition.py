"""The loss by its definition: literal, readable, from logits, under autograd. `hidden.py` computes the same, leaner."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation.divergence import Divergence, divergence_of_log_probs
from nemo_popsd.distillation.target import Target
from nemo_popsd.parallel.collectives import reduce_max_, reduce_sum_, sum_for_shards
from nemo_popsd.parallel.vocabulary import row_max, true_width


def loss_from_logits(
    student: Tensor,
    privileged: Tensor | None,
    reference: Tensor | None,
    base: Tensor | None,
    *,
    target: Target,
    divergence: Divergence,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Divergence of the student from the target (eq. 13-18 for `PurifiedTarget`), per token.

    Under tensor parallelism every tensor is this rank's [N, V_pad/tp] columns of the logits: rank r holds
    [r·V_pad/tp, (r+1)·V_pad/tp). Columns from `vocab_size` on have probability 0 in every distribution, do not enter
    the mean of eq. 14, and get gradient 0; they may hold anything.

    Collectives on [N] floats: 2 for each log-softmax and 1 for the centring of the target, 1 for the sum of the
    divergence; backward 1. Memory: about ten tensors of the shard's size. Use `loss_from_hidden` in training.

    Args:
        student: live logits; the only differentiable input.
        privileged: the teacher's logits; may be None where its coefficient is 0, as may the two below.
        reference: the second context's logits.
        base: the frozen base's logits.
        target: a member of the family.
        divergence: which divergence.
        vocab_size: size of the true vocabulary.
        tp_group: the group over which the vocabulary is sharded; None for one shard.

    Returns:
        [N] in fp32, float64 where `student` is float64; replicated over the group. The gradient of `student` is this
        rank's shard of the dense gradient, provided every rank uses the result alike.

    Raises:
        UserError: the shards together are smaller than the vocabulary.
        ValueError: logits that the target needs are missing, or shapes differ.
    """
    valid = true_width(student.shape[-1], vocab_size, tp_group)
    with torch.autocast(student.device.type, enabled=False):
        log_p = log_softmax(_computed_in(student)(student[:, :valid]) / target.temperature, tp_group)
        log_q = target_from_logits(
            student, privileged, reference, base, target=target, vocab_size=vocab_size, tp_group=tp_group
        )
        return divergence_of_log_probs(log_p, log_q, divergence, tp_group)  # (18)


@torch.no_grad()
def target_from_logits(
    student: Tensor,
    privileged: Tensor | None,
    reference: Tensor | None,
    base: Tensor | None,
    *,
    target: Target,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The target distribution (eq. 13-17 for `PurifiedTarget`) by its definition, from logits, as log-probabilities.

    Arguments, errors, padding and dtypes are those of `loss_from_logits`; collectives are those of the target there.

    Returns:
        [N, v] with the v true columns of this rank's shard.
    """
    valid = true_width(student.shape[-1], vocab_size, tp_group)
    computed = _computed_in(student)

    def log_probs(name: str, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise ValueError(f"the target {target} needs the logits of {name}; got None")
        if logits.shape != student.shape:
            raise ValueError(f"the logits of {name} have shape {tuple(logits.shape)}; need {tuple(student.shape)}")
        return log_softmax(computed(logits[:, :valid]) / target.temperature, tp_group)

    with torch.autocast(student.device.type, enabled=False):
        log_q = torch.zeros_like(computed(student[:, :valid]))
        if target.student != 0:
            log_q += target.student * log_probs("student", student)
        if target.base != 0:
            log_q += target.base * log_probs("base", base)
        if target.cap is None:
            if target.privileged != 0:
                log_q += target.privileged * log_probs("privileged", privileged)
            if target.reference != 0:
                log_q += target.reference * log_probs("reference", reference)
        elif target.privileged != 0:
            delta = log_probs("privileged", privileged) - log_probs("reference", reference)  # (13)
            delta -= reduce_sum_(delta.sum(-1, keepdim=True), tp_group) / vocab_size  # (14)
            delta = target.cap * torch.tanh(delta / target.cap)  # (15)
            log_q += target.privileged * delta  # (16)
        return log_softmax(log_q, tp_group)  # (17)


def _computed_in(student: Tensor) -> Callable[[Tensor], Tensor]:
    """To float64 where the student is float64, else to fp32."""
    return torch.Tensor.double if student.dtype == torch.float64 else torch.Tensor.float


def log_softmax(logits: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Log-softmax over a sharded vocabulary: [N, v] to [N, v]. Two all-reduces of [N] forward, one backward."""
    peak = reduce_max_(row_max(logits.detach()), tp_group).unsqueeze(-1)
    shifted = logits - peak
    return shifted - sum_for_shards(shifted.exp().sum(-1, keepdim=True), tp_group).log()
