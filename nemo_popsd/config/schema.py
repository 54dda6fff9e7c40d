"""The whole configuration of a run: one section per room, each declared beside its owner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.data.config import DataConfig
from nemo_popsd.diagnosis.config import DiagnosisConfig
from nemo_popsd.distillation.config import DistillationConfig
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.megatron.config import OptimizerConfig, StudentConfig
from nemo_popsd.observability.config import ObservabilityConfig
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.settings.bounds import Bounds, Text, check_numbers
from nemo_popsd.training.config import TrainingConfig


@dataclass(kw_only=True)
class PopsdConfig:
    """A run. Every key of `conf/*.yaml` is declared here or in a section; any other key is an error."""

    name: Annotated[str, Text.NAME] = "popsd"
    """Name of the run."""
    output: Annotated[str, Text.PATH] = "runs/popsd"
    """Directory for checkpoints, metrics and the resolved configuration."""
    overwrite: bool = False
    """Begin at step 1 where `output` already holds a run of nemo_popsd (its mark `.nemo_popsd` says so): the files that
    it wrote are removed, and nothing else is. Otherwise that run goes on."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 1234
    """Seed of data order, rollouts and adapters. Nothing drawn from it depends on the parallel layout."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The model that is trained."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Its layout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows and contexts."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """On-policy sampling."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Target and divergence."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam, schedule, clipping."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out accuracy and epistemic markers."""
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    """The paper's analysis of the teacher's signal, token by token."""
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    """Where metrics go."""

    def __post_init__(self) -> None:
        check_numbers(self)
