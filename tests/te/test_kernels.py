"""Each emulated kernel against plain torch and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.te import kernels
from tests.te.attention import QKVFormat
from tests.te.kernels import DType

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = {torch.float32: DType.kFloat32, torch.bfloat16: DType.kBFloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    scale = max(1.0, expected.float().abs().max().item())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=TOLERANCE[actual.dtype] * scale)


def _gradients(function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """In double precision."""
    leaves = [x.double().requires_grad_() for x in inputs]
    function(*leaves).backward(upstream.double())
    return tuple(leaf.grad for leaf in leaves)


@each_dtype
def test_the_norm_and_its_gradients(dtype: torch.dtype) -> None:
    x, weight, upstream = _draw(5, 16, dtype=dtype), _draw(16, dtype=dtype, seed=1), _draw(5, 16, dtype=dtype, seed=2)
    dense = lambda a, w: torch.nn.functional.rms_norm(a, (16,), w, 1e-5)  # noqa: E731
    out = torch.empty_like(x)
    y, _, rsigma = kernels.rmsnorm_fwd(x, weight, 1e-5, out, None, DTYPES[dtype], 0, False)
    assert y is out
    _close(y, dense(x.double(), weight.double()))
    for actual, expected in zip(
        kernels.rmsnorm_bwd(upstream, x, rsigma, weight, 0, False), _gradients(dense, upstream, x, weight), strict=True
    ):
        _close(actual, expected)


def _gemm(layout: str, a: Tensor, b: Tensor, **options: Any) -> tuple[Any, ...]:
    """Calls the kernel like cpp_extensions/gemm.py."""
    defaults = {"D": None, "bias": None, "grad": False, "accumulate": False, "out_dtype": None} | options
    return kernels.generic_gemm(
        *(a, layout[0] == "T", b, layout[1] == "T", defaults["D"], None, defaults["out_dtype"], defaults["bias"]),
        *(DType.kBFloat16, False, None, defaults["grad"], torch.empty(0), 0, defaults["accumulate"], True),
    )


def test_products_of_a_linear() -> None:
    """Forward (TN) with bias, gradient of the input (NN), of the weight (NT) and of the bias, accumulated and not."""
    x, weight, bias, upstream = _draw(3, 4, 6), _draw(5, 6, seed=1), _draw(5, seed=2), _draw(3, 4, 5, seed=3)
    y, *_ = _gemm("TN", weight, x, bias=bias)
    _close(y, torch.nn.functional.linear(x, weight, bias))
    dx, dw, db = _gradients(torch.nn.functional.linear, upstream, x, weight, bias)
    _close(_gemm("NN", weight, upstream)[0], dx)
    got, bias_gradient, *_ = _gemm("NT", x, upstream, bias=bias, grad=True)
    _close(got, dw)
    _close(bias_gradient, db)
    main = torch.ones(5, 6)
    assert _gemm("NT", x, upstream, D=main, accumulate=True)[0] is main
    _close(main, dw + 1)
    assert _gemm("TN", weight.bfloat16(), x.bfloat16(), out_dtype=DType.kFloat32)[0].dtype == torch.float32
    assert _gemm("NT", x, upstream, D=main)[0] is main
    _close(main, dw)


@pytest.mark.parametrize("single", [True, False])
def test_grouped_products(single: bool) -> None:
    splits = [2, 0, 3]
    x, weights = _draw(5, 6), [_draw(4, 6, seed=seed) for seed in range(3)]
    parts = x.split(splits)
    out = [torch.ones(5, 4)] if single else [torch.ones(n, 4) for n in splits]
    empty = [torch.empty(0)] * 3
    before, after = (DType.kFloat32, splits, empty, DType.kBFloat16), (empty, False, [], 0)
    kernels.te_general_grouped_gemm(weights, True, parts, False, out, *before, single, *after, False, True, 0)
    expected = torch.cat([p @ w.T for p, w in zip(parts, weights, strict=True)])
    _close(torch.cat(out), expected)
    gradients = [torch.ones(4, 6) for _ in splits]
    upstream = _draw(5, 4, seed=7).split(splits)
    kernels.te_general_grouped_gemm(parts, False, upstream, True, gradients, *before, False, *after, True, True, 0)
    for part, up, gradient in zip(parts, upstream, gradients, strict=True):
        _close(gradient, up.T @ part + 1 if len(part) else torch.ones(4, 6))


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf).softmax(-1)


@each_dtype
@pytest.mark.parametrize("kind", ["masked", "none", "upper_triang", "aligned_causal"])
def test_softmax(kind: str, dtype: torch.dtype) -> None:
    keys = 6 if kind == "aligned_causal" else 4
    scores, upstream = _draw(2, 3, 4, keys, dtype=dtype), _draw(2, 3, 4, keys, dtype=dtype, seed=1)
    hidden = torch.ones(4, keys, dtype=torch.bool).triu(keys - 3)
    if kind == "masked":
        hidden = torch.rand(2, 1, 4, keys, generator=torch.Generator().manual_seed(3)) > 0.6
        hidden[..., 0] = False
        y = kernels.scaled_masked_softmax_forward(scores, hidden, 0.5)
    elif kind == "none":
        hidden = torch.zeros(4, keys, dtype=torch.bool)
        y = kernels.scaled_softmax_forward(scores, 0.5)
    elif kind == "upper_triang":
        y = kernels.scaled_upper_triang_masked_softmax_forward(scores.view(6, 4, 4), 0.5).view(scores.shape)
    else:
        y = kernels.scaled_aligned_causal_masked_softmax_forward(scores, 0.5)
    dense = lambda s: _masked(0.5 * s, hidden)  # noqa: E731
    _close(y, dense(scores.double()))
    exact = dense(scores.double())
    (expected,) = _gradients(dense, upstream, scores)
    _close(kernels.scaled_masked_softmax_backward(upstream, exact, 0.5), expected)


def test_a_query_without_keys_has_probabilities_0() -> None:
    y = kernels.scaled_masked_softmax_forward(_draw(1, 1, 2, 3), torch.tensor([[[[True] * 3, [False] * 3]]]), 1.0)
    assert y[0, 0, 0].tolist() == [0, 0, 0]
    assert y[0, 0, 1].sum().item() == pytest.approx(1)


def test_conversion_to_padded_and_back_to_packed() -> None:
    bounds, x = torch.tensor([0, 3, 3, 5]), _draw(5, 2, 4)
    padded = kernels.convert_thd_to_bshd(x, bounds, 3, 4)
    assert torch.equal(padded[0, :3], x[:3])
    assert torch.equal(padded[2, :2], x[3:])
    assert padded[1].abs().sum() + padded[0, 3:].abs().sum() + padded[2, 2:].abs().sum() == 0
    assert torch.equal(kernels.convert_bshd_to_thd(padded, bounds, 5), x)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_rotations_are_those_of_megatron_and_turn_gradients_back(packed: bool, size: int, rank: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as turn

    angles = _draw(16, 1, 1, 3).repeat(1, 1, 1, 2)
    lengths = [4, 8] if packed else [8]
    parts = [angles[:n] for n in lengths]
    if size > 1:
        chunks = [part.chunk(2 * size) for part in parts]
        parts = [torch.cat([chunk[rank], chunk[2 * size - 1 - rank]]) for chunk in chunks]
    mine = torch.cat(parts)
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    x, upstream = (_draw(len(mine), *([] if packed else [2]), 3, 8, seed=seed) for seed in (1, 2))
    form = QKVFormat.NVTE_THD if packed else QKVFormat.NVTE_SBHD
    arguments = (angles, None, form, False, bounds, size, rank)
    dense = lambda y: turn(y[:, None] if packed else y, mine.to(y.dtype)).view(y.shape)  # noqa: E731
    _close(kernels.fused_rope_forward(x, *arguments), dense(x.double()))
    (expected,) = _gradients(dense, upstream, x)
    _close(kernels.fused_rope_backward(upstream, *arguments), expected)


def test_norms_and_scales_of_many_tensors() -> None:
    tensors = [_draw(3, 4), _draw(5, seed=1)]
    total, each = kernels.multi_tensor_l2norm(0, torch.zeros(1), [tensors], True)
    assert total.item() == pytest.approx(torch.cat([t.flatten() for t in tensors]).norm().item())
    assert each.tolist() == pytest.approx([t.norm().item() for t in tensors])
    copies = [torch.empty_like(t) for t in tensors]
    kernels.multi_tensor_scale(0, torch.zeros(1), [tensors, copies], 0.25)
    assert all(torch.equal(c, 0.25 * t) for c, t in zip(copies, tensors, strict=True))
    kernels.multi_tensor_scale_tensor(0, torch.zeros(1), [tensors, tensors], torch.tensor([0.25]))
    assert all(torch.equal(c, t) for c, t in zip(copies, tensors, strict=True))


@pytest.mark.parametrize("mode", [0, 1])
def test_adam_is_that_of_torch(mode: int) -> None:
    parameter, moments = _draw(4, 3), [torch.zeros(4, 3), torch.zeros(4, 3)]
    reference = torch.nn.Parameter(parameter.clone())
    kind = (torch.optim.Adam, torch.optim.AdamW)[mode]
    optimizer = kind([reference], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for step in range(1, 4):
        reference.grad = _draw(4, 3, seed=step)
        lists = [[reference.grad], [parameter], [moments[0]], [moments[1]]]
        kernels.multi_tensor_adam(0, torch.zeros(1), lists, 0.1, 0.8, 0.9, 1e-3, step, mode, 1, 0.2)
        optimizer.step()
        _close(parameter, reference.detach())


def test_what_is_not_emulated_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="gelu"):
        kernels.generic_gemm(
            *(_draw(2, 2), True, _draw(2, 2), False, None, None, None, None),
            *(DType.kBFloat16, True, None, False, torch.empty(0), 0, False, True),
        )
