"""Reads a bucket of weights: a file in memory and the list of the tensors in it."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from popsd_wire import Tensors

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def read_bucket(path: str, tensors: Tensors) -> list[tuple[str, Tensor]]:
    """Tensors in a private mapping of the file, which stays valid when the file is removed.

    Args:
        path: of the file.
        tensors: name, dtype, shape and offset of each.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Writable, because torch requires it; private, so that no other process would see a write.
        mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    result = []
    for name, dtype, shape, offset in tensors:
        count = torch.Size(shape).numel()
        result.append((name, torch.frombuffer(mapping, dtype=_DTYPES[dtype], count=count, offset=offset).view(shape)))
    return result
