"""The loggers that a configuration asks for."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.observability.jsonl_logger import JsonlLogger
from nemo_popsd.observability.rank import is_rank_zero


def build_loggers(config: PopsdConfig, *, completed: int = 0) -> list[Logger]:
    """JSONL always; TensorBoard and Weights & Biases by setting. Ranks other than 0 get none.

    Args:
        config: the run.
        completed: steps that a resumed run has behind it; TensorBoard hides what was
            written of later ones.

    Raises:
        UserError: W&B is asked for and not installed (on every rank alike).
    """
    settings = config.observability
    if settings.wandb.enabled and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "configuration",
            got="observability.wandb.enabled=true without the package wandb",
            need="pip install 'nemo_popsd[wandb]'",
            mend="install it, or set observability.wandb.enabled=false",
        )
    if not is_rank_zero():
        return []
    output = Path(config.output)
    loggers: list[Logger] = [JsonlLogger(output)]
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
    return loggers
