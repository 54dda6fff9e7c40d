"""Emulated fused attention against dense attention and autograd, complete and in the parts of context parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.te import attention
from tests.te.attention import Bias, Mask, QKVLayout, Softmax
from tests.te.kernels import DType

HEADS, GROUPS, WIDTH, SCALE = 4, 2, 8, 0.3
TOLERANCE = 5e-6
LAYOUTS = {
    "sbhd": QKVLayout.NVTE_SBHD_SBHD_SBHD,
    "bshd": QKVLayout.NVTE_BSHD_BSHD_BSHD,
    "thd": QKVLayout.NVTE_THD_THD_THD,
}


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: str, window: Sequence[int] = (-1, -1)) -> Tensor:
    """[b, s, n, d] with keys [b, k, g, d]."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k, v))
    scores = torch.einsum("bsnd,bknd->bnsk", q, k) * SCALE
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])[None]
    if mask == "causal":
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if window[0] >= 0:
        scores = scores.masked_fill(distance > window[0], -torch.inf)
    return torch.einsum("bnsk,bknd->bsnd", scores.softmax(-1), v)


def _forward(form: str, mask: Any, bounds: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    keys = options.get("bounds_kv", bounds)
    return attention.fused_attn_fwd(
        *(0, 0, True, SCALE, 0.0, True, LAYOUTS[form], Bias.NVTE_NO_BIAS, mask, Softmax.NVTE_VANILLA_SOFTMAX),
        *(options.get("window", (-1, -1)), False, bounds, keys, q, k, v, q.dtype, None, None, None, None, None),
        *(None, None, None, None, 16, False, False),
    )


def _backward(form: str, mask: Any, bounds: Tensor, tensors: Sequence[Tensor], lse: Tensor, **options: Any) -> Any:
    keys = options.get("bounds_kv", bounds)
    return attention.fused_attn_bwd(
        *(0, 0, SCALE, 0.0, True, LAYOUTS[form], Bias.NVTE_NO_BIAS, mask, Softmax.NVTE_VANILLA_SOFTMAX),
        *(options.get("window", (-1, -1)), False, False, bounds, keys, *tensors, torch.float32, DType.kFloat32),
        *([lse], None, None, None, None, None, False),
    )[:3]


def _dense_gradients(function: Any, upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    output = function(*leaves)
    output.backward(upstream.double())
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE)


CASES = {
    "causal": (Mask.NVTE_CAUSAL_MASK, "causal", (-1, 0)),
    "window": (Mask.NVTE_CAUSAL_MASK, "causal", (2, 0)),
    "all": (Mask.NVTE_NO_MASK, "none", (-1, -1)),
}


@pytest.mark.parametrize("form", ["sbhd", "bshd"])
@pytest.mark.parametrize("case", CASES)
def test_unpacked_sequences_equal_dense_attention(form: str, case: str) -> None:
    mask, name, window = CASES[case]
    q, k, v, upstream = (_draw(2, 7, n, WIDTH, seed=i) for i, n in enumerate((HEADS, GROUPS, GROUPS, HEADS)))
    expected = _dense_gradients(lambda *x: _dense(*x, name, window), upstream, q, k, v)
    turn = (lambda x: x.transpose(0, 1).contiguous()) if form == "sbhd" else (lambda x: x)
    bounds = torch.tensor([0, 7, 14])
    out, lse, _ = _forward(form, mask, bounds, *map(turn, (q, k, v)), window=window)
    assert lse.shape == (2, HEADS, 7, 1)
    tensors = [*map(turn, (q, k, v)), out, turn(upstream)]
    actual = [out, *_backward(form, mask, bounds, tensors, lse, window=window)]
    for a, e in zip(actual, expected, strict=True):
        _close(turn(a), e)


def test_packed_sequences_do_not_attend_to_each_other() -> None:
    lengths, bounds = [3, 1, 5], torch.tensor([0, 3, 4, 9])
    q, k, v, upstream = (_draw(9, n, WIDTH, seed=i) for i, n in enumerate((HEADS, GROUPS, GROUPS, HEADS)))

    def dense(*x: Tensor) -> Tensor:
        parts = zip(*(t.split(lengths) for t in x), strict=True)
        return torch.cat([_dense(*(p[None] for p in part), "causal")[0] for part in parts])

    expected = _dense_gradients(dense, upstream, q, k, v)
    mask = Mask.NVTE_PADDING_CAUSAL_MASK
    out, lse, _ = _forward("thd", mask, bounds, q, k, v)
    assert lse.shape == (9, HEADS, 1)
    for a, e in zip([out, *_backward("thd", mask, bounds, [q, k, v, out, upstream], lse)], expected, strict=True):
        _close(a, e)


def test_parts_of_the_keys_add_up_to_attention_to_all_keys() -> None:
    """The second halves of packed sequences attend to the first halves' keys in one call, to their own in another."""
    bounds, half = torch.tensor([0, 4, 10]), torch.tensor([0, 2, 5])
    q, k, v, upstream = (_draw(10, n, WIDTH, seed=i) for i, n in enumerate((HEADS, GROUPS, GROUPS, HEADS)))
    causal, everything = Mask.NVTE_PADDING_CAUSAL_MASK, Mask.NVTE_PADDING_MASK
    whole, lse_whole, _ = _forward("thd", causal, bounds, q, k, v)
    read = attention.thd_read_half_tensor
    first, second = ([read(x, bounds, number) for x in (q, k, v)] for number in (0, 1))
    assert torch.equal(first[0], torch.cat([q[:2], q[4:7]]))
    # Each half on its own diagonal, then the second half's queries on the first half's keys.
    diagonal = [_forward("thd", causal, half, *part) for part in (first, second)]
    across = _forward("thd", everything, half, second[0], *first[1:])
    rows = [read(torch.arange(10)[:, None, None], bounds, number).flatten() for number in (0, 1)]
    lse, start = torch.empty(HEADS, 10), torch.empty(HEADS, 10)
    for part, at in zip(diagonal, rows, strict=True):
        start[:, at] = part[1][..., 0].t()
    lse.copy_(start)
    attention.thd_second_half_lse_correction(lse, across[1][..., 0].t(), bounds, True)
    _close(lse.t()[..., None], lse_whole)
    assert torch.equal(attention.thd_read_second_half_lse(lse, bounds, True, 5), lse[:, rows[1]])
    out, own = torch.zeros_like(q), torch.empty_like(q)
    for part, at in zip(diagonal, rows, strict=True):
        own[at] = part[0]
    attention.thd_out_correction(out, own, lse, start, bounds, False, True)
    attention.thd_out_correction(out, across[0], lse, across[1][..., 0].t(), bounds, True, True)
    _close(out, whole)

    expected = _backward("thd", causal, bounds, [q, k, v, whole, upstream], lse_whole)
    total = [torch.full_like(x, 7.0) for x in (q, k, v)]
    lse_of = lambda at: lse.t()[at][..., None]  # noqa: E731
    for part, at, how in ((first, rows[0], ("copy", "none")), (second, rows[1], ("none", "copy"))):
        tensors = [*part, out[at], upstream[at]]
        for x, gradient in zip(total, _backward("thd", causal, half, tensors, lse_of(at)), strict=True):
            attention.thd_grad_correction(x, gradient, bounds, *how)
    tensors = [second[0], *first[1:], out[rows[1]], upstream[rows[1]]]
    dq, dk, dv = _backward("thd", everything, half, tensors, lse_of(rows[1]))
    attention.thd_grad_correction(total[0], dq, bounds, "none", "add")
    attention.thd_grad_correction(total[1], dk, bounds, "add", "none")
    attention.thd_grad_correction(total[2], dv, bounds, "add", "none")
    for a, e in zip(total, expected, strict=True):
        _close(a, e)
    both = torch.zeros_like(q)
    attention.thd_grad_correction(both, q, bounds, "copy", "add")
    assert torch.equal(both, q)


def test_what_is_not_emulated_is_refused() -> None:
    q, k, v = (_draw(4, n, WIDTH) for n in (HEADS, GROUPS, GROUPS))
    with pytest.raises(NotImplementedError, match="different numbers"):
        _forward("thd", Mask.NVTE_PADDING_CAUSAL_MASK, torch.tensor([0, 2]), q, k, v, bounds_kv=torch.tensor([0, 4]))
