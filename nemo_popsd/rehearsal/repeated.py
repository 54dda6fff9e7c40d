"""Skips repeated layer calls: adds the measured cost of an equal call instead of running its operations.

All layers of a model perform the same operations, and so do micro-batches of one shape. Calls are equal if they agree
in everything that determines their operations (`_key`). The first of several equal calls runs as usual, the second is
measured, and every later one adds the operations, collectives and memory of the second. In training, a skipped layer
keeps as many bytes until its backward pass as the measured layer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nemo_popsd.rehearsal.counters import Cost, Meter, Span


@dataclass
class _Measured:
    """Measured cost of one layer call."""

    forward: Cost
    shape: torch.Size
    dtype: torch.dtype
    state: int
    """Bytes that the layer keeps until its next call."""
    holds_graph: bool = False
    """Whether the kept tensors have a graph, which keeps the gradient of an input that is a leaf."""
    backward: Cost | None = None
    """None until the backward pass has ended, and if there is none."""

    @property
    def kept(self) -> int:
        """Bytes that exist until the backward pass, without output and state."""
        return self.forward.left - self.shape.numel() * self.dtype.itemsize - self.state


@contextmanager
def repeated_layers(meter: Meter, *, overlap: bool) -> Iterator[None]:
    """Context in which equal layer calls run twice.

    Args:
        meter: measures the calls.
        overlap: whether the backward pass of a layer may reduce gradients of other layers. Training then runs every
            call.
    """
    repeated = _Repeated(meter, overlap)
    call = TransformerLayer.__call__

    def called(layer: nn.Module, *args: Any, **options: Any) -> Any:
        return repeated(call, layer, args, options)

    with mock.patch.object(TransformerLayer, "__call__", called):
        yield


class _Repeated:
    def __init__(self, meter: Meter, overlap: bool) -> None:
        self._meter = meter
        self._overlap = overlap
        self._calls: Counter[Hashable] = Counter()
        self._measured: dict[Hashable, _Measured] = {}
        self._backward: tuple[_Measured, Span] | None = None
        self._initial: dict[object, dict[str, Any]] = {}
        self._states: dict[nn.Module, tuple[Tensor, ...]] = {}

    def __call__(self, call: Callable[..., Any], layer: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        self._forget(layer)
        hidden: Any = options.get("hidden_states")
        key = None if args or not isinstance(hidden, FakeTensor) else self._key(layer, options, hidden)
        if key is None:
            return call(layer, *args, **options)
        self._calls[key] += 1
        found = self._measured.get(key)
        if found is not None and not (torch.is_grad_enabled() and found.backward is None):
            return self._again(found, layer, hidden), None
        if self._calls[key] != 2:
            return call(layer, **options)
        return self._measure(key, call, layer, hidden, options)

    def _forget(self, layer: nn.Module) -> None:
        """Frees the tensors that dispatchers keep from their last call, because the next call replaces them."""
        self._states.pop(layer, None)
        for dispatcher in _dispatchers(layer):
            initial = self._initial.setdefault(dispatcher, dict(vars(dispatcher)))
            vars(dispatcher).clear()
            vars(dispatcher).update(initial)

    def _held(self, layer: nn.Module) -> list[Tensor]:
        """Tensors that dispatchers keep from their last call."""
        return [
            value
            for dispatcher in _dispatchers(layer)
            for name, value in vars(dispatcher).items()
            if isinstance(value, Tensor) and value is not self._initial[dispatcher].get(name)
        ]

    def _key(self, layer: nn.Module, options: dict[str, Any], hidden: Tensor) -> Hashable | None:
        """None if the call must run."""
        training = torch.is_grad_enabled()
        if training and (self._overlap or not hidden.requires_grad):
            return None
        modules = list(layer.modules())
        if any(module._forward_pre_hooks or module._forward_hooks for module in modules):
            return None
        inputs = tuple((name, _described(value)) for name, value in options.items())
        return training, inputs, tuple(_signature(module) for module in modules)

    def _measure(
        self, key: Hashable, call: Callable[..., Any], layer: nn.Module, hidden: Tensor, options: dict[str, Any]
    ) -> Any:
        span = self._meter.begin()
        output, context = call(layer, **options)
        cost = self._meter.end(span)
        if context is not None or not isinstance(output, FakeTensor) or not _is_whole(output):
            return output, context
        held = self._held(layer)
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
        measured = _Measured(cost, output.shape, output.dtype, sum(storages.values()))
        measured.holds_graph = any(tensor.grad_fn is not None for tensor in held)
        if torch.is_grad_enabled():
            output.register_hook(lambda gradient: self._begin_backward(measured))
            hidden.register_hook(lambda gradient: self._end_backward())
        else:
            measured.state += measured.kept  # of small tensors, which kept views refer to
        self._measured[key] = measured
        return output, context

    def _begin_backward(self, measured: _Measured) -> None:
        self._end_backward()  # of the next layer, whose input gradient is complete
        self._backward = measured, self._meter.begin()

    def _end_backward(self) -> None:
        if self._backward is not None:
            measured, span = self._backward
            measured.backward, self._backward = self._meter.end(span), None

    def _again(self, measured: _Measured, layer: nn.Module, hidden: Tensor) -> Tensor:
        held = (hidden,) if measured.holds_graph and hidden.is_leaf else ()
        if torch.is_grad_enabled():
            trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            output: Tensor = _Again.apply(self._meter, measured, hidden, *trained)  # type: ignore[no-untyped-call]
        else:
            self._meter.repeat(measured.forward)
            output = hidden.new_empty(measured.shape, dtype=measured.dtype)
        self._states[layer] = (hidden.new_empty(measured.state, dtype=torch.uint8), *held)
        return output


class _Again(torch.autograd.Function):
    """A skipped layer, with the measured cost and with gradients of the input and of all trained parameters."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, measured: _Measured, hidden: Tensor, *trained: Tensor) -> Tensor:
        """Adds the cost of the forward pass."""
        meter.repeat(measured.forward)
        ctx.save_for_backward(hidden, *trained)
        ctx.meter, ctx.measured = meter, measured
        ctx.kept = hidden.new_empty(measured.kept, dtype=torch.uint8)
        return hidden.new_empty(measured.shape, dtype=measured.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the cost of the backward pass. Gradients of parameters are allocated when they are accumulated."""
        ctx.meter.repeat(ctx.measured.backward)
        ctx.kept = None
        hidden, *trained = ctx.saved_tensors
        return None, None, torch.empty_like(hidden), *(each.new_empty(1).expand(each.shape) for each in trained)


def _dispatchers(layer: nn.Module) -> list[Any]:
    found = (getattr(module, "token_dispatcher", None) for module in layer.modules())
    return [dispatcher for dispatcher in found if dispatcher is not None]


def _is_whole(tensor: Tensor) -> bool:
    """Whether the tensor is contiguous and is alone in its storage."""
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return own and tensor.is_contiguous() and tensor._base is None


def _described(value: Any) -> Hashable:
    """The properties of an argument that determine the operations; for index tensors also the values."""
    if isinstance(value, Tensor):
        order = None if value.is_contiguous() else value.stride()
        fields = (tuple(value.shape), order, value.dtype, value.requires_grad and torch.is_grad_enabled())
        indices = not isinstance(value, FakeTensor) and not value.is_floating_point()
        return (*fields, repr(value.tolist())) if indices else fields
    if isinstance(value, (tuple, list)):
        return tuple(_described(item) for item in value)
    if dataclasses.is_dataclass(value):
        return tuple((field.name, _described(getattr(value, field.name))) for field in dataclasses.fields(value))
    assert isinstance(value, Hashable)
    return value


def _signature(module: nn.Module) -> Hashable:
    """Type, plain attributes and parameters of a module. The layer number counts only if a list of the configuration
    distinguishes layers.
    """
    listed = getattr(getattr(module, "config", None), "no_rope_freq", None)
    plain = tuple(
        (name, value) for name, value in vars(module).items() if _is_plain(value) and (listed or name != "layer_number")
    )
    parameters = tuple(
        (each.shape, each.dtype, each.requires_grad) for each in module._parameters.values() if each is not None
    )
    return type(module), plain, parameters


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float))
