"""Cached forwards of the live model for drawing tokens, in any layout.

Shapes: B rows, s new tokens of each, V true vocabulary padded and gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

_SEQUENCE_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""What megatron-core's modules decide sequence parallelism by when they run."""
_CONTEXT_GROUPS = ("cp_group",)
"""What attention and rotary embeddings decide context parallelism by when they run."""


@contextmanager
def whole_sequences(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Within, the model computes in evaluation mode on whole sequences: sequence and context parallelism are off.

    A token at a time cannot be split. Weights are not touched: each tensor-parallel rank applies its shards to all
    tokens, as it does without sequence parallelism, and each context-parallel rank is a replica.
    """
    with ExitStack() as restore:
        for chunk in chunks:
            restore.callback(chunk.train, chunk.training)
            chunk.eval()
        for module in [m for chunk in chunks for m in chunk.modules()] + [chunks[0].config]:
            for name in _SEQUENCE_FLAGS:
                _replace(restore, module, name, True, False)
            for name in _CONTEXT_GROUPS:
                _replace(restore, module, name, module.__dict__.get(name), None)
            # Megatron-Bridge's adapters gather and scatter by a flag of their own (peft/utils.py:616).
            _replace(restore, module, "disable_sequence_parallel_comm", False, True)
        if chunks[0].config.context_parallel_size > 1:
            _replace(restore, chunks[0].config, "context_parallel_size", chunks[0].config.context_parallel_size, 1)
            # Rotary embeddings cache what they cut for this rank by length alone (rotary_pos_embedding.py:160).
            forget = type(chunks[0].rotary_pos_emb).forward.cache_clear
            forget()
            restore.callback(forget)
        yield


def _replace(restore: ExitStack, owner: Any, name: str, value: Any, other: Any) -> None:
    """Sets `owner.name` to `other` until `restore` closes, if it is `value` and the owner's own."""
    if value is not None and owner.__dict__.get(name) == value:
        setattr(owner, name, other)
        restore.callback(setattr, owner, name, value)


def cached_logits(chunks: Sequence[GPTModel], inputs: Tensor, cache: StaticInferenceContext) -> Tensor | None:
    """Logits [B, V_pad] after the last of `inputs`, which are put into the cache; None but on the last stage.

    Under pipeline parallelism a token passes the stages, and under virtual pipelining passes them several times; each
    hop sends B·s·H numbers to the next stage, and while one stage computes the others wait. Collectives beside: those
    of the model's forward, and one gather of [B, V_pad] logits over the tensor-parallel group.

    Args:
        chunks: within `whole_sequences`.
        inputs: [B, s] int64.
        cache: keys and values so far, of this rank's layers.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    stage, stages = group.rank(), group.size()
    offset, (rows, length) = cache.sequence_len_offset, inputs.shape
    positions = torch.arange(offset, offset + length, device=inputs.device).expand(rows, -1)
    config = chunks[0].config
    before, after = (dist.get_global_rank(group, (stage + step) % stages) for step in (-1, 1))
    output = None
    for number, chunk in enumerate(chunks):
        if stages > 1:
            received = None
            if (number, stage) != (0, 0):
                received = torch.empty(
                    length, rows, config.hidden_size, dtype=config.params_dtype, device=inputs.device
                )
                dist.recv(received, before, group=group)
            chunk.set_input_tensor(received)
        output = chunk(
            input_ids=inputs.contiguous(),
            position_ids=positions,
            attention_mask=None,
            inference_context=cache,
            runtime_gather_output=True,
        )
        if (number, stage) != (len(chunks) - 1, stages - 1):
            dist.send(output.contiguous(), after, group=group)
            output = None
    for chunk in chunks:
        chunk.set_input_tensor(None)
    cache.sequence_len_offset += length
    cache.enable_decode_mode()
    return None if output is None else output[:, -1]
