"""Builds the loggers of a run from the settings section `observability`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from nemo_popsd.observability.config import MlflowConfig, ObservabilityConfig, WandbConfig
from nemo_popsd.observability.jsonl_logger import JsonlLogger
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.observability.trackers import Tracker, read_id, store_id, store_link

_WANDB, _MLFLOW = "wandb", "mlflow"


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """Properties of a run that loggers need."""

    name: str
    """Name of the run in W&B and MLflow."""
    output: Path
    """Directory for local files."""
    overwrite: bool
    """Whether the run restarts at step 1; W&B and MLflow then create a new entry."""
    parameters: Mapping[str, object]
    """The resolved configuration, nested by section."""


def build_loggers(
    settings: ObservabilityConfig,
    run: LoggedRun,
    *,
    completed: int = 0,
    may_write: Callable[[], bool] = lambda: True,
) -> list[Logger]:
    """Builds the JSONL logger, and trackers for TensorBoard, W&B and MLflow if enabled. Only rank 0 has loggers.

    A resumed run keeps its entries in W&B and MLflow.

    Args:
        settings: enabled trackers and their settings.
        run: the run to record.
        completed: number of steps that a resumed run has completed; TensorBoard hides events of later steps.
        may_write: see `JsonlLogger`.
    """
    if not is_rank_zero():
        return []
    output = run.output
    loggers: list[Logger] = [JsonlLogger(output, may_write=may_write)]
    if settings.tensorboard:
        purge = completed + 1 if (output / "tensorboard").exists() and not run.overwrite else None

        def tensorboard() -> Logger:
            return TensorBoardLogger(save_dir=output, name="tensorboard", version="", purge_step=purge)

        loggers.append(Tracker("TensorBoard", tensorboard, _finish_tensorboard, takes_hyperparameters=True))
    if settings.wandb.enabled:
        loggers.append(Tracker("W&B", lambda: _wandb_logger(settings.wandb, run), _finish_wandb))
    if settings.mlflow.enabled:
        loggers.append(Tracker("MLflow", lambda: _mlflow_logger(settings.mlflow, run), _finish_mlflow))
    return loggers


def _wandb_logger(settings: WandbConfig, run: LoggedRun) -> WandbLogger:
    run.output.mkdir(parents=True, exist_ok=True)  # wandb falls back to /tmp if the directory does not exist
    run_id = None if run.overwrite else read_id(run.output, _WANDB)
    if run_id is None:
        run_id = secrets.token_hex(8)
        store_id(run.output, _WANDB, run_id)
    logger = WandbLogger(
        save_dir=run.output,
        name=run.name,
        project=settings.project,
        offline=settings.mode == "offline",
        id=run_id,
        resume="allow",
        config=dict(run.parameters),
        allow_val_change=True,
    )
    store_link(run.output, _WANDB, logger.experiment.url)  # starts the run
    return logger


def _mlflow_logger(settings: MlflowConfig, run: LoggedRun) -> MLFlowLogger:
    """The MLflow logger. It logs the configuration as parameters; MLflow keeps their first values, truncated to 250
    characters.
    """
    # Read when mlflow is imported or a store is opened; values set by the user are kept. The file store works without
    # the database package that mlflow-skinny lacks; recent versions require the first variable for it. The second
    # variable disables telemetry.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    run_id = None if run.overwrite else read_id(run.output, _MLFLOW)
    logger = MLFlowLogger(
        experiment_name=settings.experiment,
        run_name=run.name,
        tracking_uri=settings.tracking_uri or (run.output / "mlflow").absolute().as_uri(),
        run_id=run_id,
    )
    if run_id is None:
        logger.log_hyperparams(dict(run.parameters))
        run.output.mkdir(parents=True, exist_ok=True)
        store_id(run.output, _MLFLOW, str(logger.run_id))
    else:
        logger.experiment.update_run(run_id, status="RUNNING")
    if settings.tracking_uri.startswith("http"):
        place = f"#/experiments/{logger.experiment_id}/runs/{logger.run_id}"
        store_link(run.output, _MLFLOW, f"{settings.tracking_uri.rstrip('/')}/{place}")
    return logger


def _finish_tensorboard(logger: Logger, succeeded: bool | None) -> None:
    logger.finalize("success")


def _finish_wandb(logger: WandbLogger, succeeded: bool | None) -> None:
    logger.experiment.finish(exit_code=1 if succeeded is False else 0)


def _finish_mlflow(logger: Logger, succeeded: bool | None) -> None:
    if succeeded is not None:
        logger.finalize("success" if succeeded else "failed")
