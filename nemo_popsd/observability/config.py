"""Configuration of loggers and of the progress bar."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.settings.bounds import Bounds, check_numbers
from nemo_popsd.settings.checks import one_of


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases; needs the extra `nemo_popsd[wandb]`."""

    enabled: bool = False
    """Log to W&B."""
    project: str = "nemo_popsd"
    """Name of the project."""
    mode: str = "online"
    """`online` or `offline`."""

    def __post_init__(self) -> None:
        one_of("observability.wandb.mode", self.mode, ("online", "offline"))


@dataclass(kw_only=True)
class MlflowConfig:
    """MLflow; needs the extra `nemo_popsd[mlflow]`."""

    enabled: bool = False
    """Log to MLflow."""
    experiment: str = "nemo_popsd"
    """Name of the experiment; the name of the run is that of the configuration."""
    tracking_uri: str = ""
    """URI of the tracking server; empty writes to files in `<output>/mlflow`, without network access."""


@dataclass(kw_only=True)
class ProfileConfig:
    """Profiles of single steps by PyTorch's profiler in `<output>/dumps`; open them with Perfetto (ui.perfetto.dev)."""

    steps: Annotated[list[int], Bounds(1, 10**8)] = field(default_factory=list)
    """Steps to profile on every rank, counted from 1. A profiled step is slower; its trace contains named ranges for
    the phases of the step."""
    stacks: bool = False
    """Record the Python stack of every operation."""
    memory: bool = False
    """Record every allocation."""

    def __post_init__(self) -> None:
        check_numbers(self, "observability.profile")


@dataclass(kw_only=True)
class ObservabilityConfig:
    """Destinations of metrics in addition to the terminal and `metrics.jsonl`, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard events to `<output>/tensorboard`."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    """MLflow."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profiles of single steps."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""
