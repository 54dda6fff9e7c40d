"""The loggers that a configuration asks for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.observability.jsonl_logger import JsonlLogger
from nemo_popsd.observability.rank import is_rank_zero


def build_loggers(
    config: PopsdConfig, *, completed: int = 0, may_write: Callable[[], bool] = lambda: True
) -> list[Logger]:
    """JSONL always; TensorBoard, Weights & Biases and MLflow by setting. Ranks other than 0 get none.

    Args:
        config: the run.
        completed: steps that a resumed run has behind it; TensorBoard hides what was
            written of later ones.
        may_write: see `JsonlLogger`.

    Raises:
        UserError: W&B or MLflow is asked for and not installed (on every rank alike).
    """
    settings = config.observability
    for package, wanted in (("wandb", settings.wandb.enabled), ("mlflow", settings.mlflow.enabled)):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                "configuration",
                got=f"observability.{package}.enabled=true without the package {package}",
                need=f"pip install 'nemo_popsd[{package}]'",
                mend=f"install it, or set observability.{package}.enabled=false",
            )
    if not is_rank_zero():
        return []
    output = Path(config.output)
    loggers: list[Logger] = [JsonlLogger(output, may_write=may_write)]
    if settings.tensorboard:
        purge = completed + 1 if (output / "tensorboard").exists() and not config.overwrite else None
        loggers.append(TensorBoardLogger(save_dir=output, name="tensorboard", version="", purge_step=purge))
    if settings.wandb.enabled:
        output.mkdir(parents=True, exist_ok=True)  # wandb falls back to /tmp for a directory that does not exist
        loggers.append(
            WandbLogger(
                save_dir=output,
                name=config.name,
                project=settings.wandb.project,
                offline=settings.wandb.mode == "offline",
                config=asdict(config),
            )
        )
    if settings.mlflow.enabled:
        loggers.append(_mlflow_logger(config, output))
    return loggers


def _mlflow_logger(config: PopsdConfig, output: Path) -> MLFlowLogger:
    """The configuration becomes the run's parameters, of which MLflow keeps 250 characters each."""
    settings = config.observability.mlflow
    # Read when mlflow is imported or a store opened; what the user has set stays. Files need no database package, which
    # mlflow-skinny lacks; recent versions want to be asked for them. It reports its use to its makers otherwise.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logger = MLFlowLogger(
        experiment_name=settings.experiment,
        run_name=config.name,
        tracking_uri=settings.tracking_uri or (output / "mlflow").absolute().as_uri(),
    )
    logger.log_hyperparams(asdict(config))
    return logger
