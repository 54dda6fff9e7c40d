"""Norm and core attention of the local layer spec: the computation of Transformer Engine in plain torch on any device.

Used without Transformer Engine (see `nemo_popsd.megatron.spec`) in place of megatron-core's own local versions:
`megatron.core.transformer.torch_norm.WrappedTorchNorm` refuses sequence parallelism, and
`megatron.core.transformer.dot_product_attention.DotProductAttention` refuses packed sequences and context parallelism.

Shapes: s sequence, b batch, t packed tokens, n query heads and g key-value heads of this tensor-parallel rank, d head
dimension.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from nemo_popsd.megatron.kernels import causal_attention, packed_kernel


class LocalRMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension, in the model's dtype, marked for sequence parallelism.

    Under sequence parallelism each rank normalises its own tokens, so the gradient of the weight covers only these
    tokens; Megatron's `finalize_model_grads` sums the gradients of parameters marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError(
                f"got normalization={config.normalization!r} with "
                f"layernorm_zero_centered_gamma={config.layernorm_zero_centered_gamma}; the local layer spec needs "
                "RMSNorm without zero-centred weights; set student.layers=transformer_engine (a GPU)"
            )
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LocalCoreAttention(MegatronModule):
    """Causal attention of one tensor-parallel rank's heads: padded, packed, context-parallel.

    - *Padded* batches are padded on the right: because attention is causal, no real token attends to padding.
    - *Packed* (thd): tokens attend within their own sequence, bounded by ``cu_seqlens_q``; all sequences at once if
      torch supports it (`packed_kernel`), otherwise one after the other.
    - *Context parallel*: every sequence is split into 2·cp chunks and rank r holds chunks r and 2·cp−1−r. Keys and
      values are gathered over the group (one all-gather each, one reduce-scatter each in the backward; b·s·g·d
      elements); queries are not.
    - *Windowed* layers (Megatron's ``window_size`` and ``window_attn_skip_freq``): a token attends to itself and to the
      ``window_size[0]`` tokens before it.

    Attention to a cache is in `nemo_popsd.megatron.kv_cache`. Dropout and attention biases are refused, not ignored.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or config.softmax_type != "vanilla":
            raise ValueError(
                f"got attention_dropout={dropout}, softmax_type={config.softmax_type!r}; the local core attention "
                "needs 0 and 'vanilla'; set student.layers=transformer_engine (a GPU)"
            )
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1
        assert pg_collection is not None
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of queries to the keys and values of their own sequences.

        Args:
            query: [s, b, n, d], or [t, n, d] when packed; this rank's chunks under context parallelism.
            key: [s, b, g, d] or [t, g, d].
            value: values, shaped like `key`.
            attention_mask: ignored, because every sequence is causal.
            attn_mask_type: ignored, like the mask.
            attention_bias: must be None.
            packed_seq_params: with ``qkv_format="thd"``, the bounds of the sequences in ``cu_seqlens_q``; the same on
                the host in ``cu_seqlens_q_padded``, or None (see `nemo_popsd.megatron.forward`).

        Returns:
            [s, b, n·d], or [t, n·d] when packed.
        """
        assert attention_bias is None
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            bounds, on_host = packed_seq_params.cu_seqlens_q, packed_seq_params.cu_seqlens_q_padded
            kernel = packed_kernel(query, self.softmax_scale, self.window) if self.cp_group is None else None
            if kernel is not None:
                return kernel(query, key, value, bounds, packed_seq_params.max_seqlen_q).flatten(1)
            share = 1 if self.cp_group is None else self.cp_group.size()
            lengths = (torch.diff(bounds if on_host is None else on_host) // share).tolist()
            parts = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(*part) for part in parts]).squeeze(1)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[s, b, n, d], [s, b, g, d], [s, b, g, d] -> [s, b, n·d]; one sequence length for the batch."""
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"got {query.shape[0]} queries for {key.shape[0]} keys; need equally many, of one sequence"
            )
        mask = None
        if self.cp_group is not None:
            positions = zigzag_positions(query.shape[0], self.cp_group.size(), self.cp_group.rank(), query.device)
            key, value = (self._gather_context(x) for x in (key, value))
            mask = self._visible(positions, key.shape[0])
        elif self.window is not None and self.window < key.shape[0]:
            mask = self._visible(torch.arange(key.shape[0], device=key.device), key.shape[0])
        q_bnsd, k_bgsd, v_bgsd = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context_bnsd = causal_attention(q_bnsd, k_bgsd, v_bgsd, mask=mask, scale=self.softmax_scale)
        return context_bnsd.permute(2, 0, 1, 3).flatten(2)

    def _visible(self, positions: Tensor, keys: int) -> Tensor:
        """Mask of the first `keys` positions to which the tokens at `positions` attend: [s, keys] bool."""
        distance = positions[:, None] - torch.arange(keys, device=positions.device)[None, :]
        visible = distance >= 0
        return visible if self.window is None else visible & (distance < self.window)

    def _gather_context(self, x: Tensor) -> Tensor:
        """[s/cp, b, g, d] of every rank, in the order of the sequence: [s, b, g, d]."""
        assert self.cp_group is not None
        size = self.cp_group.size()
        gathered: Tensor = gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
        positions = [zigzag_positions(x.shape[0], size, rank, x.device) for rank in range(size)]
        return gathered[torch.argsort(torch.cat(positions))]


def zigzag_positions(local_length: int, size: int, rank: int, device: torch.device) -> Tensor:
    """Positions in the full sequence of the tokens that context-parallel rank `rank` of `size` holds: [s/cp].

    The sequence is cut into 2·size chunks; rank r holds chunks r and 2·size−1−r, which balances the work of causal
    attention.
    """
    chunk = local_length // 2
    first = torch.arange(rank * chunk, (rank + 1) * chunk, device=device)
    last = torch.arange((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk, device=device)
    return torch.cat([first, last])
