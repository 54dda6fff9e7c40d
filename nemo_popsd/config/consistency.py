"""Checks between sections, and of paths and machine. They run before a model is built and import no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_popsd.config.branches import check_branches, check_training_source
from nemo_popsd.config.resuming import DONE, REQUEUE
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.named_sets import named_source
from nemo_popsd.data.sources import check_source
from nemo_popsd.embedded.names import PREFIX, asset
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import names_needed
from nemo_popsd.files.ownership import EXPORT, MARK, RUN, read_mark, refuse_foreign
from nemo_popsd.rollout.vllm.environment import check_environment

RUN_FILES = (
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "huggingface",
    "rollouts",
    "validation",
    "diagnosis",
    "report.html",
    "vllm",
    DONE,
    REQUEUE,
)
"""What a training run writes to `output`, besides its resolved configuration."""


def check_sections(config: PopsdConfig) -> None:
    """Refuse values that are valid separately but not together. Reads nothing but `config`.

    Raises:
        UserError: names both settings.
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
    if optimizer.overlap_param_gather and training.updates_per_step == 1:
        raise UserError(
            "configuration",
            got="optimizer.overlap_param_gather=true with training.updates_per_step=1",
            need="several updates per step: rollouts, which read all weights, come before the first",
            fix="set optimizer.overlap_param_gather=false, or training.updates_per_step above 1",
        )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            "configuration",
            got=f"optimizer.min_lr={optimizer.min_lr} with optimizer.lr={optimizer.lr}",
            need="a final learning rate no higher than the peak",
            fix="set optimizer.min_lr or optimizer.lr",
        )


def _check_precision(config: PopsdConfig) -> None:
    """Refuse settings that save memory of bf16 training in a run that is not in bf16."""
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


def check_layout(config: PopsdConfig, *, world_size: int) -> None:
    """Refuse a parallel layout that does not divide the world, or a batch that does not divide over it.

    Args:
        config: the run.
        world_size: number of ranks.

    Raises:
        UserError: names the setting and the nearest values that fit.
    """
    parallel, prompts = config.parallel, config.training.prompts_per_step
    parallel.check_world(world_size)
    replicas = world_size // parallel.replica_ranks
    if prompts % replicas:
        fits = math.lcm(replicas, config.training.updates_per_step)
        below, above = prompts // fits * fits, math.ceil(prompts / fits) * fits
        fitting = " or ".join(str(value) for value in (below, above) if value)
        raise UserError(
            "configuration",
            got=f"training.prompts_per_step={prompts} with {replicas} data-parallel replicas "
            f"({world_size} ranks, {parallel.describe()})",
            need=f"a multiple of {replicas}",
            fix=f"set training.prompts_per_step={fitting}",
        )


def _check_engine(config: PopsdConfig) -> None:
    """Refuse an engine that cannot run on this machine."""
    rollout, ranks = config.rollout, config.parallel.replica_ranks
    if rollout.engine != "vllm":
        return
    if not rollout.vllm.launcher and rollout.vllm.tensor > ranks:
        raise UserError(
            "configuration",
            got=f"rollout.vllm.tensor={rollout.vllm.tensor} on the {ranks} ranks of a replica "
            f"({config.parallel.describe()})",
            need="at most as many GPUs as the replica has",
            fix="set rollout.vllm.tensor, or rollout.vllm.launcher to start servers elsewhere",
        )
    check_environment(rollout.vllm)


def holds_a_run(output: str) -> bool:
    """Whether `output` has the files of a training run."""
    directory = Path(output).expanduser()
    return (directory / "config.yaml").is_file() and any((directory / name).exists() for name in RUN_FILES)


def check_training_run(config: PopsdConfig, *, world_size: int) -> None:
    """Refuse a training run whose settings, paths or machine do not fit, before a model is built.

    Raises:
        UserError: a contradiction, a layout that does not fit, a path that is empty or does not exist, or an output
            directory that cannot be written or has files that this package did not write.
    """
    check_sections(config)
    check_layout(config, world_size=world_size)
    _check_best_metric(config)
    _check_student(config)
    _check_engine(config)
    check_training_source(config)
    if config.data.validation.path:
        check_source(config.data.validation, setting="data.validation", need_reference=False, need_answer=True)
    check_output(config.output)
    output = Path(config.output).expanduser().resolve()
    present = [name for name in RUN_FILES if (output / name).exists()]
    _check_ownership(config, output, present)
    removed = present if config.overwrite else ("checkpoints", "huggingface")
    for setting, path in (
        ("student.source", config.student.source),
        *(("data.train.path", path) for path in (config.data.train.path, *config.data.train.more_paths)),
        *(("data.validation.path", path) for path in (config.data.validation.path, *config.data.validation.more_paths)),
    ):
        if path and not path.startswith(PREFIX):
            place = Path(path).expanduser().resolve()
            if any(place.is_relative_to(output / name) for name in removed):
                what = "overwrite=true would remove" if config.overwrite else "the run would replace"
                raise UserError(
                    "configuration",
                    got=f"{setting}={path!r} inside output={config.output!r}, which {what}",
                    need="a run that does not remove what it reads",
                    fix="set output",
                )


def _check_ownership(config: PopsdConfig, output: Path, present: Sequence[str]) -> None:
    """Refuse a directory whose files the run would replace or remove although no run wrote them.

    A run marks its directory before it writes anything else. A directory without the mark that has a config.yaml and
    files of a run may be that of an earlier version: it can be resumed, since the settings are compared, but not
    removed.
    """
    mark = read_mark(output)
    if mark is None or mark.kind != RUN:
        if present and (config.overwrite or not (output / "config.yaml").is_file()):
            raise UserError(
                "configuration",
                got=f"output={config.output!r}, which has {', '.join(present)} and no {MARK} to mark them as "
                "written by a run of nemo_popsd",
                need="a directory without such files, or that of a run; nothing was removed",
                fix="set output to another directory; if it is a run of an earlier version, remove it yourself",
            )
        if not present and (output / "config.yaml").exists():
            raise UserError(
                "configuration",
                got=f"output={config.output!r}, which has a config.yaml that no run wrote and this run would replace",
                need="a directory without files that no run wrote",
                fix="set output to another directory, or rename that file",
            )
    if config.training.export_huggingface:
        for name in names_needed(output / "huggingface"):
            refuse_foreign(name, EXPORT)


def check_evaluation_run(config: PopsdConfig, *, world_size: int, checkpoint: str | None = None) -> None:
    """Refuse an evaluation whose settings, paths or machine do not fit, before a model is built.

    Args:
        config: the run; needs `data.validation.path` or `evaluation.sets`.
        world_size: number of ranks.
        checkpoint: what is evaluated; None evaluates `student.source`.

    Raises:
        UserError: as `check_training_run`.
    """
    check_sections(config)
    check_layout(config, world_size=world_size)
    if config.evaluation.endpoint.url:
        _check_endpoint(config, world_size=world_size, checkpoint=checkpoint)
    else:
        _check_engine(config)
    _check_weights(config, checkpoint)
    for name in config.evaluation.sets:
        named_source(name, config.evaluation.sets_directory)
    if not config.evaluation.sets:
        check_source(config.data.validation, setting="data.validation", need_reference=False, need_answer=True)
    check_output(config.output)


def check_diagnosis_run(config: PopsdConfig, *, world_size: int, checkpoint: str | None = None) -> None:
    """Refuse a diagnosis whose settings, paths or machine do not fit, before a model is built.

    Args:
        config: the run; needs `data.train.path`, whose rows have references.
        world_size: number of ranks.
        checkpoint: what is diagnosed; None diagnoses `student.source`.

    Raises:
        UserError: as `check_training_run`.
    """
    check_sections(config)
    check_layout(config, world_size=world_size)
    _check_weights(config, checkpoint)
    _check_engine(config)
    check_training_source(config)
    check_output(config.output)


def check_checkpoint(path: str, *, setting: str) -> None:
    """Refuse a checkpoint that does not exist."""
    if not Path(path).expanduser().exists():
        raise UserError(
            "checkpoint",
            got=f"{setting} {path!r}, which does not exist (looked in {Path.cwd()})",
            need="a checkpoint that a run has written",
            fix="correct the path",
        )


def check_output(path: str, *, setting: str = "output") -> None:
    """Refuse a directory that cannot be created or written; creates nothing. `setting` is the name for messages."""
    directory = Path(path).expanduser()
    nearest = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if path and nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return
    got = f"{setting}={path!r}"
    if path:
        got += f", where {nearest} " + ("cannot be written" if nearest.is_dir() else "is a file")
    raise UserError("configuration", got=got, need="a directory that can be created and written", fix=f"set {setting}")


def check_new_output(path: str, *, setting: str) -> None:
    """Refuse a path that exists or cannot be created."""
    if Path(path).expanduser().exists():
        raise UserError(
            "configuration",
            got=f"{setting}={path!r}, which exists",
            need="a path that does not exist yet",
            fix=f"remove it, or give another {setting}",
        )
    check_output(path, setting=setting)


def _check_best_metric(config: PopsdConfig) -> None:
    training = config.training
    if training.keep_best and training.best_metric.startswith("validation/") and not config.data.validation.path:
        raise UserError(
            "configuration",
            got=f"training.keep_best={training.keep_best} by training.best_metric={training.best_metric} without "
            "data.validation.path",
            need="a metric that is measured",
            fix="set data.validation.path, training.best_metric=train/loss with training.best_is=min, or "
            "training.keep_best=0",
        )


def _check_endpoint(config: PopsdConfig, *, world_size: int, checkpoint: str | None) -> None:
    if world_size > 1:
        raise UserError(
            "configuration",
            got=f"evaluation.endpoint.url with {world_size} ranks",
            need="one process: the server has the accelerators",
            fix="start `popsd evaluate` without torchrun, or set evaluation.endpoint.url=''",
        )
    if checkpoint is not None:
        raise UserError(
            "configuration",
            got="evaluation.endpoint.url together with --checkpoint",
            need="one of them: the server's model is evaluated",
            fix="serve the exported checkpoint (`popsd export`) and omit --checkpoint",
        )
    if config.evaluation.endpoint.dialect == "openai" and config.evaluation.top_k:
        raise UserError(
            "configuration",
            got=f"evaluation.top_k={config.evaluation.top_k} with evaluation.endpoint.dialect=openai",
            need="a setting of the standard API",
            fix="set evaluation.top_k=0 or evaluation.endpoint.dialect=vllm",
        )


def _check_weights(config: PopsdConfig, checkpoint: str | None) -> None:
    if checkpoint is None:
        _check_student(config)
    else:
        check_checkpoint(checkpoint, setting="--checkpoint")


def _check_student(config: PopsdConfig) -> None:
    source = config.student.source
    if source.startswith(PREFIX):
        asset(source)
    elif not source or not Path(source).expanduser().exists():
        raise UserError(
            "configuration",
            got=f"student.source={source!r}" + (f", which does not exist (looked in {Path.cwd()})" if source else ""),
            need=f"a Hugging Face directory, a NeMo checkpoint, or {PREFIX}tiny_reasoner",
            fix="set student.source",
        )
