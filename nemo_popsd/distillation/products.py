"""Products of hidden states with output matrices, in buffers that all chunks of tokens share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Rows start at multiples of this, so that each branch's part of a buffer is aligned for vector loads in every dtype.
_ALIGNMENT = 8
_ROUNDED_ROWS = 256


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or float64 for a float64 matrix."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices are the same numbers in the same memory."""
    return (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Put a @ b into `out`: rounded to the inputs' precision first only where the device offers no better."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        for rows in range(0, a.shape[0], _ROUNDED_ROWS):
            out[rows : rows + _ROUNDED_ROWS] = torch.mm(a[rows : rows + _ROUNDED_ROWS], b)


def add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add scale · a @ b to `total`, summed in the dtype of `total` and with no tensor of its size beside it."""
    if a.dtype != total.dtype and total.is_cuda:
        torch.addmm(total, a, b.to(a.dtype), alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=scale)


class ChunkProducts(NamedTuple):
    """W·h of one chunk's tokens, in the dtype of the statistics; overwritten by the next chunk's."""

    student: Tensor
    """[C, V]."""
    frozen: dict[str, Tensor]
    """[C, V] each, by the names given."""
    sample: dict[str, Tensor]
    """[D, V] each, by the names given: D of the chunk's tokens."""


class Products:
    """All products of one chunk of tokens after the other.

    Where student and frozen branches share one matrix, a chunk takes a single product of their stacked states;
    otherwise one for each branch, with the sample's rows on top of the last. All have the same precision and, for
    equal states, the same bits: hence a loss of exactly 0 where the student is the target.

    Memory: one [C, V] buffer for each branch and one of at most [C, V] for each of the sample's.
    """

    def __init__(
        self,
        student_NH: Tensor,
        student_VH: Tensor,
        frozen_NH: Mapping[str, Tensor],
        teacher_VH: Tensor,
        sample_DH: Mapping[str, Tensor],
        *,
        chunk_tokens: int,
        sampled_tokens: int,
    ) -> None:
        """Makes the buffers.

        Args:
            student_NH: states of all tokens.
            student_VH: true rows of the live matrix.
            frozen_NH: states of the frozen branches, at least one, by name.
            teacher_VH: true rows of the frozen matrix.
            sample_DH: further states of some tokens, by name.
            chunk_tokens: most tokens of a chunk.
            sampled_tokens: most sampled tokens of a chunk.
        """
        self._student, self._student_weight = student_NH, student_VH
        self._frozen, self._teacher_weight = frozen_NH, teacher_VH
        self._sample = sample_DH
        self.stacked = share_storage(student_VH, teacher_VH)
        rows = (1 + len(frozen_NH)) * _aligned(chunk_tokens) + len(sample_DH) * _aligned(sampled_tokens)
        dtype = statistics_dtype(student_VH)
        self._products = student_NH.new_empty(rows, student_VH.shape[0], dtype=dtype)
        # Zeros, since rows between the parts go through the product too.
        self._states = student_NH.new_zeros(rows, student_NH.shape[1], dtype=teacher_VH.dtype)

    def __call__(self, chunk: slice, sampled: slice) -> ChunkProducts:
        """The products of tokens `chunk`, and of rows `sampled` of the sample's states."""
        tokens, width = _length(chunk), _aligned(_length(chunk))
        names = list(self._frozen)
        starts = {name: (1 + position) * width for position, name in enumerate(names)}
        for name, start in starts.items():
            self._states[start : start + tokens] = self._frozen[name][chunk]
        end = (1 + len(names)) * width
        samples: dict[str, slice] = {}
        for name, states in self._sample.items():
            samples[name] = slice(end, end + _length(sampled))
            self._states[samples[name]] = states[sampled]
            end += _aligned(_length(sampled))
        if self.stacked:
            self._states[:tokens] = self._student[chunk]
            self._multiply(slice(0, end))
        else:
            live = self._student[chunk].to(self._student_weight.dtype)
            product_into(self._products[:tokens], live, self._student_weight.t())
            for name in names:
                self._multiply(slice(starts[name], starts[name] + tokens if name != names[-1] or not samples else end))
        return ChunkProducts(
            self._products[:tokens],
            {name: self._products[start : start + tokens] for name, start in starts.items()},
            {name: self._products[rows] for name, rows in samples.items()},
        )

    def rounded_states(self, name: str, tokens: int) -> Tensor:
        """States of frozen branch `name` as they went into the last chunk's product: [C, H]."""
        start = (1 + list(self._frozen).index(name)) * _aligned(tokens)
        return self._states[start : start + tokens]

    def _multiply(self, rows: slice) -> None:
        product_into(self._products[rows], self._states[rows], self._teacher_weight.t())


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)


def _aligned(rows: int) -> int:
    return math.ceil(rows / _ALIGNMENT) * _ALIGNMENT
