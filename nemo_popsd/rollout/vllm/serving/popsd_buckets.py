"""A bucket of weights as its receiver sees it: a file in memory, and a list of what lies in it where."""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from torch import Tensor

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def read_bucket(path: str, tensors: list[list[Any]]) -> list[tuple[str, Tensor]]:
    """Tensors over a private mapping of the file: it may be removed, they live on.

    Args:
        path: file with the bytes.
        tensors: name, dtype, shape and offset of each.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Private and writable: torch wants memory that may be written, and nobody else sees that it were.
        mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
    found = []
    for name, dtype, shape, offset in tensors:
        count = torch.Size(shape).numel()
        found.append((name, torch.frombuffer(mapping, dtype=_DTYPES[dtype], count=count, offset=offset).view(shape)))
    return found
