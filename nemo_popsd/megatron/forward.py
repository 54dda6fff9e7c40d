"""Final hidden states at response positions, through Megatron's own schedules, for training and frozen branches alike.

Shapes: s padded length, b rows of a micro-batch, N its response tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_popsd.megatron.microbatches import ContextSequence, MicroBatch, microbatches

Report = TypeVar("Report")


def output_weight(model: GPTModel) -> Tensor:
    """This rank's rows of the output matrix [V_pad/tp, H], tied to the embedding or not."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


@contextmanager
def hidden_states_only(model: GPTModel) -> Iterator[None]:
    """Within, the model returns final hidden states [s, b, H], after the last norm, before the output layer.

    Megatron's ``GPTModel.forward`` returns them where it has no output layer to apply
    (gpt_model.py:608); the decoder's last norm follows a flag of its own and stays.
    """
    stage = model.post_process
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = stage


def _run_schedule(
    model: torch.nn.Module, batches: Sequence[MicroBatch], loss: Callable[..., Any], *, forward_only: bool
) -> list[Any]:
    def step(data: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(data)
        hidden_SBH = chunk(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None)

        def at_responses(hidden_SBH: Tensor, **options: Any) -> Any:
            """Called where the last layer is; keeps the states that predict response tokens, [N, H]."""
            return loss(batch, hidden_SBH.flatten(0, 1).index_select(0, batch.response_index), **options)

        return hidden_SBH, at_responses

    schedule = get_forward_backward_func()
    longest = max(batch.input_ids.shape[1] for batch in batches)
    results: list[Any] = schedule(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=longest,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results


@torch.no_grad()
def frozen_hidden_states(model: GPTModel, sequences: Sequence[ContextSequence], token_budget: int) -> list[Tensor]:
    """Hidden states at the response positions of each sequence: [R_i, H] in the model's dtype, detached.

    All contexts of all rollouts go in together, grouped by length into forwards of at most `token_budget` padded
    tokens. Collectives: those of Megatron's forward.

    Args:
        model: the frozen weights (see `nemo_popsd.megatron.base`).
        sequences: contexts of any of the branches.
        token_budget: padded tokens of one forward.
    """
    if not sequences:
        return []
    batches = microbatches(sequences, token_budget, next(model.parameters()).device)

    def keep(batch: MicroBatch, hidden_NH: Tensor, *, non_loss_data: bool) -> tuple[Tensor, ...]:
        assert non_loss_data
        return hidden_NH.split(batch.response_lengths)

    training = model.training
    model.eval()
    try:
        with hidden_states_only(model):
            results = _run_schedule(model, batches, keep, forward_only=True)
    finally:
        model.train(training)
    states: dict[int, Tensor] = {}
    for batch, parts in zip(batches, results, strict=True):
        states.update(zip(batch.rows, parts, strict=True))
    return [states[index] for index in range(len(sequences))]


def upstream_of_loss(model: DistributedDataParallel) -> float:
    """What `forward_backward`'s backward pass multiplies a returned loss with, per micro-batch.

    Megatron divides by the number of ranks when it reduces gradients; each rank's loss is as many times too large.
    """
    return float(model.dp_cp_group.size())


def forward_backward(
    model: DistributedDataParallel,
    batches: Sequence[MicroBatch],
    loss: Callable[[MicroBatch, Tensor], tuple[Tensor, Report]],
) -> list[Report]:
    """One accumulation of gradients over `batches`: forward, loss, backward, and Megatron's reduction of gradients.

    Afterwards ``main_grad`` of each parameter holds Σ over micro-batches and data-parallel ranks of the gradient of
    what `loss` returned: Megatron averages over micro-batches and ranks, which is undone here, so that the caller
    weights tokens by the global batch and unequal shares bias nothing.

    Args:
        model: the student in Megatron's DDP.
        batches: at least one; ranks may have different numbers of them.
        loss: from a micro-batch and its hidden states [N, H] (with gradient) to a scalar and a report.

    Returns:
        The reports, by micro-batch.
    """
    scale = len(batches) * upstream_of_loss(model)

    def scaled(batch: MicroBatch, hidden_NH: Tensor) -> tuple[Tensor, Report]:
        value, report = loss(batch, hidden_NH)
        return value * scale, report

    gpt: GPTModel = model.module
    with hidden_states_only(gpt):
        return _run_schedule(model, batches, scaled, forward_only=False)
