"""The Lightning trainer of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.model.strategy import MegatronPlacement
from nemo_popsd.observability.loggers import LoggedRun, build_loggers
from nemo_popsd.observability.progress import StepProgress
from nemo_popsd.parallel.distributed import device, initialize


def build_trainer(
    config: PopsdConfig, *, logs: bool = True, completed: int = 0, may_write: Callable[[], bool] = lambda: True
) -> Trainer:
    """Build the trainer of a run: one device per process, because Megatron, not Lightning, connects the processes.

    Creates the process groups if they do not exist, so that each process knows its device.

    Args:
        config: configuration of the run.
        logs: whether metrics are written.
        completed: steps that a resumed run has already trained; Lightning counts from 0.
        may_write: whether the output still belongs to this run; called before metrics are written.
    """
    initialize(config.parallel, seed=config.seed, timeout=timedelta(seconds=config.training.collective_timeout))
    validates = bool(config.data.validation.path) and config.training.validate_every > 0
    run = LoggedRun(name=config.name, output=Path(config.output), overwrite=config.overwrite, parameters=asdict(config))
    loggers = build_loggers(config.observability, run, completed=completed, may_write=may_write) if logs else []
    trainer = Trainer(
        accelerator=device().type if device().type == "cpu" else "gpu",
        strategy=MegatronPlacement(device=device()),
        devices=1,
        # Otherwise Lightning detects Slurm by its variables, refuses one device per process, and requeues the job.
        plugins=[LightningEnvironment()],
        max_steps=(config.training.steps - completed) * config.training.updates_per_step,
        val_check_interval=config.training.validate_every if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=loggers or False,
        callbacks=[StepProgress(config.training.steps, completed=completed, enabled=config.observability.progress_bar)],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
    # `validate_every` counts the steps of the run, not of this process.
    trainer.fit_loop.epoch_loop.batch_progress.total.ready = completed
    return trainer
