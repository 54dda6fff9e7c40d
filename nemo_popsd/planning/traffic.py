"""Bytes that one GPU sends in one step, by parallel dimension. Formulas: docs/planning.md, "Bytes moved".

Ring algorithms are assumed: for a tensor of M bytes over k ranks, each rank sends 2·M·(k−1)/k in an all-reduce,
M·(k−1)/k in an all-gather or reduce-scatter, and M in a point-to-point transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_popsd.planning.memory import trained
from nemo_popsd.planning.parameters import count, stages
from nemo_popsd.planning.recomputation import recomputed
from nemo_popsd.planning.workload import Case


def _ring(size: int) -> float:
    return (size - 1) / size


def tensor_forward(case: Case, tokens: float, *, adapters: bool) -> float:
    """Bytes of the tensor-parallel collectives of one forward: [tokens, H] summed twice per layer, once by the
    embedding.

    Sequence parallelism sends the same bytes as an all-gather and a reduce-scatter. In each layer every adapter adds a
    gather or sum of [tokens, rank], and adapters on split inputs add a gather of [tokens, H].
    """
    layout, sizes = case.layout, case.sizes
    layers = max(layout.stage_layers(sizes.layers))
    width = 2 * sizes.hidden * (2 * layers + 1 / layout.pipeline)
    if adapters:
        for name in case.config.student.lora.targets:
            splits_inputs = name in ("linear_proj", "linear_fc2")
            rank = case.config.student.lora.rank
            width += layers * ((2 * rank + sizes.hidden) if splits_inputs else rank)
    return _ring(layout.tensor) * width * tokens / layout.context * case.element


def tensor_backward(case: Case, tokens: float) -> float:
    """Bytes of the tensor-parallel collectives of one backward: [tokens, H] summed twice per layer.

    Each adapter on full inputs adds one sum. Under full fine-tuning, sequence parallelism gathers two inputs per layer
    once more.
    """
    layout, sizes, student = case.layout, case.sizes, case.config.student
    layers = max(layout.stage_layers(sizes.layers))
    width = 4.0 * sizes.hidden * layers
    if case.lora:
        full_inputs = [name for name in student.lora.targets if name in ("linear_qkv", "linear_fc1")]
        width += 2 * layers * (sizes.hidden * len(full_inputs) + student.lora.rank * len(student.lora.targets))
        if student.recompute != "full" and layout.pipeline == 1:
            width -= 2 * sizes.hidden  # nothing before the first linear is trained
    elif layout.sequence:
        width += 2 * sizes.hidden * layers
    return _ring(layout.tensor) * width * tokens / layout.context * case.element


def context_forward(case: Case, tokens: float) -> float:
    """Bytes of context-parallel communication in one forward: keys and values that are gathered or passed around a
    ring; queries, keys, values and outputs between ranks that divide the heads.
    """
    layout, sizes = case.layout, case.sizes
    layers, heads = max(layout.stage_layers(sizes.layers)), layout.context_heads
    gathered = _ring(layout.context // heads) * 2 * sizes.key_width / heads
    exchanged = _ring(heads) * 2 * (sizes.query_width + sizes.key_width) / layout.context
    return (gathered + exchanged) * tokens / layout.tensor * layers * case.element


def stage_transfer(case: Case, tokens: float) -> float:
    """Bytes of hidden states that a stage sends to the next one in one forward."""
    layout = case.layout
    if layout.pipeline == 1:
        return 0.0
    spread = layout.tensor if layout.sequence else 1
    return tokens / layout.context * case.sizes.hidden / spread * layout.virtual_pipeline * case.element


def expert_forward(case: Case, tokens: float) -> float:
    """Bytes of tokens sent to their experts and back in one forward, and of those gathered and summed over the ranks
    that share an expert.
    """
    layout, sizes = case.layout, case.sizes
    if layout.expert == 1:
        return 0.0
    spread = layout.tensor if layout.sequence else 1
    each = tokens / layout.context / spread * sizes.experts_per_token * sizes.hidden
    moved = _ring(layout.expert) + layout.expert_shards - 1
    return moved * 2 * each * max(layout.stage_layers(sizes.layers)) * case.element


def sampling_calls(case: Case) -> int:
    """Collectives of sampling one token per row from sharded logits."""
    rollout = case.config.rollout
    if rollout.temperature == 0 or 0 < rollout.top_k < case.sizes.vocab:
        return 1
    return 7 if rollout.top_p < 1 else 2


def sampling(case: Case) -> float:
    """Bytes sent to sample one token: the top k of each shard; or a few sums, plus histograms with top-p alone."""
    rollout, ranks = case.config.rollout, case.layout.tensor
    calls = sampling_calls(case)
    if calls == 1:
        return 8.0 * (ranks - 1) * ((rollout.top_k if rollout.temperature else 1) + 1)
    numbers = 3 if calls == 2 else 2 + 4 * 256 + 2
    return 8.0 * numbers * (ranks - 1) + 2 * 16 * _ring(ranks)


def reduction(case: Case) -> dict[str, float]:
    """Bytes of one update: gradients reduced over data-parallel ranks and, with the distributed optimizer, gathered
    weights.
    """
    layout, student = case.layout, case.config.student
    gradients = weights = 0.0
    for stage in stages(case.sizes, layout):
        parameters = count(case.sizes, layout, stage, student.lora if case.lora else None)
        dense, experts = trained(case, parameters)
        moved = dense * _ring(layout.dense_replicas) + experts * _ring(layout.expert_replicas)
        gradients, weights = max(gradients, case.gradient_element * moved), max(weights, case.element * moved)
    if case.shards_state:
        return {"gradients": gradients, "weight gather": weights}
    return {"gradients": 2 * gradients}


@dataclass(frozen=True)
class Phase:
    """Bytes that one GPU sends in one phase, by dimension."""

    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    expert: float = 0.0
    data: float = 0.0


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one GPU sends in one step, at the mean lengths."""

    rollout: Phase
    """Prefill and decoding."""
    frozen: Phase
    """All frozen branches."""
    training: Phase
    """Student, loss, gradients."""
    weight_gather: float
    """Part of `training.data` that gathers updated weights."""
    from_host: float
    """Bytes of the frozen copy that are transferred from the host."""


def step(case: Case, *, from_host: float) -> StepTraffic:
    """Bytes of one step; `from_host`: bytes of the frozen copy that are kept on the host."""
    rows, mean, layout = case.rows, case.means, case.layout
    sizes = case.sizes
    # Decoding splits no sequence, so this undoes the divisions by c below.
    prefilled = case.prefilled_rows * (mean.prompt - 1)
    generated = (prefilled + case.generated_rows * mean.response) * layout.context
    sampled = case.generated_rows * mean.response * sampling(case)
    rollout = Phase(
        tensor=tensor_forward(case, generated, adapters=case.lora) + sampled,
        pipeline=stage_transfer(case, generated) / layout.virtual_pipeline,
        expert=expert_forward(case, generated),
    )
    tokens = case.questions * case.frozen_work(mean).tokens
    frozen = Phase(
        tensor=tensor_forward(case, tokens, adapters=False),
        context=context_forward(case, tokens),
        pipeline=stage_transfer(case, tokens),
        expert=expert_forward(case, tokens),
    )
    student = rows * mean.student
    again = recomputed(case, max(layout.stage_layers(sizes.layers)))
    loss = 2 * case.owned_rows * mean.response * sizes.hidden * case.element * _ring(layout.tensor)
    reduced = {name: case.updates * sent for name, sent in reduction(case).items()}
    trained_phase = Phase(
        tensor=(1 + again.tensor_collectives) * tensor_forward(case, student, adapters=case.lora)
        + tensor_backward(case, student)
        + loss,
        context=(2 + again.attention) * context_forward(case, student),
        pipeline=2 * stage_transfer(case, student),
        expert=(2 + again.expert_collectives) * expert_forward(case, student),
        data=sum(reduced.values()),
    )
    return StepTraffic(rollout, frozen, trained_phase, reduced.get("weight gather", 0.0), from_host)
