"""Final hidden states at response positions, computed by Megatron's own schedules for training and frozen branches.

A model is a list of chunks: one on each rank, or several under virtual pipelining. The output of the last layer, and
therefore the results of these functions, exist only on the last pipeline stage.

Shapes: N response tokens of a micro-batch that this rank owns, R_i those of a sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_popsd.megatron.interfaces import ModelChunk, WrappedChunk
from nemo_popsd.megatron.layers import LocalCoreAttention
from nemo_popsd.megatron.microbatches import ContextSequence, MicroBatch, microbatches
from nemo_popsd.megatron.response_routing import SequenceSplit, gather_response_states

Report = TypeVar("Report")


def output_weight(model: ModelChunk) -> Tensor:
    """This rank's shard of the output matrix [V_pad/tp, H], tied to the embedding or not; `model` is a last chunk."""
    if model.share_embeddings_and_output_weights:
        shared: Tensor = model.shared_embedding_or_output_weight()
        return shared
    own: Tensor = model.output_layer.weight
    return own


@contextmanager
def hidden_states_only(model: ModelChunk) -> Iterator[None]:
    """Context in which the model returns final hidden states [s, b, H], after the last norm, before the output layer.

    `megatron.core.models.gpt.gpt_model.GPTModel._postprocess` returns them if the model has no output layer; the
    decoder's last norm has its own flag and is kept. To be used only during a forward:
    `megatron.core.models.common.language_module.language_module.LanguageModule.shared_embedding_or_output_weight`,
    which the reduction of tied embeddings' gradients calls, reads the same flag.
    """
    stage = model.post_process
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = stage


def student_batches(
    chunks: Sequence[ModelChunk], sequences: Sequence[ContextSequence], token_budget: int, *, packed: bool
) -> list[MicroBatch]:
    """Micro-batches of `sequences` as the schedule of `chunks` needs them; at least one, even without sequences.

    The interleaved schedule needs micro-batches of one shape, whose number is a multiple of the number of stages. Ranks
    that share experts run the same number (one all-reduce of one number over the expert-parallel group). Empty
    micro-batches are added to reach these numbers.

    Args:
        chunks: chunks of the model, without DDP.
        sequences: sequences of this data-parallel rank.
        token_budget: tokens of one micro-batch, with padding, over the ranks that share it.
        packed: concatenate sequences instead of padding them.
    """
    config = chunks[0].config
    interleaved = len(chunks) > 1
    device = next(chunks[0].parameters()).device
    grouped = partial(
        microbatches,
        sequences,
        token_budget,
        device,
        split=SequenceSplit.of(chunks[0]),
        packed=packed,
        one_shape=interleaved,
        count_multiple=config.pipeline_model_parallel_size if interleaved else 1,
    )
    batches = grouped(at_least=1)
    if config.expert_model_parallel_size > 1:
        most = torch.tensor(len(batches), device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel_state.get_expert_model_parallel_group())
        if most > len(batches):
            batches = grouped(at_least=int(most))
    return batches


def _run_schedule(
    chunks: Sequence[ModelChunk] | Sequence[WrappedChunk],
    batches: Sequence[MicroBatch],
    loss: Callable[..., object],
    *,
    forward_only: bool,
    before: Callable[[MicroBatch], None] = lambda batch: None,
) -> list[object]:
    """Runs Megatron's schedule. Returns the results of `loss` on the last stage if `forward_only`, otherwise the second
    value of each.
    """
    bare = [_bare(chunk) for chunk in chunks]
    split = SequenceSplit.of(bare[0])
    local = isinstance(bare[0].decoder.layers[0].self_attention.core_attention, LocalCoreAttention)

    def step(data: Iterator[MicroBatch], chunk: ModelChunk | WrappedChunk) -> tuple[Tensor, Callable[..., object]]:
        batch = next(data)
        before(batch)
        with hidden_states_only(_bare(chunk)):
            hidden_SBH = chunk(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                packed_seq_params=_packed_params(batch, local),
            )

        def at_responses(hidden_SBH: Tensor, **options: object) -> object:
            """Called on the last stage; keeps the states that predict owned response tokens, [N, H]."""
            _await_output_weight(chunk)
            return loss(batch, gather_response_states(hidden_SBH, batch.route, split), **options)

        return hidden_SBH, at_responses

    interleaved = len(chunks) > 1
    results: list[object] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].shape[0],
        micro_batch_size=batches[0].shape[1],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results


def _await_output_weight(chunk: ModelChunk | WrappedChunk) -> None:
    """Waits for the output matrix if the forward pass gathers updated weights, because the loss reads it without
    calling a module whose hook would wait. At most one all-gather of its bucket.
    """
    if isinstance(chunk, DistributedDataParallel) and chunk.remove_forward_pre_hook_handles:
        bucket = chunk.param_to_bucket_group.get(output_weight(_bare(chunk)))
        if bucket is not None:
            bucket.finish_param_sync()


def _packed_params(batch: MicroBatch, local: bool) -> PackedSeqParams | None:
    """The bounds of packed sequences in the form that the layers read; for local layers also on the host.

    `megatron.core.models.common.embeddings.rope_utils._apply_rotary_pos_emb_thd`, the unfused rotary embedding, reads
    the bounds on the host for queries and keys of each layer. `megatron.core.transformer.attention.Attention.forward`
    prefers the fields of padded sequences, so host bounds are passed there, and no layer waits for the device.
    Transformer Engine would interpret these fields as gaps between sequences.
    """
    if batch.packed is None or not local:
        return batch.packed
    return replace(batch.packed, cu_seqlens_q_padded=batch.host_bounds, cu_seqlens_kv_padded=batch.host_bounds)


def _bare(chunk: ModelChunk | WrappedChunk) -> ModelChunk:
    return cast(ModelChunk, chunk.module if isinstance(chunk, DistributedDataParallel) else chunk)


@torch.no_grad()
def frozen_hidden_states(
    chunks: Sequence[ModelChunk], batches: Sequence[MicroBatch], *, training: bool = False
) -> list[Tensor]:
    """Hidden states at the response positions of each sequence: [R_i, H] in the model's dtype, detached.

    Under context parallelism R_i counts the tokens that this rank owns. Collectives: those of Megatron's forward and
    of `gather_response_states`.

    Args:
        chunks: the frozen weights (see `nemo_popsd.megatron.base`).
        batches: micro-batches from `student_batches`.
        training: run in training mode, with the kernels of a training forward; gradients are never computed.

    Returns:
        One tensor for each sequence on the last pipeline stage, an empty list on the others.
    """
    states = frozen_batch_states(chunks, batches, training=training)
    by_sequence = {
        index: part
        for batch, hidden_NH in zip(batches, states, strict=bool(states))
        for index, part in zip(batch.sequences, hidden_NH.split(batch.response_lengths), strict=True)
    }
    return [by_sequence[index] for index in range(len(by_sequence))]


@torch.no_grad()
def frozen_batch_states(
    chunks: Sequence[ModelChunk],
    batches: Sequence[MicroBatch],
    *,
    training: bool = False,
    before: Callable[[MicroBatch], None] = lambda batch: None,
) -> list[Tensor]:
    """The hidden states [N, H] that the route of each micro-batch selects; see `frozen_hidden_states`.

    Args:
        chunks: the frozen weights.
        batches: at least one.
        training: run in training mode.
        before: called before each micro-batch passes a chunk of this rank.
    """

    def keep(batch: MicroBatch, hidden_NH: Tensor, *, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        return hidden_NH

    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.train(training)
    try:
        return cast("list[Tensor]", _run_schedule(chunks, batches, keep, forward_only=True, before=before))
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def _no_rows_of_output_weight(chunk: DistributedDataParallel) -> Tensor | float:
    """0, with a gradient of 0 for a trained output matrix if its bucket is reduced once each weight has a gradient."""
    weight = output_weight(_bare(chunk))
    return weight[:0].sum() if chunk.ddp_config.overlap_grad_reduce and weight.requires_grad else 0.0


def upstream_of_loss() -> float:
    """Factor by which the backward pass of `forward_backward` multiplies the loss of a micro-batch.

    Megatron divides by the number of data-parallel and context-parallel ranks when it reduces gradients. To undo this,
    `forward_backward` multiplies by the first of these numbers and Megatron's schedule by the second.
    """
    return float(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def forward_backward(
    chunks: Sequence[WrappedChunk],
    batches: Sequence[MicroBatch],
    loss: Callable[[MicroBatch, Tensor], tuple[Tensor, Report]],
) -> list[Report]:
    """Accumulates gradients over `batches`: forward, loss, backward, and Megatron's reduction of gradients.

    Afterwards ``main_grad`` of each parameter is the gradient of the values returned by `loss`, summed over
    micro-batches, data-parallel and context-parallel ranks. Megatron averages over micro-batches and over the ranks of
    both groups, and `megatron.core.pipeline_parallel.schedules.forward_step_calc_loss` multiplies by the size of the
    second. This is undone here, so that the caller can weight tokens by the global batch without bias from unequal
    shares of the ranks.

    Args:
        chunks: chunks of the student, each in Megatron's DDP.
        batches: micro-batches from `student_batches`; data-parallel ranks may have different numbers of them.
        loss: maps a micro-batch and its hidden states [N, H] (with gradient) to a scalar and a report.

    Returns:
        One report for each micro-batch that is not empty on the last pipeline stage, an empty list on the others.
    """
    scale = len(batches) * parallel_state.get_data_parallel_world_size()

    def scaled(batch: MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, Report | None]:
        if not batch.sequences:  # no loss, but gradients of 0 that other ranks may wait for
            return hidden_NH.sum() + _no_rows_of_output_weight(chunks[-1]), None
        value, report = loss(batch, hidden_NH)
        return value * scale, report

    results = cast("list[Report | None]", _run_schedule(chunks, batches, scaled, forward_only=False))
    return [report for report in results if report is not None]
