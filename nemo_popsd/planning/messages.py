"""Bytes of the collectives of one rank in one step at the maximum lengths, by phase, dimension and kind.

A reduction counts the bytes of the reduced tensor, a gather or scatter those of the full tensor, an exchange or a
transfer those that the rank sends. Small values on which ranks agree (lengths, norms, errors) and rollouts are not
counted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from nemo_popsd.planning.memory import trained
from nemo_popsd.planning.packing import Packed
from nemo_popsd.planning.parameters import Stage, count, padded_vocabulary
from nemo_popsd.planning.recomputation import Recomputed, recomputed
from nemo_popsd.planning.workload import Case

_SHARD_NUMBERS, _TOKEN_NUMBERS, _SIGNAL_NUMBERS = 8, 1, 14
"""fp32 values that a vocabulary shard contributes to the loss: per token, for its log-probability, and per diagnosed
token."""
_COUNT, _SHAPE = 8, 24
"""Bytes of a token count, and of the three integers that precede a tensor sent between stages."""


@dataclass(frozen=True)
class Message:
    """The kind of communication for which bytes are counted."""

    phase: str
    """frozen or training."""
    dimension: str
    """The process group: tensor, context, pipeline, expert, data, expert data or embedding."""
    kind: str
    """all-reduce, all-gather, reduce-scatter, all-to-all, send or receive."""


Bytes = defaultdict[Message, float]


@dataclass(frozen=True)
class _Position:
    """The position of a rank in its replica."""

    stage: Stage
    context: int

    @property
    def layers(self) -> int:
        return self.stage.layers


def messages(case: Case, stage: Stage, *, context_rank: int = 0) -> dict[Message, float]:
    """The bytes of one step of one rank.

    Args:
        case: the run, with packed sequences, each computed separately.
        stage: pipeline stage of the rank.
        context_rank: context-parallel rank.
    """
    at, found = _Position(stage, context_rank), Bytes(float)
    for batch in case.frozen_batches(case.limits):
        _forward(found, case, at, "frozen", batch, passes=1.0, adapters=False)
        _transfers(found, case, at, "frozen", batch, backward=False)
        _routing(found, case, at, "frozen", batch, backward=False)
    again = recomputed(case, stage.layers)
    done = 0
    for _ in range(case.updates):
        for batch in case.student_batches(case.limits):
            _forward(found, case, at, "training", batch, passes=1.0, adapters=case.lora)
            _recomputation(found, case, at, batch, again)
            _backward(found, case, at, batch)
            _transfers(found, case, at, "training", batch, backward=True)
            _routing(found, case, at, "training", batch, backward=True)
            if stage.last and batch.responses:
                _loss(found, case, at, batch, first=done)
            done += len(batch.responses)
        _update(found, case, stage)
    if stage.last and case.target.uses_shift and case.layout.tensor > 1:
        found[Message("training", "tensor", "all-reduce")] += 4 * case.sizes.hidden  # the mean output vector, once
    return {message: size for message, size in found.items() if size}


def _states(case: Case, batch: Packed) -> float:
    """Bytes of the hidden states of one context-parallel rank, [S/c, H]."""
    return batch.tokens / case.layout.context * case.sizes.hidden * case.element


def _forward(
    found: Bytes, case: Case, at: _Position, phase: str, batch: Packed, *, passes: float, adapters: bool
) -> None:
    _tensor_layers(found, case, phase, batch, at.layers * passes, adapters=adapters)
    if case.layout.tensor > 1 and at.stage.first:
        kind = "reduce-scatter" if case.layout.sequence else "all-reduce"
        found[Message(phase, "tensor", kind)] += _states(case, batch)
    _keys_and_values(found, case, phase, batch, at.layers * passes, "all-gather")
    _experts(found, case, phase, batch, at.layers * passes)
    _counts(found, case, phase, at.layers * passes)


def _recomputation(found: Bytes, case: Case, at: _Position, batch: Packed, again: Recomputed) -> None:
    layers, full = at.layers, case.config.student.recompute == "full"
    _tensor_layers(found, case, "training", batch, layers * again.tensor_collectives, adapters=case.lora and full)
    _keys_and_values(found, case, "training", batch, layers * again.attention, "all-gather")
    _experts(found, case, "training", batch, layers * again.expert_collectives)
    _counts(found, case, "training", layers * again.expert_collectives)


def _splits_mlp(case: Case) -> bool:
    """Whether tensor-parallel ranks share the MLP of one token."""
    return not (case.sizes.experts and case.layout.expert_shards == 1)


def _tensor_layers(found: Bytes, case: Case, phase: str, batch: Packed, layers: float, *, adapters: bool) -> None:
    """Tensor-parallel bytes of the forward pass of some layers.

    States are summed after attention and after the MLP, or gathered before and scattered after them. Adapters gather or
    sum [S, ρ]; those on split inputs gather [S, H]; with sequence parallelism those on full inputs gather the inputs
    again.
    """
    layout = case.layout
    if layout.tensor == 1:
        return
    states, blocks = _states(case, batch), 2 if _splits_mlp(case) and not case.sizes.experts else 1
    summed = Message(phase, "tensor", "all-reduce")
    gathered = Message(phase, "tensor", "all-gather")
    if layout.sequence:
        found[gathered] += layers * blocks * states
        found[Message(phase, "tensor", "reduce-scatter")] += layers * blocks * states
    else:
        found[summed] += layers * blocks * states
    if adapters:
        inner, full_inputs, split_inputs = _adapters(case, batch)
        found[gathered] += layers * (full_inputs * inner + split_inputs * states)
        found[summed] += layers * split_inputs * inner
        if layout.sequence:
            found[gathered] += layers * full_inputs * states


def _adapters(case: Case, batch: Packed) -> tuple[float, int, int]:
    """Bytes of [S/c, ρ], and the numbers of adapters on full and on split inputs."""
    lora = case.config.student.lora
    names = [name for name in lora.targets if not (case.sizes.experts and name in ("linear_fc1", "linear_fc2"))]
    split = sum(name in ("linear_proj", "linear_fc2") for name in names)
    return batch.tokens / case.layout.context * lora.rank * case.element, len(names) - split, split


def _backward(found: Bytes, case: Case, at: _Position, batch: Packed) -> None:
    layout, layers = case.layout, at.layers
    _keys_and_values(found, case, "training", batch, layers, "reduce-scatter")
    _experts(found, case, "training", batch, layers, backward=True)
    if layout.tensor == 1:
        return
    states, blocks = _states(case, batch), 2 if not case.sizes.experts else 1
    # Nothing before the first linear is trained.
    frozen_input = case.lora and at.stage.first and case.config.student.recompute != "full"
    gathered = Message("training", "tensor", "all-gather")
    inputs = Message("training", "tensor", "reduce-scatter" if layout.sequence else "all-reduce")
    found[inputs] += (layers * blocks - frozen_input) * states
    if layout.sequence:
        found[gathered] += layers * blocks * states
    if case.lora:
        inner, full_inputs, split_inputs = _adapters(case, batch)
        found[Message("training", "tensor", "all-reduce")] += layers * (full_inputs + split_inputs) * inner
        # Without sequence parallelism the adapter sums the gradient of its input even if it is unused.
        skipped = layout.sequence and frozen_input and "linear_qkv" in case.config.student.lora.targets
        found[inputs] += (layers * full_inputs - skipped) * states
        if layout.sequence:
            found[gathered] += layers * split_inputs * states
    elif layout.sequence:
        # The inputs of trained linears once more, and the gradient of the embedding.
        found[gathered] += (layers * blocks + at.stage.first) * states


def _keys_and_values(found: Bytes, case: Case, phase: str, batch: Packed, layers: float, kind: str) -> None:
    if case.layout.context > 1:
        width = 2 * case.sizes.key_width / case.layout.tensor
        found[Message(phase, "context", kind)] += layers * batch.tokens * width * case.element


def _experts(found: Bytes, case: Case, phase: str, batch: Packed, layers: float, *, backward: bool = False) -> None:
    """Bytes of states sent to their experts and back, and of the routing weights, which the ranks that share an expert
    gather.
    """
    layout, sizes = case.layout, case.sizes
    if not sizes.experts or layout.expert_shards * layout.expert == 1:
        return
    visits = batch.tokens / layout.context / (layout.tensor if layout.sequence else 1) * sizes.experts_per_token
    if layout.expert > 1:
        sent = visits * (2 * sizes.hidden + 1) * case.element
        found[Message(phase, "expert", "all-to-all")] += layers * sent
    if layout.expert_shards > 1:
        whole = visits * layout.expert_shards * case.element
        found[Message(phase, "expert tensor", "all-gather")] += layers * whole * (sizes.hidden + (not backward))
        found[Message(phase, "expert tensor", "reduce-scatter")] += layers * whole * (sizes.hidden + backward)


def _counts(found: Bytes, case: Case, phase: str, layers: float) -> None:
    """Bytes of the gather that tells each rank how many tokens visit each expert."""
    ranks = case.layout.expert * case.layout.expert_shards
    if case.sizes.experts and ranks > 1:
        found[Message(phase, "expert", "all-gather")] += layers * ranks * case.sizes.experts * _COUNT


def _transfers(found: Bytes, case: Case, at: _Position, phase: str, batch: Packed, *, backward: bool) -> None:
    layout, stage = case.layout, at.stage
    if layout.pipeline == 1:
        return
    chunks = layout.virtual_pipeline
    each = _states(case, batch) / (layout.tensor if layout.sequence else 1) + (_SHAPE if chunks == 1 else 0)
    to_next, from_previous = chunks - stage.last, chunks - stage.first
    found[Message(phase, "pipeline", "send")] += each * (to_next + backward * from_previous)
    found[Message(phase, "pipeline", "receive")] += each * (from_previous + backward * to_next)


def _routing(found: Bytes, case: Case, at: _Position, phase: str, batch: Packed, *, backward: bool) -> None:
    """Bytes of the states of response tokens: gathered over slices of the sequence, then exchanged between owners."""
    layout, width = case.layout, case.sizes.hidden * case.element
    if not at.stage.last:
        return
    if layout.sequence:
        found[Message(phase, "tensor", "all-gather")] += batch.gathered_rows(layout, at.context) * width
    if layout.context > 1:
        moved = max(batch.held_rows(layout, at.context), batch.owned_rows(layout, at.context)) * width
        found[Message(phase, "context", "all-to-all")] += moved * (1 + backward)


def _loss(found: Bytes, case: Case, at: _Position, batch: Packed, *, first: int) -> None:
    ranks = case.layout.tensor
    if ranks == 1:
        return
    owned = batch.owned_rows(case.layout, at.context)
    wanted = case.config.distillation.diagnosed_tokens
    diagnosed = batch.diagnosed_rows(case.layout, at.context, wanted, case.rows, first)
    numbers = (_SHARD_NUMBERS + _TOKEN_NUMBERS) * owned + _SIGNAL_NUMBERS * diagnosed
    found[Message("training", "tensor", "all-gather")] += 4 * ranks * numbers
    summed = owned * case.sizes.hidden * case.element
    if case.config.distillation.divergence.kind == "jsd" or case.config.distillation.divergence.clip is not None:
        summed += 2 * 4 * owned
    found[Message("training", "tensor", "all-reduce")] += summed


def _update(found: Bytes, case: Case, stage: Stage) -> None:
    """Bytes of reduced gradients and gathered weights, and of gradients of weights replicated over tensor-parallel
    ranks.
    """
    layout, sizes = case.layout, case.sizes
    parameters = count(sizes, layout, stage, case.config.student.lora if case.lora else None)
    groups = ("data", layout.dense_replicas), ("expert data", layout.expert_replicas)
    dense, experts = trained(case, parameters)
    # Experts that all ranks of a replica share are reduced with the other weights.
    elements_of = (dense + experts, 0) if layout.expert == 1 else (dense, experts)
    # Dense weights and experts have one optimizer each, and each optimizer gathers all weights after its update.
    gathers = sum(elements > 0 for elements in elements_of) if not case.config.optimizer.overlap_param_gather else 1
    for (dimension, ranks), elements in zip(groups, elements_of, strict=True):
        if ranks == 1 or not elements:
            continue
        if case.shards_state:
            found[Message("training", dimension, "reduce-scatter")] += elements * case.gradient_element
            found[Message("training", dimension, "all-gather")] += gathers * elements * case.element
        else:
            found[Message("training", dimension, "all-reduce")] += elements * case.gradient_element
    if case.lora:
        return
    if layout.tensor > 1:
        alike = stage.layers * 2 * sizes.head_dim if sizes.qk_norm and not sizes.joint_qk_norm else 0
        if layout.sequence:
            alike += stage.layers * (2 * sizes.hidden + sizes.hidden * sizes.experts) + stage.last * sizes.hidden
        found[Message("training", "tensor", "all-reduce")] += alike * case.gradient_element
    if sizes.tied and layout.pipeline > 1 and (stage.first or stage.last):
        matrix = padded_vocabulary(sizes, layout) // layout.tensor * sizes.hidden
        found[Message("training", "embedding", "all-reduce")] += matrix * case.gradient_element
