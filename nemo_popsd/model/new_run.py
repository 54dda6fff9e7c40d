"""Starting a training run from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from nemo_popsd.config.consistency import check_training_run, holds_a_run
from nemo_popsd.config.loading import load_config, save_resolved
from nemo_popsd.config.resuming import with_decisions
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.files.ownership import RUN, write_mark
from nemo_popsd.model.trainer import build_trainer
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.parallel.agreement import raise_on_all_ranks
from nemo_popsd.parallel.launcher import read_launch


def start_run(path: str | Path, overrides: Sequence[str]) -> tuple[PopsdConfig, Trainer]:
    """Read and check a configuration, build the trainer, and reserve `output` for the run. Collective.

    Args:
        path: configuration file.
        overrides: ``key=value`` with dotted keys.

    Raises:
        UserError: see `load_config` and `check_training_run`; or `output` already contains a run.
    """
    config = with_decisions(load_config(path, overrides), None)
    check_training_run(config, world_size=read_launch().world_size)
    if holds_a_run(config.output):
        raise UserError(
            "configuration",
            got=f"output={config.output!r}, which contains a run",
            need="a directory for a new run",
            fix="set output, or resume or overwrite that run with `popsd train`",
        )
    trainer = build_trainer(config)
    raise_on_all_ranks(
        f"output {config.output}",
        lambda: _claim(config) if is_rank_zero() else None,
        need="a directory that can be written",
        fix="set output",
    )
    return config, trainer


def _claim(config: PopsdConfig) -> None:
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_mark(output, RUN)
    save_resolved(config, output / "config.yaml")
