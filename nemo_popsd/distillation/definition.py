"""Target and loss as the equations define them, from logits, with autograd. The diagnosis uses the target and the sums.

`hidden.py` computes the same loss from hidden states, with closed-form gradients and a fraction of the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.distillation.divergence import Divergence, divergence_of_log_probs
from nemo_popsd.distillation.target_families import Target
from nemo_popsd.parallel.collectives import reduce_max_, reduce_sum_, sum_for_shards
from nemo_popsd.parallel.vocabulary import VocabShard, token_max


@dataclass(frozen=True)
class Branches:
    """One tensor per branch on the same tokens: logits or log-probabilities [N, V_pad/tp] or [N, v]."""

    student: Tensor
    """The live student."""
    base: Tensor | None = None
    """The frozen base. This and the following fields may be None if their coefficient is 0."""
    privileged: Tensor | None = None
    """The privileged teacher."""
    reference: Tensor | None = None
    """The teacher with the second context."""

    def get(self, name: str) -> Tensor | None:
        """The tensor of the branch called `name`."""
        tensor: Tensor | None = getattr(self, name)
        return tensor


def loss_from_logits(logits: Branches, *, target: Target, divergence: Divergence, shard: VocabShard) -> Tensor:
    """Divergence of the student from the target (eq. 13-18 for `Target.purified`), per token.

    With tensor parallelism every tensor holds this rank's [N, V_pad/tp] columns of the logits. Padding columns have
    probability 0 in every distribution, are excluded from the mean of eq. 14, and receive gradient 0; their values are
    not read.

    Collectives on [N] floats: forward 2 per log-softmax, 1 to centre the target, 1 to sum the divergence; backward 1.
    Memory: about ten tensors of the shard's size. Use `loss_from_hidden` in training.

    Args:
        logits: logits of the branches; only the student's are differentiable.
        target: the target distribution.
        divergence: which divergence.
        shard: which columns of the vocabulary this rank holds.

    Returns:
        [N] in fp32 (float64 if the student's logits are float64), replicated over the group. The gradient of the
        student's logits is this rank's shard of the dense gradient, provided every rank uses the result identically.

    Raises:
        ValueError: logits that the target needs are missing, or shapes differ.
    """
    with torch.autocast(logits.student.device.type, enabled=False):
        log_p = _log_probs("student", logits, target, shard)
        log_q = target_from_logits(logits, target=target, shard=shard)
        return divergence_of_log_probs(log_p, log_q, divergence, shard.group)  # (18)


@torch.no_grad()
def target_from_logits(logits: Branches, *, target: Target, shard: VocabShard) -> Tensor:
    """The target distribution from logits, as log-probabilities [N, v] of the v true columns of this rank's shard.

    Arguments, errors, padding, dtypes and collectives are those of `loss_from_logits`, without those of the divergence.
    """
    with torch.autocast(logits.student.device.type, enabled=False):
        needed = (("student",) if target.student != 0 else ()) + target.frozen_branches()
        computed = {name: _log_probs(name, logits, target, shard) for name in needed}
        student = computed.pop("student", _true_columns(logits.student, logits.student, shard))
        return target_from_log_probs(Branches(student, **computed), target=target, shard=shard)


def target_from_log_probs(log_probs: Branches, *, target: Target, shard: VocabShard) -> Tensor:
    """The target distribution from the branches' log-probabilities on this shard, [N, v] each (eq. 13-17).

    All-reduces of [N]: 2 for the normalisation, 1 for the centring if the target has a cap.
    """
    log_q = torch.zeros_like(log_probs.student)
    if target.student != 0:
        log_q += target.student * log_probs.student
    if target.base != 0:
        assert log_probs.base is not None
        log_q += target.base * log_probs.base
    if target.uses_shift:
        assert target.cap is not None
        assert log_probs.privileged is not None
        assert log_probs.reference is not None
        delta = log_probs.privileged - log_probs.reference  # (13)
        delta -= reduce_sum_(delta.sum(-1, keepdim=True), shard.group) / shard.vocab_size  # (14)
        delta = target.cap * torch.tanh(delta / target.cap)  # (15)
        log_q += target.privileged * delta  # (16)
    else:
        if target.privileged != 0:
            assert log_probs.privileged is not None
            log_q += target.privileged * log_probs.privileged
        if target.reference != 0:
            assert log_probs.reference is not None
            log_q += target.reference * log_probs.reference
    return log_softmax(log_q, shard.group)  # (17)


def log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log-softmax over a sharded vocabulary: [..., v] to [..., v]. Two all-reduces of [...] forward, one backward."""
    peak = reduce_max_(token_max(logits.detach()), group).unsqueeze(-1)
    shifted = logits - peak
    return shifted - sum_for_shards(shifted.exp().sum(-1, keepdim=True), group).log()


def _log_probs(name: str, logits: Branches, target: Target, shard: VocabShard) -> Tensor:
    """Log-probabilities [N, v] of one branch at the target's temperature."""
    branch = logits.get(name)
    if branch is None:
        raise ValueError(f"the target {target} needs the logits of {name}; got None")
    shape = (len(logits.student), shard.width)
    if tuple(branch.shape) != shape:
        raise ValueError(f"the logits of {name} have shape {tuple(branch.shape)}; need {shape}")
    return log_softmax(_true_columns(branch, logits.student, shard) / target.temperature, shard.group)


def _true_columns(logits: Tensor, student: Tensor, shard: VocabShard) -> Tensor:
    """Columns of true entries, in float64 if the student's logits are float64, otherwise in fp32."""
    convert: Callable[[Tensor], Tensor] = torch.Tensor.double if student.dtype == torch.float64 else torch.Tensor.float
    return convert(logits[:, : shard.true_width])


def signal_sums(student: Tensor, privileged: Tensor, reference: Tensor) -> Tensor:
    """This shard's part of ‖Δ_total‖², ‖Δ_ref‖², ‖Δ_it‖², ⟨Δ_total, Δ_it⟩ and ⟨Δ_total, Δ_ref⟩ (eq. 4): [5, N].

    Args:
        student: log π_θ [N, v].
        privileged: log π_T [N, v].
        reference: log π_ref [N, v].
    """
    total, induced, question = privileged - student, reference - student, privileged - reference
    pairs = ((total, total), (induced, induced), (question, question), (total, question), (total, induced))
    return torch.stack([(a * b).sum(-1) for a, b in pairs])
