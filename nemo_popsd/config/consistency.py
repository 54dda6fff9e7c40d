"""Checks of layout, paths and machine. They run before a model is built and import no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_popsd.config.branches import check_training_source
from nemo_popsd.config.contradictions import check_sections
from nemo_popsd.config.resuming import DONE, REQUEUE
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings, with_view
from nemo_popsd.data.models import missing_model, model_path
from nemo_popsd.data.sources import check_source
from nemo_popsd.data.views import Views
from nemo_popsd.embedded.names import PREFIX
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.checkers import load_checker
from nemo_popsd.evaluation.problem_sets import sources_of
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
    "dumps",
    DONE,
    REQUEUE,
)
"""Files and directories that a training run writes to `output`, besides its resolved configuration."""


_FOR_HUGGINGFACE = {
    "--checkpoint": "set student.source to it, and omit --checkpoint",
    "CHECKPOINT": "use it as it is: `popsd export` writes this format; `popsd convert hf-to-nemo` reads it",
    "SRC": "use it as it is, or convert it with `popsd convert hf-to-nemo`",
}
"""How to fix a Hugging Face directory passed instead of a NeMo checkpoint, by argument."""


def check_layout(config: PopsdConfig, *, world_size: int) -> None:
    """Refuse a parallel layout that does not divide the world size, or a batch that the layout does not divide.

    Args:
        config: configuration of the run.
        world_size: number of ranks.

    Raises:
        UserError: the sizes do not divide; the message names the setting and the nearest valid values.
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
    """Whether `output` contains the files of a training run."""
    directory = Path(output).expanduser()
    return (directory / "config.yaml").is_file() and any((directory / name).exists() for name in RUN_FILES)


def check_training_run(config: PopsdConfig, *, world_size: int) -> None:
    """Refuse a training run whose settings, paths or machine do not fit, before a model is built.

    Raises:
        UserError: settings contradict each other, the layout does not fit, a path is empty or does not exist, or the
            output directory cannot be written or contains files that this package did not write.
    """
    check_sections(config)
    check_layout(config, world_size=world_size)
    _check_checker(config)
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
                    need="a run that does not remove its own inputs",
                    fix="set output",
                )


def _check_ownership(config: PopsdConfig, output: Path, present: Sequence[str]) -> None:
    """Refuse a directory with files that no run wrote and that this run would replace or remove.

    A run marks its directory before it writes anything else. A directory without the mark but with a config.yaml and
    files of a run may come from an earlier version: it can be resumed, because the settings are compared, but not
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
        config: configuration; needs `data.validation.path` or `evaluation.sets`.
        world_size: number of ranks.
        checkpoint: checkpoint to evaluate; None evaluates `student.source`.

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
    _check_checker(config)
    for name, source in sources_of(config.evaluation, config.data).items():
        setting = f"evaluation.sets.{name}" if config.evaluation.sets else "data.validation"
        check_source(source, setting=setting, need_reference=False, need_answer=True)
    check_output(config.output)


def check_diagnosis_run(config: PopsdConfig, *, world_size: int, checkpoint: str | None = None) -> None:
    """Refuse a diagnosis whose settings, paths or machine do not fit, before a model is built.

    Args:
        config: configuration; needs `data.train.path` with references.
        world_size: number of ranks.
        checkpoint: checkpoint to diagnose; None diagnoses `student.source`.

    Raises:
        UserError: as `check_training_run`.
    """
    check_sections(config)
    check_layout(config, world_size=world_size)
    _check_weights(config, checkpoint)
    _check_engine(config)
    check_training_source(config)
    check_output(config.output)


def check_views_run(config: PopsdConfig, views: Sequence[str], *, world_size: int) -> None:
    """Refuse a scoring of views whose settings, paths or machine do not fit, before a model is built.

    Args:
        config: configuration of the run.
        views: names of views; whether every row has them is checked later, when the rows are read.
        world_size: number of ranks.

    Raises:
        UserError: as `check_training_run`, and if there is no view or one is repeated.
    """
    if not views or not all(views) or len(set(views)) < len(views):
        raise UserError(
            "--views",
            got=repr(",".join(views)),
            need="names of views, each once: solution, answer, other, none, or columns of the rows",
            fix="set --views, e.g. --views solution,answer,none",
        )
    check_layout(config, world_size=world_size)
    _check_engine(config)
    _check_checker(config)
    _check_student(config)
    training = config.diagnosis.views.source == "train"
    source = config.data.train if training else config.data.validation
    for view in views:
        viewed = with_view(config, view)
        check_sections(viewed)
        needed = Views.of(data_settings(viewed))
        check_source(
            source,
            setting="data.train" if training else "data.validation",
            need_reference=needed.need_reference,
            need_answer=True,
        )
    check_output(config.output)


def check_checkpoint(path: str, *, setting: str) -> None:
    """Refuse a checkpoint that does not exist."""
    if not Path(path).expanduser().exists():
        raise UserError(
            "checkpoint",
            got=f"{setting} {path!r}, which does not exist (looked in {Path.cwd()})",
            need="a checkpoint that a run has written, such as runs/NAME/checkpoints/final",
            fix="correct the path",
        )
    _refuse_a_run(Path(path).expanduser(), setting=setting)
    if _is_huggingface(Path(path).expanduser()):
        raise UserError(
            "checkpoint",
            got=f"{setting} {path!r}, which is a Hugging Face directory",
            need="a NeMo checkpoint, such as runs/NAME/checkpoints/final",
            fix=_FOR_HUGGINGFACE.get(setting, "correct the path"),
        )


def check_model_directory(path: str, *, setting: str) -> None:
    """Refuse a Hugging Face directory that does not exist."""
    if not Path(path).expanduser().is_dir():
        raise UserError(
            "model",
            got=f"{setting} {path!r}, which is not a directory (looked in {Path.cwd()})",
            need="a Hugging Face directory, with config.json and *.safetensors",
            fix="correct the path",
        )
    if (Path(path).expanduser() / "manifest.json").is_file():
        raise UserError(
            "model",
            got=f"{setting} {path!r}, which is a NeMo checkpoint",
            need="a Hugging Face directory",
            fix="correct the path; `popsd convert nemo-to-hf` converts in the other direction",
        )


def check_output(path: str, *, setting: str = "output") -> None:
    """Refuse a directory that cannot be created or written, without creating it. `setting` is its name in messages."""
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
            fix=f"remove it, or set another {setting}",
        )
    check_output(path, setting=setting)


def _check_checker(config: PopsdConfig) -> None:
    """Refuse an answer checker that cannot be imported."""
    if config.evaluation.checker:
        load_checker(config.evaluation.checker)


def _check_best_metric(config: PopsdConfig) -> None:
    training = config.training
    if training.keep_best and training.best_metric.startswith("validation/") and not config.data.validation.path:
        raise UserError(
            "configuration",
            got=f"training.keep_best={training.keep_best} by training.best_metric={training.best_metric} without "
            "data.validation.path",
            need="a metric that the run measures",
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
    path = model_path(source)
    if not source or not path.exists():
        raise missing_model(source, setting="student.source")
    if not source.startswith(PREFIX):
        _refuse_a_run(path, setting="student.source")


def _refuse_a_run(path: Path, *, setting: str) -> None:
    """Refuse the output directory of a run where one of its models is needed; the message names the newest."""
    if not holds_a_run(str(path)):
        return
    folder = path / "checkpoints"
    names = ("final", *sorted((name.name for name in folder.glob("step-*")), reverse=True))
    checkpoint = next((folder / name for name in names if (folder / name / "manifest.json").is_file()), None)
    raise UserError(
        "checkpoint",
        got=f"{setting} {str(path)!r}, which is the output of a run",
        need="a model or checkpoint in it",
        fix=f"use {checkpoint}" if checkpoint else "start that run again: it has no complete checkpoint",
    )


def _is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "manifest.json").exists()
