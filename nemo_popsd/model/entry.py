"""What the commands do, once the configuration is checked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Trainer

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.config.consistency import RUN_FILES
from nemo_popsd.config.loading import save_resolved, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.sources import resolve_path
from nemo_popsd.evaluation.run import conclude_all, fingerprint, plan
from nemo_popsd.model.callbacks import SaveCheckpoints
from nemo_popsd.model.evaluation import before_and_after, draw_missing
from nemo_popsd.model.pages import report_run, write_diagnosis
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.model.strategy import MegatronPlacement
from nemo_popsd.observability.loggers import build_loggers
from nemo_popsd.observability.progress import StepProgress
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.report.run import AFTER, BEFORE
from nemo_popsd.runtime.distributed import device, initialize, shutdown

_LONGEST_EVALUATION = timedelta(days=7)


def train(config: PopsdConfig) -> None:
    """Evaluates, trains, evaluates again, and writes a NeMo and a Hugging Face checkpoint below `config.output`."""
    output = Path(config.output)
    trainer = build_trainer(config)
    model = PurifiedOPSDModel(to_dict_config(config), trainer)
    if is_rank_zero():
        _remove_previous_run(output)
        save_resolved(config, output / "config.yaml")
    if config.data.validation.path:
        _validate(trainer, model)
    _diagnose_in_training(model, BEFORE)
    trainer.fit(model)
    if config.data.validation.path:
        _validate(trainer, model)
    _diagnose_in_training(model, AFTER)
    model.save_to(str(output / "checkpoints" / "final"))
    if config.training.export_huggingface:
        model.export_huggingface(output / "huggingface")
    if config.data.validation.path and is_rank_zero():
        _say(before_and_after(config.output, model.completed_steps, resamples=config.evaluation.resamples))
    _say(f"NeMo checkpoint: {output / 'checkpoints' / 'final'}")
    if config.training.export_huggingface:
        _say(f"Hugging Face checkpoint: {output / 'huggingface'}")
    report_run(output)
    shutdown()


def evaluate(config: PopsdConfig, checkpoint: str | None) -> None:
    """Evaluates `student.source`, or `checkpoint`, on `evaluation.sets` or `data.validation`; what is drawn and found
    goes to `<output>/evaluation/<name>/<set>`, see `nemo_popsd.evaluation.records`.
    """
    opened = _open(config, checkpoint)
    # Nothing is collective while samples are drawn; a replica that is done waits for those with longer responses.
    initialize(tensor_parallel=config.parallel.tensor, seed=config.seed, timeout=_LONGEST_EVALUATION)
    without_rows = replace(config, data=replace(config.data, train=SourceConfig(), validation=SourceConfig()))
    model = PurifiedOPSDModel(to_dict_config(without_rows), checkpoint=opened)
    name = checkpoint or config.student.source
    weights = resolve_path(name, setting="student.source")
    planned = plan(config, name, model.tokenizer)
    draw_missing(model, planned, name=name, fingerprint=fingerprint(weights))
    shutdown()
    if is_rank_zero():
        _say(conclude_all(planned, config, model=name))


def diagnose(config: PopsdConfig, checkpoint: str | None) -> None:
    """Diagnoses `student.source`, or `checkpoint`, on rows of `data.train`; page and figures go to
    `<output>/diagnosis/<name>`.
    """
    config.data.validation = SourceConfig()
    opened = _open(config, checkpoint)
    model = PurifiedOPSDModel(to_dict_config(config), build_trainer(config, logs=False), checkpoint=opened)
    name = checkpoint or config.student.source
    write_diagnosis(model.diagnose(name), Path(config.output) / "diagnosis" / _as_file_name(name))
    shutdown()


def export(checkpoint: str, output: str) -> None:
    """Writes a NeMo checkpoint as a Hugging Face directory, adapters merged."""
    config = NemoCheckpoint(checkpoint).config
    config.data.train, config.data.validation = SourceConfig(), SourceConfig()
    config.parallel.tensor = 1
    model = PurifiedOPSDModel.restore_from(checkpoint, override_config_path=to_dict_config(config))
    model.export_huggingface(output)
    _say(f"Hugging Face checkpoint: {output}")
    shutdown()


def build_trainer(config: PopsdConfig, *, logs: bool = True) -> Trainer:
    """The Lightning trainer of a run: one device per process, since Megatron, not Lightning, connects them.

    Makes the process groups where there are none yet, so that each process knows its device.
    """
    initialize(tensor_parallel=config.parallel.tensor, seed=config.seed)
    validates = bool(config.data.validation.path) and config.training.validate_every > 0
    return Trainer(
        accelerator=device().type if device().type == "cpu" else "gpu",
        strategy=MegatronPlacement(device=device()),
        devices=1,
        max_steps=config.training.steps,
        val_check_interval=config.training.validate_every if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=(build_loggers(config) if logs else []) or False,
        callbacks=[
            StepProgress(config.training.steps, enabled=config.observability.progress_bar),
            SaveCheckpoints(config.training.checkpoint_every, Path(config.output) / "checkpoints"),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )


def _open(config: PopsdConfig, checkpoint: str | None) -> NemoCheckpoint | None:
    """The checkpoint, if there is one; `config` then says how its weights were adapted, which is a fact of it."""
    opened = None if checkpoint is None else NemoCheckpoint(checkpoint)
    if opened is not None:
        config.student = replace(opened.config.student, precision=config.student.precision)
    return opened


def _as_file_name(name: str) -> str:
    return name.replace(":", "/").strip("/").replace("/", "_")


def _diagnose_in_training(model: PurifiedOPSDModel, name: str) -> None:
    """Before the first step of a run and after its last, unless it is turned off."""
    if model.settings.diagnosis.in_training and not (name == BEFORE and model.completed_steps):
        told = f"{model.settings.name}, {name} training"
        write_diagnosis(model.diagnose(told), Path(model.settings.output) / "diagnosis" / name)


def _remove_previous_run(output: Path) -> None:
    """Only `overwrite=true` lets a run come this far where another one was."""
    for name in RUN_FILES:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _validate(trainer: Trainer, model: PurifiedOPSDModel) -> None:
    """Evaluates the current weights; they are not asked twice."""
    if model.last_evaluation_step != model.completed_steps:
        trainer.validate(model, verbose=False)


def _say(text: str) -> None:
    if is_rank_zero():
        print(text, flush=True)
