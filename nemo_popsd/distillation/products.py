"""Products of hidden states and output matrices, in buffers shared by all chunks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_popsd.distillation.target import HiddenPair

# Rows start at multiples of this, so that each branch's part of a buffer is aligned for vector loads in every dtype.
_ALIGNMENT = 8
_ROUNDED_ROWS = 256


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or float64 for a float64 matrix."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices have the same elements in the same memory."""
    return (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Writes a @ b to `out`. A CPU first rounds it to the dtype of the inputs; a GPU does not."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        for rows in range(0, a.shape[0], _ROUNDED_ROWS):
            out[rows : rows + _ROUNDED_ROWS] = torch.mm(a[rows : rows + _ROUNDED_ROWS], b)


def add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Adds scale · a @ b to `total`, in the dtype of `total` and without a second tensor of its size."""
    if a.dtype != total.dtype and total.is_cuda:
        torch.addmm(total, a, b.to(a.dtype), alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=scale)


class SampledStates(NamedTuple):
    """States of the sampled tokens in addition to the vectors of their target; see `decomposition`."""

    privileged: Tensor
    """h_T [D, H]."""
    reference: Tensor | None
    """h_ref [D, H]; None if the target has a shift, since then W·h_ref = W·h_T - W·d."""


class ChunkProducts(NamedTuple):
    """Products of one chunk's tokens, in the dtype of the statistics; overwritten by the next chunk."""

    student: Tensor
    """W_s·h [C, V]."""
    anchor: Tensor | None
    """W·anchor [C, V]."""
    shift: Tensor | None
    """W·d [C, V]."""
    sampled_privileged: Tensor | None
    """W·h_T [D, V] of the chunk's sampled tokens."""
    sampled_reference: Tensor | None
    """W·h_ref [D, V]."""


class Products:
    """The products of one chunk of tokens at a time.

    If student and frozen branches share one matrix, a chunk needs a single product of their stacked states; otherwise
    one per vector, and the sampled states are part of the last one. All products have the same precision and, for equal
    states, the same bits, so the loss is exactly 0 if the student equals the target.

    Memory: one [C, V] buffer for each vector and at most one for each of the sampled states.
    """

    def __init__(
        self,
        student_NH: Tensor,
        student_VH: Tensor,
        vectors: HiddenPair,
        teacher_VH: Tensor,
        sampled: SampledStates | None,
        *,
        chunk_tokens: int,
        sampled_tokens: int,
    ) -> None:
        """Allocates the buffers.

        Args:
            student_NH: states of all tokens.
            student_VH: shard of the live matrix, without padding.
            vectors: vectors of the target for all tokens; at least one is not None.
            teacher_VH: shard of the frozen matrix, without padding.
            sampled: additional states of the sampled tokens.
            chunk_tokens: maximum number of tokens of a chunk.
            sampled_tokens: maximum number of sampled tokens of a chunk.
        """
        self._student, self._student_weight = student_NH, student_VH
        self._vectors, self._teacher_weight = vectors, teacher_VH
        self._frozen = [x for x in vectors if x is not None]
        self._sampled = [] if sampled is None else [x for x in sampled if x is not None]
        self.stacked = share_storage(student_VH, teacher_VH)
        rows = (1 + len(self._frozen)) * _aligned(chunk_tokens) + len(self._sampled) * _aligned(sampled_tokens)
        dtype = statistics_dtype(student_VH)
        self._products = student_NH.new_empty(rows, student_VH.shape[0], dtype=dtype)
        # Zeros, since the product includes the rows between the parts.
        self._states = student_NH.new_zeros(rows, student_NH.shape[1], dtype=teacher_VH.dtype)

    def __call__(self, chunk: slice, sampled: slice) -> ChunkProducts:
        """The products of the tokens in `chunk`, and of the entries in `sampled` of the sampled states."""
        tokens, width = _length(chunk), _aligned(_length(chunk))
        frozen = [slice((1 + i) * width, (1 + i) * width + tokens) for i in range(len(self._frozen))]
        for rows, states in zip(frozen, self._frozen, strict=True):
            self._states[rows] = states[chunk]
        end = (1 + len(frozen)) * width
        samples = []
        for states in self._sampled:
            samples.append(slice(end, end + _length(sampled)))
            self._states[samples[-1]] = states[sampled]
            end += _aligned(_length(sampled))
        if self.stacked:
            self._states[:tokens] = self._student[chunk]
            self._multiply(slice(0, end))
        else:
            live = self._student[chunk].to(self._student_weight.dtype)
            product_into(self._products[:tokens], live, self._student_weight.t())
            for rows in frozen[:-1]:
                self._multiply(rows)
            self._multiply(slice(frozen[-1].start, end if samples else frozen[-1].stop))
        vector_products = [self._products[rows] for rows in frozen]
        sample_products = [self._products[rows] for rows in samples]
        return ChunkProducts(
            student=self._products[:tokens],
            anchor=None if self._vectors.anchor is None else vector_products[0],
            shift=None if self._vectors.shift is None else vector_products[-1],
            sampled_privileged=sample_products[0] if sample_products else None,
            sampled_reference=sample_products[1] if len(sample_products) > 1 else None,
        )

    def rounded_shift(self, tokens: int) -> Tensor:
        """The shift [C, H], rounded as in the last chunk's product."""
        start = len(self._frozen) * _aligned(tokens)
        return self._states[start : start + tokens]

    def _multiply(self, rows: slice) -> None:
        product_into(self._products[rows], self._states[rows], self._teacher_weight.t())


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)


def _aligned(rows: int) -> int:
    return math.ceil(rows / _ALIGNMENT) * _ALIGNMENT
