"""Differences between the versions of Transformer Engine that the emulation supports.

`kernels` and `attention` have the signatures of 2.12, the oldest one. A `Difference` replaces or adds names of the
extension from its version on.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tests.te import attention
from tests.te.kernels import DType, refuse

Version: TypeAlias = tuple[int, int]

SUPPORTED: tuple[Version, ...] = ((2, 12), (2, 20))
"""Major and minor versions whose modules the tests run on."""


@dataclass(frozen=True)
class Difference:
    """Names of the extension that a later version adds or changes.

    Attributes:
        since: the oldest supported version that has them.
        reason: what changed.
        names: the replacements in the extension.
    """

    since: Version
    reason: str
    names: dict[str, Any]


def names_of(version: Version) -> dict[str, Any]:
    """Names of the extension of `version` in addition to, or in place of, those of the oldest one."""
    names: dict[str, Any] = {}
    for difference in DIFFERENCES:
        if difference.since <= version:
            names |= difference.names
    return names


def _formats_of(layout: Any, *formats: Any) -> None:
    """Refuses output or gradients in another form than that of the inputs; they are never in fp8."""
    own = attention.QKVFormat[f"NVTE_{attention.form_of(layout).upper()}"]
    unset = attention.QKVFormat.NVTE_QKV_Format_NOT_SET
    refuse("fused attention", other_format=any(form not in (own, unset) for form in formats))


def _fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    before, (layout, output, scales), after = arguments[:6], arguments[6:9], arguments[9:]
    _formats_of(layout, output, scales)
    return attention.fused_attn_fwd(*before, layout, *after)


def _fused_attn_bwd(*arguments: Any) -> list[Tensor | None]:
    before, layout, after = arguments[:5], arguments[5], arguments[11:]
    output, upstream, gradients, scales, upstream_scales = arguments[6:11]
    _formats_of(layout, output, upstream, scales, upstream_scales)
    refuse("fused_attn_bwd", other_layout=gradients != layout)
    inputs, rest = after[:13], after[13:]
    return attention.fused_attn_bwd(*before, layout, *inputs, DType.kFloat32, *rest)


def _fused_attn_backend(parameters: Any) -> tuple[Any, str]:
    return _Backend.NVTE_F16_arbitrary_seqlen, ""


def _thd_out_correction(
    out: Tensor,
    part: Tensor,
    lse_before: Tensor,
    lse: Tensor,
    lse_part: Tensor,
    bounds: Tensor,
    second_half: bool,
    packed: bool,
) -> None:
    """Rescales what earlier parts of the keys contributed, then adds this part; [t, n, d] and [n, t]."""
    rows = attention.rows_of(bounds, second_half)
    flat = out.view(-1, *part.shape[-2:])
    kept = torch.exp(lse_before[:, rows] - lse[:, rows]).t()[..., None]
    flat[rows] = (flat[rows] * kept).to(out.dtype)
    attention.thd_out_correction(out, part, lse, lse_part, bounds, second_half, packed)


def _places_by_rank(bounds: Tensor, ranks: int, total: int) -> Tensor:
    """Places of all tokens [t], rank after rank, of which each has two of the 2·cp chunks of every sequence."""
    refuse("order of ranks", tokens_outside_of_sequences=int(bounds[-1]) != total)
    chunks = [torch.arange(begin, end).tensor_split(2 * ranks) for begin, end in pairwise(bounds.tolist())]
    return torch.cat([parts[n] for rank in range(ranks) for parts in chunks for n in (rank, 2 * ranks - 1 - rank)])


def _to_order_of_ranks(x: Tensor, bounds: Tensor, ranks: int, total: int) -> Tensor:
    return x[_places_by_rank(bounds, ranks, total)]


def _to_order_of_sequences(x: Tensor, bounds: Tensor, ranks: int, total: int) -> Tensor:
    return x[_places_by_rank(bounds, ranks, total).argsort()]


def _enumeration(name: str, members: Sequence[str], first: int = 0) -> Any:
    return enum.IntEnum(name, {member: first + number for number, member in enumerate(members)})


_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
)

DIFFERENCES = (
    Difference(
        (2, 20),
        "fused attention takes the forms of output and gradients, and gradients have the type of the inputs",
        {"fused_attn_fwd": _fused_attn_fwd, "fused_attn_bwd": _fused_attn_bwd},
    ),
    Difference(
        (2, 20),
        "the choice of a back end takes one object, returns a reason too, and has no kernel for short sequences",
        {"get_fused_attn_backend": _fused_attn_backend, "NVTE_Fused_Attn_Backend": _Backend},
    ),
    Difference(
        (2, 20),
        "parts of the keys are added as they come: the sum before is rescaled",
        {"thd_out_correction": _thd_out_correction},
    ),
    Difference(
        (2, 20),
        "kernels sort packed sequences by ranks of context parallelism, and back",
        {
            "thd_sequence_order_to_cp_rank_order": _to_order_of_ranks,
            "thd_cp_rank_order_to_sequence_order": _to_order_of_sequences,
        },
    ),
    Difference(
        (2, 20),
        "enumerations that modules read when they are imported",
        {
            "NVTEScalingMode": _enumeration(
                "NVTEScalingMode",
                [
                    *("NVTE_DELAYED_TENSOR_SCALING", "NVTE_MXFP8_1D_SCALING", "NVTE_BLOCK_SCALING_1D"),
                    *("NVTE_BLOCK_SCALING_2D", "NVTE_NVFP4_1D_SCALING"),
                ],
            ),
            "NVTERoutingMapFormat": _enumeration("NVTERoutingMapFormat", ["BYTEMAP", "BITMAP_U8"]),
            "NVTEQBHistogramMode": _enumeration("NVTEQBHistogramMode", ["TWO_KERNEL", "FUSED_ATOMIC"]),
        },
    ),
)
"""In the order of application."""
