"""Parameters that are kept in host memory, and are on the device only while in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HostParameters:
    """Frozen parameters, kept in pinned host memory (ordinary memory without CUDA).

    Outside `on_device` each parameter is empty, shape [0], so it needs no device memory and using it fails. The values
    never change and are never copied back: each copy to the device has the same bits.
    """

    @torch.no_grad()
    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the parameters to the host and frees their device memory.

        Args:
            parameters: parameters without gradients; one that appears twice (a tied matrix) is kept once.
        """
        self._parameters = list(dict.fromkeys(parameters))
        assert not any(parameter.requires_grad for parameter in self._parameters)
        self._device = [parameter.device for parameter in self._parameters]
        self._host: list[Tensor] = []
        self._uses = 0
        for parameter in self._parameters:
            host = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
            self._host.append(host.copy_(parameter))
            _empty(parameter)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters on the host and, within `on_device`, also on the device."""
        return sum(host.numel() * host.element_size() for host in self._host)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Context in which the parameters are on the device: one copy of `bytes` from the host, none back. May be
        nested.

        The copies are queued on the current CUDA stream; kernels that are queued later wait for them, the host does
        not.
        """
        if self._uses == 0:
            with torch.no_grad():
                for parameter, host, device in zip(self._parameters, self._host, self._device, strict=True):
                    parameter.data = torch.empty_like(host, device=device).copy_(host, non_blocking=True)
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                for parameter in self._parameters:
                    _empty(parameter)


def _empty(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.new_empty(0)
