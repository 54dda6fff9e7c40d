"""A counter of bytes sent, by torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SentBytes(TorchDispatchMode):
    """Bytes that each rank of a ring of `size` ranks sends in the collectives of the context, by collective."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._share = (size - 1) / size
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::")
            tensors = [t for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)  # of the result: for a gather, all of it
            passes = 2 if "allreduce" in kind else 1
            self.bytes[kind] = self.bytes.get(kind, 0.0) + passes * size * self._share
        return func(*args, **(kwargs or {}))
