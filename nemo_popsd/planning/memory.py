"""Bytes of one GPU, by use, and the peak of each phase of a step. Formulas: docs/planning.md, "Memory"."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass

from nemo_popsd.distillation.chunks import default_chunk_tokens
from nemo_popsd.megatron.kernel_choice import PACKED_TAKES_GROUPS, cache_positions, takes_groups, takes_packed
from nemo_popsd.planning.fp8 import quantised_bytes
from nemo_popsd.planning.mixture import copies_of_tokens, held_by_dispatchers
from nemo_popsd.planning.parameters import (
    Parameters,
    Stage,
    count,
    linears,
    padded_vocabulary,
    stages,
)
from nemo_popsd.planning.recomputation import recomputed_layers, recomputes, recomputes_mlp
from nemo_popsd.planning.served import server_bytes
from nemo_popsd.planning.workload import Case
from nemo_popsd.rollout.scheduler import PREFILL_TOKENS

PHASES = ("rollout", "frozen", "training")
"""Phases of a step; memory that only one phase needs is free in the others."""

_TILE_BYTES = 2**26
"""Bytes of a tile of the loss on a GPU."""
_UNCOMPILED_TILES = 10
"""Tiles that the uncompiled arithmetic of the loss allocates at the same time (measured by `popsd rehearse`)."""


@dataclass(frozen=True)
class LayerActivations:
    """Elements per token that the backward pass of one layer needs, by how they are sharded."""

    replicated: int
    """Elements of the width of the residual stream, sharded by sequence parallelism only."""
    attention: int
    """Elements of attention, sharded by tensor parallelism."""
    mlp: int
    """Elements of the MLP, sharded by tensor parallelism; experts that are not split have t times fewer tokens
    instead."""

    def per_rank(self, case: Case) -> float:
        """Elements per token on one rank."""
        layout = case.layout
        spread = layout.tensor if layout.sequence else 1
        return self.replicated / spread + (self.attention + self.mlp) / layout.tensor


def kept_by_layer(case: Case) -> LayerActivations:
    """Activations that one layer keeps for its backward pass.

    `plain` layers are the local ones of `nemo_popsd.megatron.spec`; with frozen weights their norms keep less. `fused`
    layers keep inputs and outputs of the norms, the tensors of attention, both halves of the first linear of the MLP,
    and the input of the second.
    """
    sizes, plain = case.sizes, case.plain
    width, visits = sizes.intermediate, max(1, sizes.experts_per_token)
    residual = 6 if plain and not case.lora else 4
    attention = _local_attention(case) if plain else _transformer_engine_attention(case)
    dispatched = 2 * visits * sizes.hidden * case.layout.expert_shards if sizes.experts else 0
    adapters = len(case.config.student.lora.targets) * case.config.student.lora.rank if case.lora else 0
    mlp = (5 if plain else 3) * width * visits
    if recomputes(case, "core_attn"):
        attention -= _within_core_attention(case)
    if sizes.experts and recomputes(case, "layernorm"):  # the only norm that is not a part of a linear
        residual -= 1
    if recomputes(case, "moe_act"):
        mlp -= width * visits
    if recomputes_mlp(case):
        mlp = dispatched = 0
    return LayerActivations(
        replicated=residual * sizes.hidden + dispatched + adapters,
        attention=attention,
        mlp=mlp,
    )


def _within_core_attention(case: Case) -> int:
    """Elements per token that attention keeps in addition to its inputs and its output."""
    elements = _repeated_heads(case)
    if case.plain:
        elements += case.sizes.query_width  # the output in the order of the kernel
    elif case.element == 4:
        elements += 2 * case.sizes.heads * case.limits.student
    return elements


def _local_attention(case: Case) -> int:
    """Elements per token that attention of local layers keeps, depending on its kernel."""
    query, key = case.sizes.query_width, case.sizes.key_width
    elements = 4 * query + 3 * key + _repeated_heads(case)
    if case.sizes.qk_norm and not case.lora:
        elements += query + key
    if case.config.training.packing and not _attends_at_once(case):
        elements += query  # the outputs of sequences that attend one by one are concatenated
    return elements


def _transformer_engine_attention(case: Case) -> int:
    """Elements per token that Transformer Engine's attention keeps: inputs of the norms of queries and keys, rotated
    queries and keys, values, and the output. In fp32 attention is not fused: keys and values are repeated for every
    query head, and each head keeps scores and probabilities of all keys up to the longest sequence.
    """
    sizes = case.sizes
    query, key = sizes.query_width, sizes.key_width
    norms = query + key if sizes.qk_norm else 0
    if case.element == 2:
        return norms + 2 * query + 2 * key
    return norms + 4 * query + 2 * sizes.heads * case.limits.student


def _attends_at_once(case: Case) -> bool:
    """Whether local layers compute all packed sequences together."""
    packed = case.config.training.packing and case.layout.context == 1
    return packed and takes_packed(case.device, half=case.element == 2, width=case.sizes.head_dim)


def _repeated_heads(case: Case) -> int:
    """Additional elements per token if attention repeats keys and values for the query heads that share them."""
    if not case.plain:
        grouped = case.element == 2
    elif _attends_at_once(case):
        grouped = PACKED_TAKES_GROUPS
    else:
        grouped = takes_groups(case.device, half=case.element == 2, masked=case.layout.context > 1)
    return 0 if grouped else 2 * (case.sizes.query_width - case.sizes.key_width)


def working_set(case: Case, longest: int) -> float:
    """Elements per token that exist at the same time during the forward pass of one layer without gradient.

    Args:
        case: the run.
        longest: tokens of the longest sequence.
    """
    sizes, layout, plain = case.sizes, case.layout, case.plain
    visits = max(1, sizes.experts_per_token)
    mlp = (5 if plain else 3) * sizes.intermediate * visits / layout.tensor
    # Unfused attention has scores and probabilities.
    scores = 2 * sizes.heads * longest if not plain and case.element == 4 else 0
    attention = (4 * sizes.query_width + 3 * sizes.key_width + _repeated_heads(case) + scores) / layout.tensor
    spread = layout.tensor if layout.sequence else 1
    if sizes.experts and plain:
        return 4 * sizes.hidden / spread + max(copies_of_tokens(case) / spread, attention)
    dispatched = 2 * visits * sizes.hidden * layout.expert_shards if sizes.experts else 0
    return (4 * sizes.hidden + dispatched) / spread + max(mlp, attention)


def activation_bytes(case: Case, stage: Stage) -> float:
    """Peak bytes of activations between forward and backward, including those of the backward of one layer."""
    return kept_bytes(case, stage) + backward_bytes(case, stage)


def kept_bytes(case: Case, stage: Stage) -> float:
    """Bytes of activations kept from the forward pass of all layers until their backward pass."""
    layout, residual, layer = case.layout, _residual(case), kept_by_layer(case).per_rank(case)
    in_flight = 1.0
    if stage.first and layout.pipeline > 1:
        interleaving = 1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual_pipeline)
        in_flight = min(layout.pipeline, case.microbatches) * (interleaving if layout.virtual_pipeline > 1 else 1)
    whole = recomputed_layers(case, stage.layers)
    if whole == stage.layers and stage.layers:
        unit = case.config.student.recompute_layers if case.config.student.recompute_method == "uniform" else 1
        elements = in_flight * math.ceil(stage.layers / unit) * residual
    else:
        # `block` recomputes the first layers; their backward runs after the activations of the others are freed.
        elements = in_flight * (whole * residual + (stage.layers - whole) * layer + 3 * residual)
    return _microbatch(case) * elements


def backward_bytes(case: Case, stage: Stage) -> float:
    """Additional bytes of the backward pass of one layer, including what it recomputes."""
    sizes, layout, residual = case.sizes, case.layout, _residual(case)
    layer = kept_by_layer(case).per_rank(case)
    elements = max(3 * residual, 2 * sizes.intermediate / layout.tensor + residual)
    if stage.layers and recomputed_layers(case, stage.layers) == stage.layers:
        unit = case.config.student.recompute_layers if case.config.student.recompute_method == "uniform" else 1
        elements += min(unit, stage.layers) * layer
    else:
        elements += _recomputed_part(case, layer)
    return _microbatch(case) * elements


def _embedding_gradient(case: Case, stage: Stage) -> float:
    """Bytes of the gradient of the embedding before it is added to Megatron's buffer, after the layers' backward."""
    if case.lora or not stage.first:
        return 0.0
    rows = padded_vocabulary(case.sizes, case.layout) / case.layout.tensor
    return rows * case.sizes.hidden * case.element


def _update_bytes(case: Case, stage: Stage, parameters: Parameters) -> float:
    """Temporary bytes of the update for the largest trained tensor: |x| and three booleans per element in the NaN and
    Inf check, and twice the fp32 second moment of a shard in torch's Adam, which is used without Transformer Engine.
    """
    if case.lora:
        return 0.0
    largest = largest_trained(case, stage, parameters)
    moment = float(largest)
    if case.shards_state:
        moment = min(moment, parameters.dense / case.layout.dense_replicas)
    return max((case.element + 3.0) * largest, 8.0 * moment if case.plain else 0.0)


def _residual(case: Case) -> float:
    """Elements per token of the residual stream on one rank."""
    return case.sizes.hidden / (case.layout.tensor if case.layout.sequence else 1)


def _microbatch(case: Case) -> float:
    """Bytes of one element per token for the micro-batch of a rank."""
    return case.microbatch_tokens / case.layout.context * case.element


def _recomputed_part(case: Case, kept: float) -> float:
    """Elements per token that the backward of one layer recomputes under `student.recompute=selective`."""
    if case.config.student.recompute != "selective":
        return 0.0
    student = copy.copy(case.config.student)
    student.recompute = "none"
    config = copy.copy(case.config)
    config.student = student
    return kept_by_layer(dataclasses.replace(case, config=config)).per_rank(case) - kept


def loss_bytes(case: Case) -> float:
    """Peak bytes of the loss on the last stage: its inputs and their gradients, plus the logits of one chunk or, in the
    backward pass, a second copy of the gradients.
    """
    settings, sizes, layout, element = case.config.distillation, case.sizes, case.layout, case.element
    rows, responses = padded_vocabulary(sizes, layout) / layout.tensor, case.microbatch_responses
    columns = min(rows, sizes.vocab)  # the first ranks have no padding
    # The student, one for each vector of the target, and the gradient if it cannot overwrite the student's logits.
    buffers = 1 + case.target.vectors + (0.5 if element < 4 else float(layout.tensor > 1))
    tokens = min(settings.chunk_tokens or default_chunk_tokens(buffers), responses)
    chunk = 4 * buffers * tokens * columns + 4 * min(settings.diagnosed_tokens, tokens) * columns
    states = responses * sizes.hidden  # each of: hidden state and its gradient, the target's vectors
    if settings.fused == "never":
        chunk += _UNCOMPILED_TILES * min(_TILE_BYTES, 4 * tokens * columns)
    return states * (2 * element + case.target.vector_bytes(element)) + max(chunk, states * element)


def cache_bytes(case: Case, stage: Stage) -> float:
    """Bytes of the key-value cache of one batch of rollouts at the limits."""
    positions = cache_positions(case.limits.student, case.device)
    elements = 2 * case.decoded_rows * positions * stage.layers * case.sizes.key_width / case.layout.tensor
    return elements * case.element


def optimizer_bytes(case: Case, parameters: Parameters) -> float:
    """Bytes of Adam's moments and, for a bf16 model, of fp32 main weights, on the device and the host."""
    moments = 4 if case.config.optimizer.state_dtype == "bf16" else 8
    each = moments + (4 if case.element == 2 else 0)
    dense, experts = trained(case, parameters)
    if not case.shards_state:
        return each * (dense + experts)
    return each * (dense / case.layout.dense_replicas + experts / case.layout.expert_replicas)


def trained(case: Case, parameters: Parameters) -> tuple[int, int]:
    """Numbers of trained elements outside and inside experts."""
    if case.lora:
        return parameters.adapters, parameters.expert_adapters
    return parameters.dense, parameters.experts


def largest_trained(case: Case, stage: Stage, parameters: Parameters) -> int:
    """Elements of the largest trained tensor of a rank: the matrix of a linear or expert including its bias, a
    vocabulary matrix, or a matrix of an adapter.
    """
    layout, lora = case.layout, case.config.student.lora
    largest = parameters.vocabulary if not case.lora and (stage.first or stage.last) else 0
    for linear in linears(case.sizes):
        split = layout.expert_shards if linear.expert else layout.tensor
        if not case.lora:
            largest = max(largest, linear.share(split))
        elif linear.name in lora.targets:
            largest = max(largest, lora.rank * max(linear.inputs, linear.outputs) // split)
    return largest


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU of one stage, in bytes."""

    standing: dict[str, float]
    """Bytes that are allocated in every phase, by name."""
    phases: dict[str, dict[str, float]]
    """Bytes that each phase adds, by name."""
    copy_on_host: float
    """Bytes of the frozen copy that are on the host and are copied to the device once per step."""
    host: float
    """Bytes of host memory for this GPU: the parts of the frozen copy, the frozen states and the optimizer state that
    are kept there."""

    def peak(self, phase: str) -> float:
        """Peak bytes in `phase`."""
        return sum(self.standing.values()) + sum(self.phases[phase].values())

    @property
    def worst(self) -> float:
        """Peak bytes over all phases."""
        return max(self.peak(phase) for phase in PHASES)


def memory(case: Case) -> Memory:
    """Memory of the stage whose peak is highest."""
    return max(
        (of_stage(case, stage) for stage in stages(case.sizes, case.layout)),
        key=lambda stage_memory: stage_memory.worst,
    )


def of_stage(case: Case, stage: Stage) -> Memory:
    """Memory of one stage."""
    student, sizes, layout = case.config.student, case.sizes, case.layout
    parameters = count(sizes, layout, stage, student.lora if case.lora else None)
    dense, experts = trained(case, parameters)
    copy, matrix = parameters.model * case.element, parameters.vocabulary * case.element
    offloaded = not case.lora and student.frozen_copy == "host"
    kept_matrix = matrix if stage.last else 0
    state, host_share = optimizer_bytes(case, parameters), case.config.optimizer.host_share
    copies = case.config.distillation.moving_copies
    moving = 4.0 * copies * (dense + experts)
    standing = {
        "weights": float(parameters.all * case.element),
        "gradients": float(case.gradient_element * (dense + experts)),
        "optimizer": state * (1 - host_share),
        "frozen copy": 0.0 if case.lora else float(kept_matrix if offloaded else copy),
        "moving copies": 0.0 if offloaded else moving,
        "quantised weights": quantised_bytes(case, stage),
    }
    token = sizes.hidden * (len(case.branches) * case.element + case.target.summed_bytes)
    states = case.owned_rows * case.limits.response * token if stage.last else 0
    cached = case.config.training.cache_on_host
    rollout = case.config.rollout
    sampled = 24 if rollout.top_p == 1 or rollout.temperature == 0 or 0 < rollout.top_k < sizes.vocab else 56
    longest = max(case.limits.of(branch) for branch in case.branches)
    rollout_bytes = {
        "KV cache": cache_bytes(case, stage),
        "prefill": min(case.decoded_rows * case.limits.prompt, max(PREFILL_TOKENS, case.limits.prompt))
        * working_set(case, case.limits.prompt)
        * case.element,
        "sampling": case.decoded_rows * sizes.vocab / layout.tensor * float(sampled) if stage.last else 0.0,
    }
    if rollout.engine == "vllm":
        rollout_bytes = {"vLLM": server_bytes(case)}
    # The loss runs before the backward of the layers, which needs two copies of the gradient of the hidden states.
    loss = loss_bytes(case) + 3 * _microbatch(case) * _residual(case) if stage.last else 0.0
    gradient = 2 * case.microbatch_responses * sizes.hidden * case.element if stage.last else 0
    kept = kept_bytes(case, stage)
    backward = max(backward_bytes(case, stage) + gradient, _embedding_gradient(case, stage))
    phases = {
        "rollout": rollout_bytes,
        "frozen": {
            "frozen copy brought in": float(copy - kept_matrix) if offloaded else 0.0,
            # One copy at a time replaces the trained weights, in their dtype.
            "moving copy": float(case.element * (dense + experts))
            if copies and (offloaded or case.element < 4)
            else 0.0,
            "frozen forward": case.frozen_tokens / layout.context * working_set(case, longest) * case.element,
            "held by dispatchers": held_by_dispatchers(case, stage, case.frozen_tokens),
            "kept prefix": 2.0 * case.kept_positions * sizes.key_width / layout.tensor * stage.layers * case.element,
            "frozen states": float(states),
        },
        "training": {
            "frozen states": 0.0 if cached else float(states),
            "activations": kept,
            # The update runs after the activations are freed.
            "loss, backward or update": max(loss, backward, _update_bytes(case, stage, parameters) - kept),
        },
    }
    if rollout.engine == "vllm" and (rollout.overlap or not rollout.vllm.sleep):
        for phase in ("frozen", "training"):
            phases[phase]["vLLM"] = server_bytes(case)
    copied = float(copy - kept_matrix) if offloaded else 0.0
    host = copied + (states if cached else 0.0) + state * host_share + (moving if offloaded else 0.0)
    return Memory(standing, phases, copied, host)
