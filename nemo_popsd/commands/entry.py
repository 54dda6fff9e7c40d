"""The commands `train`, `evaluate`, `diagnose` and `export`, after the configuration has been checked."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Trainer

from nemo_popsd.checkpoint.model_card import CardOptions
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.peft_adapter import write_peft_adapter
from nemo_popsd.checkpoint.retention import FINAL
from nemo_popsd.checkpoint.source import base_of
from nemo_popsd.commands.cards import card_of, run_of
from nemo_popsd.commands.pages import report_run, write_diagnosis
from nemo_popsd.commands.run_directory import RunDirectory
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.models import model_path
from nemo_popsd.diagnosis.ownership import refuse_other_files
from nemo_popsd.errors import SAVED_AND_STOPPED, StopRequested
from nemo_popsd.evaluation.run import as_file_name, conclude_all, prepare_sets, weights_digest
from nemo_popsd.files.attempts import RankRecord
from nemo_popsd.files.output_lock import OutputLock
from nemo_popsd.files.ownership import refuse_overlap
from nemo_popsd.megatron.config import FP8Config
from nemo_popsd.model.evaluation import before_and_after, generate_missing
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.model.trainer import build_trainer
from nemo_popsd.observability.flight_recorder import FOLDER, set_up_flight_recorder
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.observability.trackers import close_trackers
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import initialize, shutdown
from nemo_popsd.parallel.launcher import rank, world_size
from nemo_popsd.report.run import AFTER, BEFORE
from nemo_popsd.runtime.early_signals import before_leaving
from nemo_popsd.runtime.random_state import preserved_random_state

LONGEST_EVALUATION = timedelta(days=7)
"""Time limit of collectives between replicas while they generate: they wait for the one with the longest responses."""


def train(config: PopsdConfig, *, lock: OutputLock | None = None) -> int:
    """Train in `config.output`, from step 1 or from its newest complete checkpoint.

    Evaluates before and after training, and writes a NeMo and a Hugging Face checkpoint.

    Args:
        config: configuration of the run.
        lock: lock of the output, on rank 0; without it, two runs in the same directory are not detected.

    Returns:
        0, or `SAVED_AND_STOPPED` if a signal requested a stop and the last completed step was saved.
    """
    with RankRecord(config.output, rank=rank(), ranks=world_size(), replaces=config.overwrite) as record:
        if lock is not None:
            record.begin(lock.hold.token)
        before_leaving.append(record.end)
        try:
            status = _train_recorded(config, lock, record)
        finally:
            before_leaving.remove(record.end)
        record.end(status)
    return status


def _train_recorded(config: PopsdConfig, lock: OutputLock | None, record: RankRecord) -> int:
    """Do the work of `train` while the attempt is recorded."""
    run = RunDirectory(config)
    set_up_flight_recorder(config.output)
    initialize(config.parallel, seed=config.seed, timeout=timedelta(seconds=config.training.collective_timeout))
    run.share_lock(lock)
    record.begin(run.attempt)
    checkpoint = run.checkpoint()
    config = run.decided(checkpoint)
    completed = checkpoint.step if checkpoint else 0
    trainer = build_trainer(config, completed=completed, may_write=run.is_held)
    model = PurifiedOPSDModel(to_dict_config(config), trainer, checkpoint=checkpoint, resume=checkpoint is not None)
    model.checkpoints.check_lock = run.check_lock
    run.begin(completed)
    if model.training_data is not None:
        run.record_data(model.training_data.report)
    if dist.get_backend() == "nccl":
        (run.output / FOLDER).mkdir(parents=True, exist_ok=True)  # the Flight Recorder does not create it
    _print(f"resuming after step {completed} from {checkpoint.directory}" if checkpoint else "beginning at step 1")
    model.stop.install()
    if sys.stderr.isatty():
        _print("Ctrl-C saves the last completed step and stops, and the same command resumes; twice ends at once")
    succeeded: bool | None = False
    try:
        _train(config, trainer, model, run)
        succeeded = True
    except StopRequested:
        succeeded = None
        model.checkpoints.save_last_step()
        run.mark_stopped(model.completed_steps)
        again = "the same command" + (" with overwrite=false" if config.overwrite else "")
        _print(f"stopped by a signal; saved after step {model.completed_steps}; {again} resumes it")
        return SAVED_AND_STOPPED
    finally:
        model.stop.uninstall()
        close_trackers(trainer.loggers, succeeded)
    shutdown()
    return 0


def _train(config: PopsdConfig, trainer: Trainer, model: PurifiedOPSDModel, run: RunDirectory) -> None:
    validates, every = bool(config.data.validation.path), config.training.validate_every
    if model.completed_steps < config.training.steps:
        if validates and (model.completed_steps == 0 or (every > 0 and model.completed_steps % every == 0)):
            _validate(trainer, model, run)  # an earlier attempt may have been killed before it
        _diagnose_in_training(model, BEFORE)
        trainer.fit(model)
        final = model.checkpoints.save_final()
    else:
        final = model.checkpoints.folder / FINAL
    if validates:
        _validate(trainer, model, run)
    _diagnose_in_training(model, AFTER)
    if config.training.export_huggingface:
        run.refuse_lost_lock()
        place = run.output / "huggingface"
        card = card_of(NemoCheckpoint(final), place, run=run.output, adapter=False) if is_rank_zero() else None
        model.export_huggingface(place, card=card)
    run.mark_finished(model.completed_steps)
    if validates and is_rank_zero():
        _print(before_and_after(config.output, model.completed_steps, resamples=config.evaluation.resamples))
    _print(f"NeMo checkpoint: {final}")
    if config.training.export_huggingface:
        _print(f"Hugging Face checkpoint: {run.output / 'huggingface'}")
    report_run(run.output)


def evaluate(config: PopsdConfig, checkpoint: str | None) -> None:
    """Evaluate `student.source`, or `checkpoint`, on `evaluation.sets` or `data.validation`.

    Samples and scores are written to `<output>/evaluation/<name>/<set>`, see `nemo_popsd.evaluation.records`.
    """
    name = checkpoint or config.student.source
    config, opened = _open(config, checkpoint)
    # Replicas do not communicate while they generate; a finished replica waits for those with longer responses.
    initialize(config.parallel, seed=config.seed, timeout=LONGEST_EVALUATION)
    without_rows = replace(config, data=replace(config.data, train=SourceConfig(), validation=SourceConfig()))
    model = PurifiedOPSDModel(to_dict_config(without_rows), checkpoint=opened)
    digest = weights_digest(model_path(name))
    problem_sets = prepare_sets(
        config.evaluation,
        config.data,
        model.tokenizer,
        model=name,
        output=config.output,
        vocab_size=model.architecture.vocab_size,
    )
    for problem_set in problem_sets:
        model.refuse_long_evaluation(problem_set.prompts)
    generate_missing(model.sampler, problem_sets, model=name, digest=digest)
    shutdown()
    if is_rank_zero():
        _print(conclude_all(problem_sets, config.evaluation, model=name))


def diagnose(config: PopsdConfig, checkpoint: str | None) -> None:
    """Diagnose `student.source`, or `checkpoint`, on rows of `data.train`.

    The page and its data are written to `<output>/diagnosis/<name>`.
    """
    name = checkpoint or config.student.source
    directory = Path(config.output) / "diagnosis" / as_file_name(name)
    refuse_other_files(directory)
    config, opened = _open(config, checkpoint)
    config = replace(config, data=replace(config.data, validation=SourceConfig()))
    model = PurifiedOPSDModel(to_dict_config(config), build_trainer(config, logs=False), checkpoint=opened)
    write_diagnosis(model.diagnose(name), directory)
    shutdown()


def export_adapter(checkpoint: str, output: str, *, options: CardOptions) -> None:
    """Write the LoRA adapters of a NeMo checkpoint as a directory for PEFT, on rank 0.

    Args:
        checkpoint: checkpoint of a run with LoRA.
        output: directory to write.
        options: options of the model card, and the name of the base.

    Raises:
        UserError: `checkpoint` is not a LoRA checkpoint, or `output` contains files that this package did not write.
    """
    if is_rank_zero():
        opened = NemoCheckpoint(checkpoint)
        _refuse_as_output(output, checkpoint, opened)
        card = card_of(opened, Path(output).absolute(), run=run_of(checkpoint), adapter=True, options=options)
        write_peft_adapter(opened, Path(output), base=options.base, card=card)
    _print(f"PEFT adapter: {output}")


def export(checkpoint: str, output: str, *, options: CardOptions) -> None:
    """Write a NeMo checkpoint as a Hugging Face directory, with merged adapters.

    Args:
        checkpoint: checkpoint of a run or of a conversion.
        output: directory to write.
        options: options of the model card.

    Raises:
        UserError: `checkpoint` is not a checkpoint, or `output` contains files that this package did not write.
    """
    opened = NemoCheckpoint(checkpoint)
    _refuse_as_output(output, checkpoint, opened)
    card = card_of(opened, Path(output).absolute(), run=run_of(checkpoint), adapter=False, options=options)
    data = replace(opened.config.data, train=SourceConfig(), validation=SourceConfig())
    config = replace(opened.config, data=data, parallel=ParallelConfig(), fp8=FP8Config())
    model = PurifiedOPSDModel.restore_from(checkpoint, override_config_path=to_dict_config(config))
    model.export_huggingface(output, card=card)
    _print(f"Hugging Face checkpoint: {output}")
    shutdown()


def _refuse_as_output(output: str, checkpoint: str, opened: NemoCheckpoint) -> None:
    """Refuse an output that equals, contains or is inside the checkpoint or the base."""
    base = model_path(opened.config.student.source)
    refuse_overlap(Path(output), {"CHECKPOINT": checkpoint, "the base model": base}, setting="OUTPUT")


def _open(config: PopsdConfig, checkpoint: str | None) -> tuple[PopsdConfig, NemoCheckpoint | None]:
    """Open the checkpoint, if any, and set the adaptation of `config` to that of the checkpoint."""
    if checkpoint is None:
        return config, None
    opened = NemoCheckpoint(checkpoint)
    source = base_of(opened, otherwise=config.student.source)
    student = replace(opened.config.student, source=source, precision=config.student.precision)
    return replace(config, student=student), opened


def _diagnose_in_training(model: PurifiedOPSDModel, name: str) -> None:
    """Diagnose before the first step or after the last, unless this is disabled. Preserves the random state."""
    if model.settings.diagnosis.in_training and not (name == BEFORE and model.completed_steps):
        title = f"{model.settings.name}, {name} training"
        with preserved_random_state():
            write_diagnosis(model.diagnose(title), Path(model.settings.output) / "diagnosis" / name)


def _validate(trainer: Trainer, model: PurifiedOPSDModel, run: RunDirectory) -> None:
    """Evaluate the current weights, unless this or an earlier attempt has evaluated them.

    Preserves the random state, so that a run trains identically whether or not the evaluation already exists.
    """
    if not run.is_validated(model.completed_steps):
        with preserved_random_state():
            trainer.validate(model, verbose=False)


def _print(text: str) -> None:
    if is_rank_zero():
        print(text, flush=True)
