"""What the commands do, once the configuration is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.peft_adapter import write_peft_adapter
from nemo_popsd.checkpoint.retention import FINAL
from nemo_popsd.checkpoint.source import base_of
from nemo_popsd.commands.pages import report_run, write_diagnosis
from nemo_popsd.commands.run_directory import RunDirectory
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.files import resolve_path
from nemo_popsd.diagnosis.record import refuse_other_files
from nemo_popsd.embedded.names import local_path
from nemo_popsd.errors import SAVED_AND_STOPPED, StopRequested
from nemo_popsd.evaluation.run import as_file_name, conclude_all, plan, weights_digest
from nemo_popsd.files.output_lock import OutputLock
from nemo_popsd.files.ownership import refuse_overlap
from nemo_popsd.model.callbacks import StepBoundary
from nemo_popsd.model.evaluation import before_and_after, draw_missing
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.model.strategy import MegatronPlacement
from nemo_popsd.observability.loggers import build_loggers
from nemo_popsd.observability.progress import StepProgress
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.observability.trackers import close_trackers
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import device, initialize, shutdown
from nemo_popsd.report.run import AFTER, BEFORE
from nemo_popsd.runtime.random_state import preserved_random_state

_LONGEST_EVALUATION = timedelta(days=7)


def train(config: PopsdConfig, *, lock: OutputLock | None = None) -> int:
    """Trains below `config.output`, from the beginning or from its newest complete checkpoint; evaluates before and
    after, and writes a NeMo and a Hugging Face checkpoint.

    Args:
        config: the run.
        lock: of its output, on rank 0; without one nothing tells two runs in one directory apart.

    Returns:
        0, or `SAVED_AND_STOPPED` if a signal asked to stop; then the last completed step is saved.
    """
    run = RunDirectory(config)
    initialize(config.parallel, seed=config.seed, timeout=timedelta(seconds=config.training.collective_timeout))
    run.share_lock(lock)
    checkpoint = run.checkpoint()
    completed = checkpoint.step if checkpoint else 0
    trainer = build_trainer(config, completed=completed, may_write=run.is_held)
    model = PurifiedOPSDModel(to_dict_config(config), trainer, checkpoint=checkpoint, resume=checkpoint is not None)
    model.checkpoints.check_lock = run.check_lock
    run.begin(completed)
    _say(f"resuming after step {completed} from {checkpoint.directory}" if checkpoint else "beginning at step 1")
    model.stop.install()
    succeeded: bool | None = False
    try:
        _train(config, trainer, model, run)
        succeeded = True
    except StopRequested:
        succeeded = None
        model.checkpoints.save_last_step(model)
        run.mark_stopped(model.completed_steps)
        again = "the same command" + (" with overwrite=false" if config.overwrite else "")
        _say(f"stopped by a signal; saved after step {model.completed_steps}; {again} goes on from there")
        return SAVED_AND_STOPPED
    finally:
        model.stop.uninstall()
        close_trackers(trainer.loggers, succeeded)
    shutdown()
    return 0


def _train(config: PopsdConfig, trainer: Trainer, model: PurifiedOPSDModel, run: RunDirectory) -> None:
    validates = bool(config.data.validation.path)
    if model.completed_steps == 0 and run.first_validation_is_missing():
        _validate(trainer, model)
    if model.completed_steps < config.training.steps:
        if run.validation_is_missing(model.completed_steps):
            _validate(trainer, model)
        _diagnose_in_training(model, BEFORE)
        trainer.fit(model)
        final = model.checkpoints.save_final(model)
    else:
        final = model.checkpoints.folder / FINAL
    if validates:
        _validate(trainer, model)
    _diagnose_in_training(model, AFTER)
    if config.training.export_huggingface:
        run.refuse_lost_lock()
        model.export_huggingface(run.output / "huggingface")
    run.mark_finished(model.completed_steps)
    if validates and is_rank_zero():
        _say(before_and_after(config.output, model.completed_steps, resamples=config.evaluation.resamples))
    _say(f"NeMo checkpoint: {final}")
    if config.training.export_huggingface:
        _say(f"Hugging Face checkpoint: {run.output / 'huggingface'}")
    report_run(run.output)


def evaluate(config: PopsdConfig, checkpoint: str | None) -> None:
    """Evaluates `student.source`, or `checkpoint`, on `evaluation.sets` or `data.validation`; what is drawn and found
    goes to `<output>/evaluation/<name>/<set>`, see `nemo_popsd.evaluation.records`.
    """
    opened = _open(config, checkpoint)
    # Nothing is collective while samples are drawn; a replica that is done waits for those with longer responses.
    initialize(config.parallel, seed=config.seed, timeout=_LONGEST_EVALUATION)
    without_rows = replace(config, data=replace(config.data, train=SourceConfig(), validation=SourceConfig()))
    model = PurifiedOPSDModel(to_dict_config(without_rows), checkpoint=opened)
    name = checkpoint or config.student.source
    weights = resolve_path(name, setting="student.source")
    planned = plan(config, name, model.tokenizer, vocab_size=model.architecture.vocab_size)
    draw_missing(model, planned, name=name, weights_digest=weights_digest(weights))
    shutdown()
    if is_rank_zero():
        _say(conclude_all(planned, config, model=name))


def diagnose(config: PopsdConfig, checkpoint: str | None) -> None:
    """Diagnoses `student.source`, or `checkpoint`, on rows of `data.train`; page and figures go to
    `<output>/diagnosis/<name>`.
    """
    config.data.validation = SourceConfig()
    name = checkpoint or config.student.source
    place = Path(config.output) / "diagnosis" / as_file_name(name)
    refuse_other_files(place)
    opened = _open(config, checkpoint)
    model = PurifiedOPSDModel(to_dict_config(config), build_trainer(config, logs=False), checkpoint=opened)
    write_diagnosis(model.diagnose(name), place)
    shutdown()


def export_adapter(checkpoint: str, output: str) -> None:
    """Writes the LoRA adapters of a NeMo checkpoint as a directory for PEFT. Rank 0 does it.

    Raises:
        UserError: no LoRA checkpoint, or `output` is not ours to replace.
    """
    if is_rank_zero():
        opened = NemoCheckpoint(checkpoint)
        _refuse_as_output(output, checkpoint, opened)
        write_peft_adapter(opened, Path(output))
    _say(f"PEFT adapter: {output}")


def export(checkpoint: str, output: str) -> None:
    """Writes a NeMo checkpoint as a Hugging Face directory, adapters merged.

    Raises:
        UserError: no checkpoint, or `output` is not ours to replace.
    """
    opened = NemoCheckpoint(checkpoint)
    _refuse_as_output(output, checkpoint, opened)
    config = opened.config
    config.data.train, config.data.validation = SourceConfig(), SourceConfig()
    config.parallel = ParallelConfig()
    model = PurifiedOPSDModel.restore_from(checkpoint, override_config_path=to_dict_config(config))
    model.export_huggingface(output)
    _say(f"Hugging Face checkpoint: {output}")
    shutdown()


def _refuse_as_output(output: str, checkpoint: str, opened: NemoCheckpoint) -> None:
    """Refuses to write an export over its checkpoint or the base, or into either."""
    base = local_path(opened.config.student.source)
    refuse_overlap(Path(output), {"CHECKPOINT": checkpoint, "the base model": base}, setting="OUTPUT")


def build_trainer(
    config: PopsdConfig, *, logs: bool = True, completed: int = 0, may_write: Callable[[], bool] = lambda: True
) -> Trainer:
    """The Lightning trainer of a run: one device per process, since Megatron, not Lightning, connects them.

    Makes the process groups where there are none yet, so that each process knows its device.

    Args:
        config: the run.
        logs: whether metrics go anywhere.
        completed: steps that a resumed run has behind it; Lightning counts from 0 again.
        may_write: whether the output is still this run's, asked before metrics are written.
    """
    initialize(config.parallel, seed=config.seed, timeout=timedelta(seconds=config.training.collective_timeout))
    validates = bool(config.data.validation.path) and config.training.validate_every > 0
    trainer = Trainer(
        accelerator=device().type if device().type == "cpu" else "gpu",
        strategy=MegatronPlacement(device=device()),
        devices=1,
        # Otherwise Lightning recognises Slurm by its variables, insists on counting the ranks, and requeues by itself.
        plugins=[LightningEnvironment()],
        max_steps=(config.training.steps - completed) * config.training.updates_per_step,
        val_check_interval=config.training.validate_every if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=(build_loggers(config, completed=completed, may_write=may_write) if logs else []) or False,
        callbacks=[
            StepProgress(config.training.steps, completed=completed, enabled=config.observability.progress_bar),
            StepBoundary(),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
    # Every so many steps of the run, not of this process, it validates.
    trainer.fit_loop.epoch_loop.batch_progress.total.ready = completed
    return trainer


def _open(config: PopsdConfig, checkpoint: str | None) -> NemoCheckpoint | None:
    """The checkpoint, if there is one; `config` then says how its weights were adapted, which is a fact of it."""
    opened = None if checkpoint is None else NemoCheckpoint(checkpoint)
    if opened is not None:
        source = base_of(opened, otherwise=config.student.source)
        config.student = replace(opened.config.student, source=source, precision=config.student.precision)
    return opened


def _diagnose_in_training(model: PurifiedOPSDModel, name: str) -> None:
    """Before the first step of a run and after its last, unless it is turned off. Changes no generator."""
    if model.settings.diagnosis.in_training and not (name == BEFORE and model.completed_steps):
        told = f"{model.settings.name}, {name} training"
        with preserved_random_state():
            write_diagnosis(model.diagnose(told), Path(model.settings.output) / "diagnosis" / name)


def _validate(trainer: Trainer, model: PurifiedOPSDModel) -> None:
    """Evaluates the current weights; they are not asked twice. Changes no generator: a start that finds the evaluation
    on the disk trains as one that makes it.
    """
    if model.last_evaluation_step != model.completed_steps:
        with preserved_random_state():
            trainer.validate(model, verbose=False)


def _say(text: str) -> None:
    if is_rank_zero():
        print(text, flush=True)
