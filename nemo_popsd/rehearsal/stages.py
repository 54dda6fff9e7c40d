"""Runs a pipeline stage without its neighbours: supplies the shapes that they would send, and tracks freed outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nemo_popsd.megatron import forward
from nemo_popsd.megatron.microbatches import MicroBatch

Shape = list[int]


class _Expected:
    """Shapes of the hidden states that a stage receives in one run of the schedule, in the schedule's order."""

    def __init__(self) -> None:
        self._forward: deque[Shape] = deque()
        self._backward: deque[Shape] = deque()

    def set(self, config: Any, batches: Sequence[MicroBatch]) -> None:
        """Sets the shapes for `batches`: a stage receives each input, [S/(cp·sp), b, H], and its gradient once."""
        spread = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shapes = [[b.input_ids.shape[1] // spread, b.input_ids.shape[0], config.hidden_size] for b in batches]
        self._forward, self._backward = deque(shapes), deque(shapes)

    def next(self, *, forward: bool, backward: bool) -> tuple[Shape, Shape]:
        """Shapes of the next inputs from the previous and from the next stage; zeros if none is received."""
        return (
            self._forward.popleft() if forward else [0, 0, 0],
            self._backward.popleft() if backward else [0, 0, 0],
        )


@contextmanager
def lone_stage(released: Callable[[Tensor], None]) -> Iterator[None]:
    """Context in which Megatron's pipeline schedules run on one stage.

    A stage receives the shape of an input as three integers from its neighbour. The sends run as usual; the received
    integers are replaced by the shape of the next micro-batch in the schedule, which the neighbour would send. Megatron
    frees an output by assigning to its `data`, which tensors without storage do not support.

    Args:
        released: called with each output whose memory Megatron frees.
    """
    expected = _Expected()
    run_schedule, exchange = forward._run_schedule, P2PCommunicator._communicate_shapes
    backward = schedules.custom_backward

    def recorded(chunks: Sequence[Any], batches: Sequence[MicroBatch], *args: Any, **options: Any) -> list[object]:
        expected.set(forward._bare(chunks[0]).config, batches)
        return run_schedule(chunks, batches, *args, **options)

    def exchanged(
        self: Any, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape, Shape]:
        exchange(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        return expected.next(forward=recv_prev, backward=recv_next)

    def release(out: Tensor | list[Tensor] | None, deallocate_pipeline_outputs: bool = False) -> None:
        if out is None or not deallocate_pipeline_outputs:
            return
        for tensor in out if isinstance(out, list) else [out]:
            assert tensor._base is None, "a view of another tensor"
            released(tensor)

    def run_backward(output: Tensor, grad_output: Tensor | None) -> None:
        if isinstance(output, FakeTensor) and output.numel() > 1:
            torch.autograd.backward((output,), (grad_output,))
        else:
            backward(output, grad_output)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(forward, "_run_schedule", recorded))
        stack.enter_context(mock.patch.object(P2PCommunicator, "_communicate_shapes", exchanged))
        stack.enter_context(mock.patch.object(schedules, "deallocate_output_tensor", release))
        stack.enter_context(mock.patch.object(schedules, "custom_backward", run_backward))
        yield
