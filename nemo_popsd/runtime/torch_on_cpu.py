"""A view of torch in which CUDA is the CPU, to which adapted library modules bind the name ``torch``.

torch itself is not changed; `nemo_popsd.runtime.cpu` lists the modules that get the view.
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
    """A stream, and an event of it, whose work is complete when a call returns."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None: ...


class _CudaOnCpu(types.ModuleType):
    """``torch.cuda`` for Megatron: one device, the CPU, with the generator of the CPU."""

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
    """``torch`` for Megatron: the same as torch, except for CUDA devices."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _without_cuda(getattr(torch, name)))

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


TORCH_ON_CPU = _TorchOnCpu()
"""The view to which adapted modules bind the name ``torch``."""
