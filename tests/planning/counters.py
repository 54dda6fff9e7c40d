"""Counters of operations, of bytes alive and of bytes sent, by torch's dispatcher."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _added_product(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def flop_counter() -> FlopCounterMode:
    """torch's own, with the CPU's attention kernel and products that are added in place, which it does not count."""
    aten = torch.ops.aten
    kernels = {
        aten.addmm_: _added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were allocated in the context and still exist, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._release, key)
        return result

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


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
