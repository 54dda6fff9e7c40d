"""Faults to plant in a training step, so that tests show that they would be detected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _gather_that_sums() -> None:
    """Sequence parallelism: the gather's backward sums over the group, as Megatron's default does."""
    from megatron.core import parallel_state

    from nemo_popsd.megatron import response_routing

    right = response_routing._GatherSlices.backward

    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        return right(ctx, gradient)

    _replace_backward(response_routing._GatherSlices, backward)


def _exchange_that_stays() -> None:
    """Context parallelism: the backward of the exchange keeps the local rows and sends no rows back."""
    from nemo_popsd.megatron import response_routing

    def backward(ctx: Any, gradient: Tensor) -> Any:
        send_counts, receive_counts = ctx.counts
        rank = ctx.group.rank()
        result = gradient.new_zeros(sum(send_counts), gradient.shape[1])
        mine = gradient.split(receive_counts)[rank]
        result[sum(send_counts[:rank]) : sum(send_counts[: rank + 1])] = mine
        return result, None, None, None

    _replace_backward(response_routing._Exchange, backward)


def _replace_backward(function: Any, backward: Callable[..., Any]) -> None:
    function.backward = staticmethod(backward)


def _mean_over_context() -> None:
    """Context parallelism: the scale ignores that Megatron multiplies by the size of the context-parallel group."""
    from nemo_popsd.megatron import forward

    right = forward.parallel_state.get_data_parallel_world_size
    forward.parallel_state = SimpleNamespace(  # type: ignore[attr-defined]
        get_data_parallel_world_size=lambda **_: right(with_context_parallel=True)
    )


def _embedding_of_one_stage() -> None:
    """Pipeline: the flag that controls the reduction of tied embeddings is False during the schedule."""
    from nemo_popsd.megatron import optimizer

    right = optimizer.finalize_model_grads

    def finalize(chunks: Any, *arguments: Any, **options: Any) -> None:
        for chunk in chunks:
            chunk.module.share_embeddings_and_output_weights = False
        right(chunks, *arguments, **options)
        for chunk in chunks:
            chunk.module.share_embeddings_and_output_weights = True

    optimizer.finalize_model_grads = finalize  # type: ignore[attr-defined]


def _norm_output_without_gradient() -> None:
    """Sequence parallelism with Transformer Engine: adapters use the norm output of the layer, as in Bridge."""
    from nemo_popsd.megatron import adapters

    adapters.gather_in_adapters = lambda chunks: None  # type: ignore[assignment]


def _slowest_network() -> None:
    """No fault: a reduction or gather that overlaps with compute is delayed until something waits for it."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    def lazy(name: str, handle: str, flag: str) -> None:
        right = getattr(Group, name)

        def start(group: Any, *arguments: Any, **options: Any) -> None:
            if group.is_first_batch and name == "start_grad_sync" and group.grad_reduce_handle is not None:
                return
            if not getattr(group.ddp_config, flag) or options.get("force_sync"):
                right(group, *arguments, **options)
                return

            def wait() -> None:
                setattr(group, handle, None)
                setattr(group.ddp_config, flag, False)
                right(group, *arguments, **options)
                setattr(group.ddp_config, flag, True)

            setattr(group, handle, SimpleNamespace(wait=wait))
            if name == "start_param_sync":
                group.param_gather_dispatched = True

        setattr(Group, name, start)

    lazy("start_grad_sync", "grad_reduce_handle", "overlap_grad_reduce")
    lazy("start_param_sync", "param_gather_handle", "overlap_param_gather")


def _nobody_waits_for_gradients() -> None:
    """Overlap: the update does not wait for the reductions that the backward pass started."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    _slowest_network()

    def finish(group: Any, *_: Any, **__: Any) -> None:
        group.param_gather_dispatched = False
        group.grad_reduce_handle = None

    Group.finish_grad_sync = finish


def _nobody_waits_for_weights() -> None:
    """Overlap: the forward pass does not wait for the all-gather of the weights."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    _slowest_network()

    def finish(group: Any, *_: Any, **__: Any) -> None:
        group.param_gather_handle = None

    Group.finish_param_sync = finish


def _output_matrix_not_awaited() -> None:
    """Overlap: the loss, which reads the output matrix without its module, does not wait for it."""
    from nemo_popsd.megatron import forward

    _slowest_network()
    forward._await_output_weight = lambda chunk: None  # type: ignore[assignment]


def _last_weights_not_gathered() -> None:
    """Overlap: the weights of the last update of a step are also gathered only in the next forward pass."""
    from nemo_popsd.megatron.optimizer import StudentOptimizer

    right = StudentOptimizer.step

    def step(optimizer: Any, *arguments: Any) -> None:
        optimizer.update_follows = True
        right(optimizer, *arguments)

    StudentOptimizer.step = step  # type: ignore[method-assign]


def _slowest_pipeline() -> None:
    """No fault: data that a stage receives from another stage is 0 until something waits for it."""
    from megatron.core.pipeline_parallel import p2p_communication

    right = p2p_communication._p2p_ops

    def exchange(**options: Any) -> dict[str, Any]:
        names = [name for name in ("recv_prev", "recv_next") if options[f"tensor_{name}"] is not None]
        arrived = {name: torch.empty_like(options[f"tensor_{name}"]) for name in names}
        requests = right(**{**options, **{f"tensor_{name}": tensor for name, tensor in arrived.items()}})
        for name in names:
            requests[name] = _late(requests[name], options[f"tensor_{name}"], arrived[name])
        return requests

    p2p_communication._p2p_ops = exchange


def _late(request: Any, target: Tensor, arrived: Tensor) -> Any:
    def wait() -> None:
        request.wait()
        target.detach().copy_(arrived)

    target.detach().zero_()
    return SimpleNamespace(wait=wait)


def _nobody_waits_for(received: str) -> None:
    """Overlap: a stage computes without waiting for data from the previous or next stage."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    _slowest_pipeline()
    right = P2PCommunicator._communicate

    def communicate(*arguments: Any, wait_on_reqs: bool = True, **options: Any) -> Any:
        *tensors, requests = right(*arguments, wait_on_reqs=wait_on_reqs, **options)
        if requests and received in requests:
            _PENDING.append(requests[received])
            requests[received] = SimpleNamespace(wait=lambda: None)
        return *tensors, requests

    P2PCommunicator._communicate = communicate


_PENDING: list[Any] = []
"""Transfers without a wait; gloo needs these objects until the transfers end."""

FAULTS: dict[str, Callable[[], None]] = {
    "gather that sums": _gather_that_sums,
    "exchange that stays": _exchange_that_stays,
    "mean over context": _mean_over_context,
    "embedding of one stage": _embedding_of_one_stage,
    "norm output without gradient": _norm_output_without_gradient,
    "slowest network": _slowest_network,
    "nobody waits for gradients": _nobody_waits_for_gradients,
    "nobody waits for weights": _nobody_waits_for_weights,
    "output matrix not awaited": _output_matrix_not_awaited,
    "last weights not gathered": _last_weights_not_gathered,
    "slowest pipeline": _slowest_pipeline,
    "nobody waits for states": partial(_nobody_waits_for, "recv_prev"),
    "nobody waits for gradients of states": partial(_nobody_waits_for, "recv_next"),
}
"""Faults by name. Each leaves the loss of the first step unchanged and changes gradients or weights. Exceptions: the
slowest network and pipeline change nothing; states without a wait change the loss.
"""
