"""A view of torch in which the CUDA device is the CPU, bound to the name ``torch`` in adapted library modules.

torch itself is not changed; `nemo_popsd.runtime.cpu` lists the adapted modules.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch

_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps a tensor factory so that ``device="cuda"`` means the CPU."""

    def create(*args: object, **kwargs: object) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


class _NoStream:
    """A CUDA stream and event on the CPU, where every operation completes before its call returns."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None: ...


class _CudaOnCpu(types.ModuleType):
    """``torch.cuda`` for Megatron: a single device, the CPU, with the CPU's generator."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.current_device = lambda: torch.device("cpu")
        self.synchronize = lambda *_: None
        self.get_rng_state = lambda *_: torch.get_rng_state()
        self.manual_seed = torch.manual_seed
        stream = _NoStream()
        self.Stream = self.current_stream = lambda: stream
        self.stream = lambda stream: stream

    def __getattr__(self, name: str) -> object:
        return getattr(torch.cuda, name)


class _TorchOnCpu(types.ModuleType):
    """``torch`` for Megatron: torch's own attributes, except for CUDA devices."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _without_cuda(getattr(torch, name)))

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


TORCH_ON_CPU = _TorchOnCpu()
"""The view that is bound to the name ``torch`` in adapted modules."""
