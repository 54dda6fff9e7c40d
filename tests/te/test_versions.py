"""Kernels that later versions of Transformer Engine add, compared with autograd or with the oldest signature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.te import attention, extension, versions
from tests.te.attention import Bias, Mask, QKVFormat, QKVLayout, Softmax
from tests.te.install import version
from tests.te.location import PACKAGE, available, folder

NAMES = versions.names_of((2, 20))
HEADS, GROUPS, WIDTH, SCALE = 4, 2, 8, 0.3
TOLERANCE = 5e-6
LAYOUTS = {"sbhd": QKVLayout.NVTE_SBHD_SBHD_SBHD, "thd": QKVLayout.NVTE_THD_THD_THD}
UNSET = QKVFormat.NVTE_QKV_Format_NOT_SET
BOUNDS = torch.tensor([0, 4, 10])


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(form: str) -> list[Tensor]:
    before = (10,) if form == "thd" else (5, 2)
    return [_draw(*before, n, WIDTH, seed=i) for i, n in enumerate((HEADS, GROUPS, GROUPS, HEADS))]


def _forward(function: Any, form: str, *formats: Any, mask: Any = Mask.NVTE_PADDING_CAUSAL_MASK) -> list[Tensor]:
    q, k, v, _ = _inputs(form)
    bounds = BOUNDS if form == "thd" else torch.tensor([0, 5, 10])
    return function(  # type: ignore[no-any-return]
        *(0, 0, True, SCALE, 0.0, True, LAYOUTS[form], *formats, Bias.NVTE_NO_BIAS, mask),
        *(Softmax.NVTE_VANILLA_SOFTMAX, (-1, 0), False, bounds, bounds, q, k, v, q.dtype),
        *(None, None, None, None, None, None, None, None, None, 16, False, False),
    )


def _backward(function: Any, form: str, out: list[Tensor], formats: Any = (), dtype: Any = ()) -> list[Tensor]:
    q, k, v, upstream = _inputs(form)
    bounds = BOUNDS if form == "thd" else torch.tensor([0, 5, 10])
    return function(  # type: ignore[no-any-return]
        *(0, 0, SCALE, 0.0, True, LAYOUTS[form], *formats, Bias.NVTE_NO_BIAS, Mask.NVTE_PADDING_CAUSAL_MASK),
        *(Softmax.NVTE_VANILLA_SOFTMAX, (-1, 0), False, False, bounds, bounds, q, k, v, out[0], upstream, q.dtype),
        *(*dtype, [out[1]], None, None, None, None, None, False),
    )[:3]


@pytest.mark.parametrize("form", LAYOUTS)
def test_fused_attention_with_forms_of_its_outputs_is_the_same(form: str) -> None:
    own = QKVFormat[f"NVTE_{form.upper()}"]
    before = _forward(attention.fused_attn_fwd, form)
    now = _forward(NAMES["fused_attn_fwd"], form, own, UNSET)
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    expected = _backward(attention.fused_attn_bwd, form, before, dtype=(versions.DType.kFloat32,))
    formats = (own, own, LAYOUTS[form], UNSET, UNSET)
    gradients = _backward(NAMES["fused_attn_bwd"], form, now, formats)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_another_form_of_the_output_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="other_format"):
        _forward(NAMES["fused_attn_fwd"], "sbhd", QKVFormat.NVTE_BSHD, UNSET)
    out = _forward(attention.fused_attn_fwd, "sbhd")
    own = QKVFormat.NVTE_SBHD
    with pytest.raises(NotImplementedError, match="other_layout"):
        _backward(NAMES["fused_attn_bwd"], "sbhd", out, (own, own, LAYOUTS["thd"], UNSET, UNSET))


def test_parts_of_the_keys_are_added_one_after_the_other() -> None:
    """First each half on its diagonal, then the second half on the keys of the first."""
    q, k, v, _ = _inputs("thd")
    half = BOUNDS // 2
    causal, everything = Mask.NVTE_PADDING_CAUSAL_MASK, Mask.NVTE_PADDING_MASK
    places = [attention.thd_read_half_tensor(torch.arange(10)[:, None, None], BOUNDS, n).flatten() for n in (0, 1)]
    parts = [[x[rows] for x in (q, k, v)] for rows in places]

    def attend(bounds: Tensor, mask: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = attention.fused_attn_fwd(
            *(0, 0, True, SCALE, 0.0, True, LAYOUTS["thd"], Bias.NVTE_NO_BIAS, mask, Softmax.NVTE_VANILLA_SOFTMAX),
            *((-1, -1), False, bounds, bounds, *tensors, q.dtype, None, None, None, None, None),
            *(None, None, None, None, 16, False, False),
        )
        return out, lse[..., 0].t().contiguous()

    whole, lse_whole = attend(BOUNDS, causal, q, k, v)
    out, lse = torch.empty_like(q), torch.empty(HEADS, 10)
    for rows, part in zip(places, parts, strict=True):
        out[rows], lse[:, rows] = attend(half, causal, *part)
    across, lse_across = attend(half, everything, parts[1][0], *parts[0][1:])
    before = lse.clone()
    attention.thd_second_half_lse_correction(lse, lse_across, BOUNDS, True)
    NAMES["thd_out_correction"](out, across, before, lse, lse_across, BOUNDS, True, True)
    torch.testing.assert_close(lse, lse_whole, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(out, whole, rtol=0, atol=TOLERANCE)

    first, second = _draw(10, HEADS, WIDTH, seed=7), _draw(10, HEADS, WIDTH, seed=8)
    lse_first, lse_second = _draw(HEADS, 10, seed=9), _draw(HEADS, 10, seed=10)
    total = torch.logaddexp(lse_first, lse_second)
    expected = sum(x * (part - total).exp().t()[..., None] for x, part in ((first, lse_first), (second, lse_second)))
    NAMES["thd_out_correction"](first, second, lse_first, total, lse_second, BOUNDS, False, True)
    torch.testing.assert_close(first, expected, rtol=0, atol=TOLERANCE)


def test_packed_sequences_are_sorted_by_ranks_and_back() -> None:
    """Two ranks: the first has the outer chunks of each sequence, the second those in the middle."""
    bounds, x = torch.tensor([0, 4, 12]), torch.arange(24).view(12, 2)
    by_rank = NAMES["thd_sequence_order_to_cp_rank_order"](x, bounds, 2, 12)
    assert by_rank[:, 0].tolist() == [2 * n for n in (0, 3, 4, 5, 10, 11, 1, 2, 6, 7, 8, 9)]
    assert torch.equal(NAMES["thd_cp_rank_order_to_sequence_order"](by_rank, bounds, 2, 12), x)


def test_every_difference_names_a_supported_version() -> None:
    assert versions.names_of(versions.SUPPORTED[0]) == {}
    assert {difference.since for difference in versions.DIFFERENCES} <= set(versions.SUPPORTED[1:])
    names = [name for difference in versions.DIFFERENCES for name in difference.names]
    assert len(names) == len(set(names))


@pytest.mark.skipif(not available(), reason="needs Transformer Engine's Python modules: make te-env")
def test_the_installed_version_is_supported_and_gets_its_own_names() -> None:
    installed = version()
    assert installed in versions.SUPPORTED
    module = extension.build(folder() / PACKAGE / "pytorch", installed)
    own = versions.names_of(installed).get("thd_out_correction", attention.thd_out_correction)
    assert module.thd_out_correction is own
