"""The local norm and core attention against their formulas: grouped queries, cache, packing, context parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import run_ranks

HEADS, GROUPS, WIDTH = 6, 2, 8
TOLERANCE = 2e-6  # of values of order 1, fp32 against float64


def _config(**fields: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": 1,
        "hidden_size": HEADS * WIDTH,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
    }
    return TransformerConfig(**{**settings, **fields})


def _attention(group: Any = None, **fields: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_popsd.megatron.layers import LocalCoreAttention

    groups = ProcessGroupCollection(cp=group, tp=None)
    options = {k: fields.pop(k) for k in ("softmax_scale", "dropout") if k in fields}
    if "dropout" in options:
        options["attention_dropout"] = options.pop("dropout")
    return LocalCoreAttention(_config(**fields), 1, AttnMaskType.causal, "self", pg_collection=groups, **options)


def _inputs(tokens: int, batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, batch, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float = WIDTH**-0.5) -> Tensor:
    """Causal attention, head by head, with the last query at the last key."""
    context = torch.empty_like(query)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = torch.einsum("sbd,tbd->bst", query[:, :, head], key[:, :, group]) * scale
        past = torch.ones(scores.shape[1:], dtype=torch.bool).tril(key.shape[0] - query.shape[0])
        weights = scores.masked_fill(~past, -torch.inf).softmax(-1)
        context[:, :, head] = torch.einsum("bst,tbd->sbd", weights, value[:, :, group])
    return context.flatten(2)


def _with_gradients(function: Any, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    (output * weight.to(output.dtype)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def _close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=TOLERANCE * max(1.0, e.abs().max().item()))


def test_the_norm_equals_that_of_transformers():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    from nemo_popsd.megatron.layers import LocalRMSNorm

    x = 3 * torch.randn(5, 2, 48, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e-3  # where epsilon counts
    for eps in (1e-6, 1e-2):
        ours, theirs = LocalRMSNorm(_config(), 48, eps), Qwen3RMSNorm(48, eps)
        with torch.no_grad():
            ours.weight.normal_()
            theirs.weight.copy_(ours.weight)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    assert LocalRMSNorm(_config(params_dtype=torch.bfloat16), 48).weight.dtype == torch.bfloat16
    parallel = _config(sequence_parallel=True, tensor_model_parallel_size=2)
    assert LocalRMSNorm(parallel, 48).weight.sequence_parallel
    assert not LocalRMSNorm(_config(), 48).weight.sequence_parallel


def test_the_norm_refuses_other_normalizations():
    from nemo_popsd.megatron.layers import LocalRMSNorm

    with pytest.raises(ValueError, match="LayerNorm"):
        LocalRMSNorm(_config(normalization="LayerNorm"), 48)
    with pytest.raises(ValueError, match="zero_centered_gamma=True"):
        LocalRMSNorm(_config(layernorm_zero_centered_gamma=True), 48)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_causal_with_grouped_queries(scale):
    inputs, weight = _inputs(7, 3), torch.randn(7, 3, HEADS * WIDTH)
    fields = {} if scale is None else {"softmax_scale": scale}
    actual = _with_gradients(_attention(**fields), inputs, weight)
    dense = lambda *x: _dense(*x, scale=scale or WIDTH**-0.5)  # noqa: E731
    _close(actual, _with_gradients(dense, [x.double() for x in inputs], weight))
    for query_groups in (None, HEADS):
        full = _attention(num_query_groups=query_groups, **fields)
        repeated = [inputs[0], *(x.repeat_interleave(HEADS // GROUPS, dim=2) for x in inputs[1:])]
        torch.testing.assert_close(full(*repeated), actual[0])


def test_keys_of_another_length_than_the_queries_are_refused():
    query, key, value = _inputs(7, 3)
    with pytest.raises(ValueError, match="got 2 queries for 7 keys"):
        _attention()(query[-2:], key, value)


def test_packed_sequences_do_not_attend_to_each_other():
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = [4, 1, 6]
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    inputs = [x.squeeze(1) for x in _inputs(11, 1)]
    weight = torch.randn(11, HEADS * WIDTH)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    actual = _with_gradients(lambda *x: _attention()(*x, packed_seq_params=packed), inputs, weight)

    def separate(*x: Tensor) -> Tensor:
        parts = zip(*(t.unsqueeze(1).split(lengths) for t in x), strict=True)
        return torch.cat([_dense(*part) for part in parts]).squeeze(1)

    _close(actual, _with_gradients(separate, [x.double() for x in inputs], weight))


def test_dropout_and_other_softmaxes_are_refused():
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        _attention(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.2"):
        _attention(dropout=0.2)
    with pytest.raises(ValueError, match="learnable"):
        _attention(softmax_type="learnable")


@pytest.mark.parametrize("tokens", [4, 9])
def test_a_window_hides_earlier_tokens_in_windowed_layers_only(tokens):
    fields = {"window_size": (3, 0)}
    windowed, skipped = _attention(**fields), _attention(**fields, window_attn_skip_freq=[0])
    inputs, weight = _inputs(tokens, 2), torch.randn(tokens, 2, HEADS * WIDTH)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = []
        for last in range(tokens):
            first = max(0, last - 3)
            rows.append(_dense(query[last : last + 1], key[first : last + 1], value[first : last + 1]))
        return torch.cat(rows)

    _close(_with_gradients(windowed, inputs, weight), _with_gradients(dense, [x.double() for x in inputs], weight))
    _close(_with_gradients(skipped, inputs, weight), _with_gradients(_dense, [x.double() for x in inputs], weight))


def _context_parallel(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """This rank's outputs and gradients, from its chunks r and 2·cp − 1 − r of a dense and of a packed batch."""
    import torch.distributed as dist
    from megatron.core.packed_seq_params import PackedSeqParams

    from nemo_popsd.megatron.layers import zigzag_positions

    group = dist.group.WORLD
    attention = _attention(group, context_parallel_size=world_size)
    inputs, weight = _inputs(8, 2), torch.randn(8, 2, HEADS * WIDTH, generator=torch.Generator().manual_seed(9))
    mine = zigzag_positions(8 // world_size, world_size, rank, torch.device("cpu"))
    result = {"dense": _with_gradients(attention, [x[mine] for x in inputs], weight[mine]), "positions": [mine]}
    lengths = [4, 12]
    offsets = torch.tensor([0, 4])
    local = torch.cat(
        [
            offset + zigzag_positions(length // world_size, world_size, rank, torch.device("cpu"))
            for offset, length in zip(offsets, lengths, strict=True)
        ]
    )
    bounds = torch.tensor([0, 4, 16], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    inputs = [x.squeeze(1)[local] for x in _inputs(16, 1)]
    weight = torch.randn(16, HEADS * WIDTH, generator=torch.Generator().manual_seed(9))[local]
    result["packed"] = _with_gradients(lambda *x: attention(*x, packed_seq_params=packed), inputs, weight)
    result["packed positions"] = [local]
    return result


def test_context_parallel_ranks_together_give_the_dense_attention():
    results = run_ranks(_context_parallel, 2)
    assert [r["positions"][0].tolist() for r in results] == [[0, 1, 6, 7], [2, 3, 4, 5]]

    def together(name: str, positions: str) -> list[Tensor]:
        order = torch.argsort(torch.cat([r[positions][0] for r in results]))
        return [torch.cat(parts)[order] for parts in zip(*(r[name] for r in results), strict=True)]

    weight = torch.randn(8, 2, HEADS * WIDTH, generator=torch.Generator().manual_seed(9))
    expected = _with_gradients(_dense, [x.double() for x in _inputs(8, 2)], weight)
    _close(together("dense", "positions"), expected)

    def separate(*x: Tensor) -> Tensor:
        parts = zip(*(t.split([4, 12]) for t in x), strict=True)
        return torch.cat([_dense(*part) for part in parts])

    weight = torch.randn(16, HEADS * WIDTH, generator=torch.Generator().manual_seed(9)).unsqueeze(1)
    expected = _with_gradients(separate, [x.double() for x in _inputs(16, 1)], weight)
    _close(together("packed", "packed positions"), [x.squeeze(1) for x in expected])
