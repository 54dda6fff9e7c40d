"""Refuses heads, windows and precisions that `parallel.context_type` does not support."""

from __future__ import annotations

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.megatron.interfaces import ModelProvider
from nemo_popsd.parallel.config import GATHERED, HEADS, HIERARCHICAL, RING, ParallelConfig

PRECISIONS_OF_CONTEXT = ("bf16",)
"""Values of `student.precision` in which Transformer Engine supports context parallelism."""
_HEAD_MULTIPLE = 8
"""Transformer Engine's all-gather and all-to-all need a head dimension that is a multiple of this."""


def refuse_context(provider: ModelProvider, student: StudentConfig, parallel: ParallelConfig, *, fused: bool) -> None:
    """Refuses an architecture or a precision that `parallel.context_type` does not support on its layers.

    Args:
        provider: the architecture.
        student: the precision.
        parallel: the layout.
        fused: whether the layers are Transformer Engine's; local layers gather keys and values.

    Raises:
        UserError: the message names the settings.
    """
    if parallel.context == 1:
        return
    if not fused:
        if parallel.context_type not in ("auto", GATHERED):
            raise UserError(
                "layout",
                got=f"parallel.context_type={parallel.context_type} with local layers",
                need=f"{GATHERED}: local layers gather keys and values",
                fix="set parallel.context_type=auto, or student.layers=transformer_engine",
            )
        return
    if student.precision not in PRECISIONS_OF_CONTEXT:
        raise UserError(
            "layout",
            got=f"student.precision={student.precision} with {parallel.describe()}",
            need="bf16: Transformer Engine supports context parallelism in no other precision",
            fix="set student.precision=bf16, or parallel.context=1",
        )
    kind = RING if parallel.context_type == "auto" else parallel.context_type
    if provider.window_size is not None and kind not in (GATHERED, HEADS):
        raise UserError(
            "layout",
            got=f"layers with sliding windows (OLMo-3's) with {parallel.describe()} and parallel.context_type={kind}",
            need="keys of all ranks at once: Transformer Engine's rings have no sliding windows",
            fix=f"set parallel.context_type={HEADS} or {GATHERED}, or parallel.context=1",
        )
    channels = provider.kv_channels or provider.hidden_size // provider.num_attention_heads
    if kind in (GATHERED, HEADS) and channels % _HEAD_MULTIPLE:
        raise UserError(
            "layout",
            got=f"heads of {channels} with parallel.context_type={kind}",
            need=f"a multiple of {_HEAD_MULTIPLE}, as Transformer Engine requires for this type",
            fix="set parallel.context_type=auto",
        )
    ranks = {HEADS: parallel.context, HIERARCHICAL: (parallel.context_sizes or [1])[0]}.get(kind, 1)
    groups = provider.num_query_groups or provider.num_attention_heads
    for what, count in (("attention heads", provider.num_attention_heads), ("key-value heads", groups)):
        if count // parallel.tensor % ranks:
            raise UserError(
                "layout",
                got=f"{count // parallel.tensor} {what} on each tensor-parallel rank with parallel.context_type={kind} "
                f"over {ranks} ranks",
                need="a multiple of the number of these ranks, over which the heads are split",
                fix="set parallel.context_type, parallel.context_sizes or parallel.context",
            )
