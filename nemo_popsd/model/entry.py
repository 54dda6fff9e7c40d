"""What the commands do, once the configuration is checked."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.config.consistency import RUN_FILES
from nemo_popsd.config.loading import save_resolved, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.evaluation.summary import EvaluationSummary, comparison_table
from nemo_popsd.model.callbacks import SaveCheckpoints
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.observability.loggers import build_loggers
from nemo_popsd.observability.progress import StepProgress
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.runtime.distributed import device, initialize, shutdown


def train(config: PopsdConfig) -> None:
    """Evaluates, trains, evaluates again, and writes a NeMo and a Hugging Face checkpoint below `config.output`."""
    output = Path(config.output)
    initialize(tensor_parallel=config.parallel.tensor, seed=config.seed)
    if is_rank_zero():
        _remove_previous_run(output)
        save_resolved(config, output / "config.yaml")
    model = PurifiedOPSDModel(to_dict_config(config), trainer := build_trainer(config))
    summaries: dict[str, EvaluationSummary] = {}
    if config.data.validation.path:
        summaries["before"] = _validate(trainer, model)
    trainer.fit(model)
    if config.data.validation.path:
        summaries["after"] = _validate(trainer, model)
    model.save_to(str(output / "checkpoints" / "final"))
    if config.training.export_huggingface:
        model.export_huggingface(output / "huggingface")
    if summaries:
        _say(comparison_table(summaries))
    _say(f"NeMo checkpoint: {output / 'checkpoints' / 'final'}")
    if config.training.export_huggingface:
        _say(f"Hugging Face checkpoint: {output / 'huggingface'}")
    shutdown()


def evaluate(config: PopsdConfig, checkpoint: str | None) -> None:
    """Evaluates `student.source`, or `checkpoint`, on `data.validation`."""
    config.data.train = SourceConfig()
    initialize(tensor_parallel=config.parallel.tensor, seed=config.seed)
    trainer = build_trainer(config)
    model = PurifiedOPSDModel(
        to_dict_config(config), trainer, checkpoint=None if checkpoint is None else NemoCheckpoint(checkpoint)
    )
    _say(comparison_table({checkpoint or config.student.source: _validate(trainer, model)}))
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


def build_trainer(config: PopsdConfig) -> Trainer:
    """The Lightning trainer of a run: one device per process, since Megatron, not Lightning, connects them."""
    validates = bool(config.data.validation.path) and config.training.validate_every > 0
    return Trainer(
        accelerator=device().type if device().type == "cpu" else "gpu",
        strategy=SingleDeviceStrategy(device=device()),
        devices=1,
        max_steps=config.training.steps,
        val_check_interval=config.training.validate_every if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=build_loggers(config) or False,
        callbacks=[
            StepProgress(config.training.steps, enabled=config.observability.progress_bar),
            SaveCheckpoints(config.training.checkpoint_every, Path(config.output) / "checkpoints"),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )


def _remove_previous_run(output: Path) -> None:
    """Only `overwrite=true` lets a run come this far where another one was."""
    for name in RUN_FILES:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _validate(trainer: Trainer, model: PurifiedOPSDModel) -> EvaluationSummary:
    start = time.perf_counter()
    trainer.validate(model, verbose=False)
    summary = model.last_evaluation
    assert summary is not None
    _say(
        f"step {model.completed_steps}: accuracy {summary.accuracy:.1%} on {summary.problems} held-out problems, "
        f"{summary.mean_tokens:.0f} tokens per answer ({time.perf_counter() - start:.0f} s)"
    )
    return summary


def _say(text: str) -> None:
    if is_rank_zero():
        print(text, flush=True)
