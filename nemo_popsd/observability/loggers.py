"""The loggers that a configuration asks for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.observability.jsonl_logger import JsonlLogger
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.observability.trackers import Tracker, keep_id, read_id

_WANDB, _MLFLOW = "wandb", "mlflow"


def build_loggers(
    config: PopsdConfig, *, completed: int = 0, may_write: Callable[[], bool] = lambda: True
) -> list[Logger]:
    """JSONL always; TensorBoard, Weights & Biases and MLflow by setting, as trackers. Ranks other than 0 get none.

    A run that is resumed goes on under the names that it has in W&B and MLflow; with `overwrite` it gets new ones.

    Args:
        config: the run.
        completed: steps that a resumed run has behind it; TensorBoard hides what was
            written of later ones.
        may_write: see `JsonlLogger`.
    """
    if not is_rank_zero():
        return []
    settings, output = config.observability, Path(config.output)
    loggers: list[Logger] = [JsonlLogger(output, may_write=may_write)]
    if settings.tensorboard:
        purge = completed + 1 if (output / "tensorboard").exists() and not config.overwrite else None

        def tensorboard() -> Logger:
            return TensorBoardLogger(save_dir=output, name="tensorboard", version="", purge_step=purge)

        loggers.append(Tracker("TensorBoard", tensorboard, _finish_tensorboard, takes_hyperparameters=True))
    if settings.wandb.enabled:
        loggers.append(Tracker("W&B", lambda: _wandb_logger(config, output), _finish_wandb))
    if settings.mlflow.enabled:
        loggers.append(Tracker("MLflow", lambda: _mlflow_logger(config, output), _finish_mlflow))
    return loggers


def _wandb_logger(config: PopsdConfig, output: Path) -> WandbLogger:
    settings = config.observability.wandb
    output.mkdir(parents=True, exist_ok=True)  # wandb falls back to /tmp for a directory that does not exist
    name = None if config.overwrite else read_id(output, _WANDB)
    if name is None:
        name = secrets.token_hex(8)
        keep_id(output, _WANDB, name)
    logger = WandbLogger(
        save_dir=output,
        name=config.name,
        project=settings.project,
        offline=settings.mode == "offline",
        id=name,
        resume="allow",
        config=asdict(config),
        allow_val_change=True,
    )
    _ = logger.experiment  # begins the run
    return logger


def _mlflow_logger(config: PopsdConfig, output: Path) -> MLFlowLogger:
    """The configuration becomes the run's parameters, of which MLflow keeps 250 characters each, and the first."""
    settings = config.observability.mlflow
    # Read when mlflow is imported or a store opened; what the user has set stays. Files need no database package, which
    # mlflow-skinny lacks; recent versions want to be asked for them. It reports its use to its makers otherwise.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    known = None if config.overwrite else read_id(output, _MLFLOW)
    logger = MLFlowLogger(
        experiment_name=settings.experiment,
        run_name=config.name,
        tracking_uri=settings.tracking_uri or (output / "mlflow").absolute().as_uri(),
        run_id=known,
    )
    if known is None:
        logger.log_hyperparams(asdict(config))
        output.mkdir(parents=True, exist_ok=True)
        keep_id(output, _MLFLOW, str(logger.run_id))
    else:
        logger.experiment.update_run(known, status="RUNNING")
    return logger


def _finish_tensorboard(logger: Any, succeeded: bool | None) -> None:
    logger.finalize("success")


def _finish_wandb(logger: Any, succeeded: bool | None) -> None:
    logger.experiment.finish(exit_code=1 if succeeded is False else 0)


def _finish_mlflow(logger: Any, succeeded: bool | None) -> None:
    if succeeded is not None:
        logger.finalize("success" if succeeded else "failed")
