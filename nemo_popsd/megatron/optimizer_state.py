"""The per-parameter state of Megatron's optimizers in one form for every optimizer and sharding.

megatron-core 0.16.1 saves the state of its distributed optimizer in formats that load only in the same layout, or that
fail without Transformer Engine (`megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict`). Here the
state is read one parameter at a time: every data-parallel rank has the full state, or one range of the flattened
parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from nemo_popsd.megatron.interfaces import AnyOptimizer, OptimizerPart

MAIN = "param"
"""Name of the fp32 main weights, which exist if the weights themselves are not fp32."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """Optimizer state of one parameter on this rank."""

    parameter: nn.Parameter
    """This rank's tensor-parallel shard."""
    values: dict[str, Tensor]
    """Flat fp32 views of the optimizer's tensors by name, or copies if `store` is given; empty if this rank has none.
    Tensors that the optimizer keeps on the host are on the host."""
    begin: int
    """Offset of the views in the flattened shard."""
    group: dist.ProcessGroup
    """Data-parallel ranks that hold this shard."""
    split: bool
    """Whether each of these ranks has a part of the state instead of a copy."""
    store: Callable[[str, Tensor], None] | None = None
    """Sets a tensor that the optimizer keeps in another precision."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the state's tensors, the same on every rank."""
        return _MOMENTS if self.parameter.dtype == torch.float32 else (*_MOMENTS, MAIN)

    def set(self, name: str, flat: Tensor) -> None:
        """Sets this rank's part of state `name` to the flat fp32 tensor, rounded to the optimizer's precision."""
        if self.store is None:
            self.values[name].copy_(flat)
        else:
            self.store(name, flat.to(self.parameter.device))

    def gathered(self, name: str, owner: int) -> Tensor | None:
        """State `name` in the shape of the shard, on rank `owner` of the group; None elsewhere.

        Collective over the group if the state is split: one reduction of 4 bytes per weight. The bits are summed as
        integers, all but one of which are 0, so every bit is exact, including the signs of zeros.
        """
        shape, is_owner = self.parameter.shape, self.group.rank() == owner
        if not self.split:
            return self.values[name].view(shape) if is_owner else None
        flat = torch.zeros(shape.numel(), dtype=torch.float32, device=self.parameter.device)
        if name in self.values:
            flat[self.begin : self.begin + self.values[name].numel()] = self.values[name]
        dist.reduce(flat.view(torch.int32), dst=dist.get_global_rank(self.group, owner), group=self.group)
        return flat.view(shape) if is_owner else None


def parameter_states(optimizer: AnyOptimizer) -> Iterator[ParameterState]:
    """State of every trained parameter, in the same order on all data-parallel ranks; missing state is created.

    Args:
        optimizer: optimizer from `get_megatron_optimizer`.
    """
    for part in _parts(optimizer):
        _create_states(part)
        if isinstance(part, DistributedOptimizer):
            yield from _split(part)
        else:
            yield from _copies(part)


def step_count(optimizer: AnyOptimizer) -> int:
    """Number of updates that Adam has counted."""
    counts = {int(count) for adam in _adams(optimizer) for count in _counts(adam)}
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def set_step_count(optimizer: AnyOptimizer, steps: int) -> None:
    """Sets Adam's count of updates: torch's Adam keeps it in each parameter's state, Transformer Engine's in the
    groups.

    The states must exist.
    """
    for adam in _adams(optimizer):
        if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            for state in adam.state.values():
                state["step"] = torch.tensor(float(steps))
        else:
            for group in adam.param_groups:
                group["step"] = steps


def _parts(optimizer: AnyOptimizer) -> list[OptimizerPart]:
    """The optimizer, or the members of a chained one, that have parameters on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def _adams(optimizer: AnyOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizers that update; for a hybrid optimizer, those of the host and the device."""
    for part in _parts(optimizer):
        adam = part.optimizer
        yield from adam.sub_optimizers if isinstance(adam, HybridDeviceOptimizer) else [adam]


def _create_states(part: OptimizerPart) -> None:
    """Creates missing Adam state, as before the first update."""
    adam = part.optimizer
    if isinstance(adam, HybridDeviceOptimizer):
        for inner in adam.sub_optimizers:
            _create_moments(inner)
        adam._sync_sub_optimizers_state_to_hdo()
    elif _keeps_other_precision(part):
        _create_moments(adam)
    else:
        part.init_state_fn(adam, part.config)


def _create_moments(adam: torch.optim.Optimizer) -> None:
    for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
        if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            zeros = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            adam.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        else:
            adam.initialize_state(parameter, False)  # type: ignore[attr-defined]  # Transformer Engine's


def _keeps_other_precision(part: OptimizerPart) -> bool:
    """Whether Transformer Engine's Adam keeps moments in a precision other than fp32, and also the main weights."""
    aware = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    return bool(aware) and not isinstance(part.optimizer, HybridDeviceOptimizer)


def _counts(adam: torch.optim.Optimizer) -> list[Tensor | float]:
    if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
        return [state["step"] for state in adam.state.values() if "step" in state]
    return [group["step"] for group in adam.param_groups if "step" in group]


def _split(part: DistributedOptimizer) -> Iterator[ParameterState]:
    for buffer in part.buffers:
        for parameter in buffer.params:
            values: dict[str, Tensor] = {}
            begin = 0
            if parameter in part.model_param_gbuf_map:
                begin = part._get_model_param_range_map(parameter)["param"].start
                kept = part._get_main_param_and_optimizer_states(parameter)
                values = _flat(parameter, kept)
            store = partial(_store, part, parameter) if values and _keeps_other_precision(part) else None
            yield ParameterState(parameter, values, begin, part.data_parallel_group, split=True, store=store)


def _store(part: DistributedOptimizer, parameter: nn.Parameter, name: str, flat: Tensor) -> None:
    group, order = part.model_param_group_index_map[parameter]
    shard = part.optimizer.param_groups[group]["params"][order]
    part.optimizer.set_scaled_state(shard, "master_param" if name == MAIN else name, flat)


def _copies(part: OptimizerPart) -> Iterator[ParameterState]:
    state = part.optimizer.state
    for parameter, main in _main_weights(part):
        values = _flat(parameter, {MAIN: main, **state[main]})
        yield ParameterState(parameter, values, 0, _replicas(parameter), split=False)


def _main_weights(part: OptimizerPart) -> Iterator[tuple[nn.Parameter, Tensor]]:
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for model_group, main_group in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(model_group, main_group, strict=True)
        groups = part.fp32_from_fp32_groups
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
    for group in groups:
        yield from ((parameter, parameter) for parameter in group)


def _flat(parameter: nn.Parameter, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    names = _MOMENTS if parameter.dtype == torch.float32 else (*_MOMENTS, MAIN)
    assert all(kept[name].dtype == torch.float32 for name in names)
    return {name: kept[name].detach().view(-1) for name in names}


def _replicas(parameter: nn.Parameter) -> dist.ProcessGroup:
    group: dist.ProcessGroup = (
        parallel_state.get_data_parallel_group(with_context_parallel=True)
        if getattr(parameter, "allreduce", True)
        else parallel_state.get_expert_data_parallel_group()
    )
    return group
