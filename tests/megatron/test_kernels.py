"""The attention kernels of a GPU with emulated functions: their arguments describe the attention of the CPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_popsd.megatron import kernels
from tests.megatron.test_layers import GROUPS, HEADS, WIDTH, _attention, _close, _inputs, _with_gradients

LENGTHS = [7, 1, 12, 5]


def _visible(bounds: Tensor, left: int) -> Tensor:
    """FlashAttention's meaning of bounds and of a window (left, 0): [t, t] bool."""
    place = torch.arange(int(bounds[-1]))
    sequence = torch.bucketize(place, bounds, right=True)
    distance = place[:, None] - place[None]
    visible = (sequence[:, None] == sequence[None]) & (distance >= 0)
    return visible if left < 0 else visible & (distance <= left)


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *, left: int, scale: float) -> Tensor:
    assert bounds.dtype == torch.int32
    assert key.shape[1] == query.shape[1], "this version does not support grouped heads"
    scores = torch.einsum("snd,tnd->nst", query.double(), key.double()) * scale
    weights = scores.masked_fill(~_visible(bounds, left), -torch.inf).softmax(-1)
    return torch.einsum("nst,tnd->snd", weights, value.double()).to(query.dtype)


def _torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return _varlen(query, key, value, cu_seq_q, left=-1, scale=WIDTH**-0.5)


def _torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0
    assert max_q == max_k == max(LENGTHS)
    return _varlen(query, key, value, cu_seq_q, left=window_size[0], scale=scale)


def _torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    return _varlen(query, key, value, cu_seq_q, left=window_size[0], scale=scale)


VERSIONS = {"2.10": _torch_2_10, "2.11": _torch_2_11, "2.13": _torch_2_13}


def _kernel_of(monkeypatch: pytest.MonkeyPatch, version: str, scale: float, window: int | None) -> Any:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", VERSIONS[version])
    return kernels._variable_lengths.__wrapped__(scale, window, WIDTH**-0.5)


@pytest.mark.parametrize(("version", "window"), [("2.10", None), ("2.11", None), ("2.11", 3), ("2.13", 3)])
def test_packed_attention_equals_attention_of_each_sequence(monkeypatch, version, window):
    from megatron.core.packed_seq_params import PackedSeqParams

    from nemo_popsd.megatron import layers

    inputs = [x.squeeze(1) for x in _inputs(sum(LENGTHS), 1)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )
    attention = _attention(window_size=None if window is None else (window - 1, 0))
    assert attention.window == window
    weight = torch.randn(sum(LENGTHS), HEADS * WIDTH, generator=torch.Generator().manual_seed(1))
    forward = lambda *x: attention(*x, packed_seq_params=packed)  # noqa: E731
    one_by_one = _with_gradients(forward, inputs, weight)
    kernel = _kernel_of(monkeypatch, version, WIDTH**-0.5, window)
    monkeypatch.setattr(layers, "packed_kernel", lambda *_: kernel)
    monkeypatch.setattr(attention, "_attend", None)
    _close(_with_gradients(forward, inputs, weight), one_by_one)


def test_versions_without_the_needed_options_use_the_loop(monkeypatch):
    assert _kernel_of(monkeypatch, "2.10", WIDTH**-0.5, 3) is None, "no window"
    assert _kernel_of(monkeypatch, "2.10", 0.5, None) is None, "only the default scale"
    assert _kernel_of(monkeypatch, "2.11", 0.5, 3) is not None
    query = torch.zeros(3, HEADS, WIDTH, dtype=torch.bfloat16)
    assert kernels.packed_kernel(query, WIDTH**-0.5, None) is None, "on a CPU"


def test_the_installed_torch_has_the_function_with_known_parameters():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    known = inspect.signature(varlen.varlen_attn).parameters
    assert list(known)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "scale"} <= set(known) or "is_causal" in known
    assert kernels._variable_lengths(WIDTH**-0.5, None, WIDTH**-0.5) is not None


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_equal_grouped_heads(monkeypatch, masked):
    query, key, value = (x.permute(1, 2, 0, 3) for x in _inputs(9, 2))
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if masked else None
    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    attend = lambda *x: kernels.causal_attention(*x, mask=mask, scale=0.3)  # noqa: E731
    grouped = _with_gradients(attend, [query, key, value], weight)
    monkeypatch.setattr(kernels, "_takes_groups", lambda *_: False)
    _close(_with_gradients(attend, [query, key, value], weight), grouped)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_packed_attention_equals_attention_of_each_sequence(window):
    query, key, value = (x.squeeze(1).cuda().bfloat16() for x in _inputs(sum(LENGTHS), 1))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to("cuda", torch.int32)
    kernel = kernels.packed_kernel(query, 0.3, window)
    assert kernel is not None
    wide = [x.float().repeat_interleave(HEADS // x.shape[1], 1) for x in (query, key, value)]
    expected = _varlen(*(x.cpu() for x in wide), bounds.cpu(), left=-1 if window is None else window - 1, scale=0.3)
    got = kernel(query, key, value, bounds, max(LENGTHS)).float().cpu()
    assert (got - expected).norm() / expected.norm() < 1e-2
