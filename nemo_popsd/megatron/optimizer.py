"""Megatron's DDP, optimizer and schedule, wrapped as a torch optimizer for Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_popsd.megatron.config import OptimizerConfig
from nemo_popsd.megatron.interfaces import MegatronOptimizer, ModelChunk, WrappedChunk


def wrap_for_training(
    chunks: Sequence[ModelChunk], config: OptimizerConfig, fields: Mapping[str, object] | None = None
) -> list[WrappedChunk]:
    """Wraps each of the student's chunks in Megatron's DDP, which accumulates and reduces gradients.

    The schedule also reduces gradients over other groups: norms under sequence parallelism, q and k norms under tensor
    parallelism, tied embeddings between first and last stage.

    Args:
        chunks: chunks of the student.
        config: overlap, buckets and precision of gradients.
        fields: values of further fields of Megatron's DDP (`megatron.ddp`).
    """
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.grad_dtype == "fp32",
                overlap_grad_reduce=config.overlap_grad_reduce,
                overlap_param_gather=config.overlap_param_gather,
                bucket_size=config.bucket_size or None,
                use_distributed_optimizer=shards_state(config),
                **dict(fields or {}),
            ),
            module=chunk,
            # The reduction of later chunks overlaps with the backward pass of earlier ones with any bucket size.
            disable_bucketing=config.overlap_grad_reduce and index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        if chunk.use_forward_hook:  # `StudentOptimizer` enables the hooks when a forward pass may gather weights
            chunk.disable_forward_pre_hook(param_sync=False)
    shared = chunks[0].config  # of all chunks
    shared.finalize_model_grads_func = finalize_model_grads
    no_sync = [chunk.no_sync for chunk in wrapped]
    shared.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def shards_state(config: OptimizerConfig) -> bool:
    """Whether the optimizer state is sharded in the layout of this run; Megatron's process groups must exist."""
    return config.sharded(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


class StudentOptimizer(torch.optim.Optimizer):
    """Megatron's optimizer and its schedule as one torch optimizer, by which Lightning counts steps.

    All state is in Megatron's optimizer; this class has none.

    Attributes:
        chunks: the wrapped student.
        megatron: the Megatron optimizer.
        scheduler: learning rate and weight decay by step.
        grad_norm: global gradient norm of the last step, before clipping.
        trained: this rank's trained parameters.
        update_follows: whether the next forward pass is that of another update in the same step, which may then gather
            the updated weights (`optimizer.overlap_param_gather`). If false, `step` gathers them.
    """

    def __init__(
        self,
        chunks: Sequence[WrappedChunk],
        config: OptimizerConfig,
        *,
        steps: int,
        bf16: bool,
        fields: Mapping[str, object] | None = None,
    ) -> None:
        """Builds Megatron's optimizer and schedule.

        Args:
            chunks: the wrapped student; parameters that require gradients are trained.
            config: Adam, schedule, clipping.
            steps: length of the run, where the decay ends.
            bf16: whether the weights are bf16, with fp32 main weights in the optimizer.
            fields: values of further fields of Megatron's optimizer (`megatron.optimizer`).
        """
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=shards_state(config),
                overlap_param_gather=config.overlap_param_gather,
                **{**_state_options(config), **dict(fields or {})},
            ),
            list(chunks),
        )
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            # One step more than the run has: at the end of the decay the rate may be 0, and that step would change
            # nothing.
            lr_decay_steps=max(steps, config.warmup_steps) + 1,
            lr_decay_style=config.decay,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.grad_norm = 0.0
        self.update_follows = False
        chunks[0].module.config.grad_scale_func = self.megatron.scale_loss
        self.chunks = list(chunks)
        self.trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        super().__init__(self.trained, {"lr": config.lr})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears Megatron's gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad(set_to_none)

    def prepare(self) -> float:
        """Copies the gradients to the main weights and returns their global norm, the same on every rank.

        Called before `step` to check the norm before any update. Collectives: Megatron's two for the norm.
        """
        self.megatron.prepare_grads()
        self.grad_norm = float(self.megatron.get_grad_norm())
        return self.grad_norm

    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        """Updates the weights at the learning rate of this step, counted from 1.

        Collectives with a sharded state: one all-gather of the weights over the ranks that hold the same ones, unless
        `overlap_param_gather` leaves it to the next forward pass (see `update_follows`).

        Args:
            closure: Lightning's closure, which runs its hooks.
        """
        if closure is not None:
            closure()
        self.scheduler.step(1)
        overlapping = [chunk for chunk in self.chunks if chunk.use_forward_hook]
        for chunk in overlapping:
            if chunk.remove_forward_pre_hook_handles:
                chunk.disable_forward_pre_hook(param_sync=False)
        self.megatron.step()
        for chunk in overlapping:
            if self.update_follows:
                chunk.enable_forward_pre_hook()
            else:
                chunk.start_param_sync(force_sync=True)

    def resume(self, updates: int) -> None:
        """Sets the schedule to its state after this number of updates; Adam's state is loaded elsewhere."""
        self.scheduler.step(updates)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step."""
        return float(self.megatron.param_groups[0]["lr"])


def _state_options(config: OptimizerConfig) -> dict[str, Any]:
    """Options of Megatron's optimizer for the precision and the place of its state."""
    options: dict[str, Any] = {}
    if config.state_dtype == "bf16" or config.host_share:
        gradients = torch.bfloat16 if config.grad_dtype == "bf16" else torch.float32
        # Without remainders the main weights are fp32 tensors, as checkpoints store them.
        options |= {
            "use_precision_aware_optimizer": True,
            "store_param_remainders": False,
            "main_grads_dtype": gradients,
        }
    if config.state_dtype == "bf16":
        options |= {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    if config.host_share:
        options |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": config.host_share,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    return options
