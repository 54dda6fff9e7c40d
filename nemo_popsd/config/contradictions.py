"""Checks across sections: values that are valid separately but not together. They read only the configuration."""

from __future__ import annotations

from nemo_popsd.config.branches import check_branches
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.parallel.config import GATHERED, HIERARCHICAL


def check_sections(config: PopsdConfig) -> None:
    """Refuse values that are valid separately but not together. Reads only `config`.

    Raises:
        UserError: two settings contradict each other; the message names both.
    """
    optimizer, training = config.optimizer, config.training
    if optimizer.warmup_steps > training.steps:
        raise UserError(
            "configuration",
            got=f"optimizer.warmup_steps={optimizer.warmup_steps} with training.steps={training.steps}",
            need="a warm-up no longer than the run",
            fix="set optimizer.warmup_steps or training.steps",
        )
    if config.rollout.tokens_per_step and training.updates_per_step > 1:
        raise UserError(
            "configuration",
            got=f"rollout.tokens_per_step={config.rollout.tokens_per_step} with training.updates_per_step="
            f"{training.updates_per_step}",
            need="one update per step: with a token budget the number of finished responses is not fixed",
            fix="set training.updates_per_step=1 or rollout.tokens_per_step=0",
        )
    check_branches(config)
    _check_precision(config)
    _check_packing(config)
    _check_fp8(config)
    if optimizer.overlap_param_gather and training.updates_per_step == 1:
        raise UserError(
            "configuration",
            got="optimizer.overlap_param_gather=true with training.updates_per_step=1",
            need="several updates per step: rollouts precede the first update and read all weights",
            fix="set optimizer.overlap_param_gather=false, or training.updates_per_step above 1",
        )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            "configuration",
            got=f"optimizer.min_lr={optimizer.min_lr} with optimizer.lr={optimizer.lr}",
            need="a final learning rate no higher than the peak",
            fix="set optimizer.min_lr or optimizer.lr",
        )


def _check_packing(config: PopsdConfig) -> None:
    """Refuse packed sequences if Transformer Engine's attention does not support them."""
    kind = config.parallel.context_type
    if kind in (GATHERED, HIERARCHICAL) and config.training.packing and config.student.layers != "local":
        raise UserError(
            "configuration",
            got=f"parallel.context_type={kind} with training.packing=true",
            need="padded sequences: Transformer Engine does not support packed sequences with this type",
            fix="set training.packing=false, or parallel.context_type=auto",
        )


def _check_fp8(config: PopsdConfig) -> None:
    """Refuse FP8 settings that have no effect or not the intended effect."""
    student, passes = config.student, config.fp8.passes
    if not passes:
        return
    on = f"{passes[0]}=true"
    got, need, fix = "", "", ""
    if student.precision != "bf16":
        got, need, fix = f"{on} with student.precision=fp32", "bf16 weights", "set student.precision=bf16"
    elif student.layers == "local":
        got, need = f"{on} with student.layers=local", "Transformer Engine's layers"
        fix = "set student.layers=auto"
    elif config.fp8.rollouts and config.rollout.engine != "megatron":
        got = f"fp8.rollouts=true with rollout.engine={config.rollout.engine}"
        need = "rollout.engine=megatron: vLLM has its own quantisation"
        fix = "set rollout.vllm.quantization and fp8.rollouts=false"
    elif config.fp8.frozen and student.frozen_copy == "host":
        got = "fp8.frozen=true with student.frozen_copy=host"
        need = "the copy on the device, where Transformer Engine keeps its quantised weights"
        fix = "set student.frozen_copy=device, or fp8.frozen=false"
    if got:
        raise UserError("configuration", got=got, need=need, fix=fix)


def _check_precision(config: PopsdConfig) -> None:
    """Refuse memory-saving settings of bf16 training in a run with another precision."""
    optimizer, precision = config.optimizer, config.student.precision
    for name, off in (("grad_dtype", "fp32"), ("state_dtype", "fp32"), ("host_share", 0)):
        value = getattr(optimizer, name)
        if value != off and precision != "bf16":
            raise UserError(
                "configuration",
                got=f"optimizer.{name}={value} with student.precision={precision}",
                need="student.precision=bf16",
                fix=f"set student.precision=bf16, or optimizer.{name}={off}",
            )
