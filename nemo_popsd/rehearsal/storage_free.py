"""Floating-point tensors without storage next to real index tensors, and parameters that can be converted.

torch's fake tensors can run a full program only if no value is read. Here the values that determine control flow
(token ids, lengths, positions, agreement between ranks) are small or integers, so they stay real. A value that is read
from a tensor without storage (a loss, a norm) is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LARGE = 1 << 16
"""Number of elements from which a new floating-point tensor has no storage."""
_CONSTANT = 0.5
"""The value of every sum, norm or other scalar that is computed from tensors without storage: finite, nonzero, and
truthy."""


class StorageFree(TorchDispatchMode):
    """Runs operations on tensors without storage symbolically, and all others for real.

    The results of symbolic operations have no storage, and collectives of such tensors return at once. A tensor is
    created without storage if it is floating-point, has at least 65,536 elements and is not derived from a real tensor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self._smallest = _LARGE

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        without_memory = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if without_memory and func is torch.ops.aten._local_scalar_dense.default:
            return torch.tensor(_CONSTANT).to(args[0].dtype).item()
        if not (without_memory or (not tensors and _creates(self._smallest, args, kwargs))):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            work = dist.Work.boxed(FakeWork())
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is torch.ops.aten.masked_select.default and not isinstance(args[1], FakeTensor):
            selected = int(args[1].expand(args[0].shape).sum())
            with self._shapes:
                return args[0].new_empty(selected)
        with self._shapes:
            result = func(*args, **kwargs)
        if isinstance(result, FakeTensor) and not result.dim() and not _is_alias(func):
            return torch.full((), _CONSTANT, dtype=result.dtype)  # may be read or stacked with other numbers
        return result

    def release(self, module: nn.Module) -> None:
        """Also removes the storage of small parameters, because Megatron makes all parameters views of its buffers."""
        self._smallest = 0
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and not isinstance(parameter, FakeTensor):
                    part._parameters[name] = _like(parameter, torch.empty(parameter.shape, dtype=parameter.dtype))
        self._smallest = _LARGE


def _like(parameter: nn.Parameter, content: torch.Tensor) -> nn.Parameter:
    """A parameter with the given content and the attributes of `parameter`."""
    replacement = nn.Parameter(content, requires_grad=parameter.requires_grad)
    for key, value in vars(parameter).items():
        vars(replacement).setdefault(key, value)
    return replacement


def _is_alias(func: Any) -> bool:
    return any(returned.alias_info is not None for returned in func._schema.returns)


def _creates(smallest: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    sizes = next((argument for argument in args if isinstance(argument, (list, tuple))), ())
    return dtype.is_floating_point and math.prod(size for size in sizes if isinstance(size, int)) >= smallest


@contextmanager
def without_assigned_data() -> Iterator[None]:
    """Context in which neither torch nor Megatron assigns to `data` of a tensor without storage. torch either refuses
    such an assignment, or creates a tensor that is not storage-free.

    Casting a module replaces the parameter and keeps its attributes, in which Megatron records how it is sharded.
    """
    original: Callable[..., nn.Module] = nn.Module._apply

    def apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if not any(isinstance(parameter, FakeTensor) for parameter in self.parameters()):
            return original(self, fn, recurse)
        for module in self.modules() if recurse else (self,):
            _convert(module, fn)
        return self

    def without_base(inp: torch.Tensor, requires_grad: bool) -> torch.Tensor:
        return inp.detach().requires_grad_(requires_grad)

    with (
        mock.patch.object(nn.Module, "_apply", apply),
        mock.patch("megatron.core.utils._kernel_make_viewless_tensor", without_base),
    ):
        yield


def _convert(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                converted = fn(parameter)
            if converted.dtype != parameter.dtype:
                module._parameters[name] = _like(parameter, converted)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
