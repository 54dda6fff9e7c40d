"""The complete configuration of a run: one section per package, each declared in the package that uses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.data.config import DataConfig
from nemo_popsd.diagnosis.config import DiagnosisConfig
from nemo_popsd.distillation.config import DistillationConfig
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.megatron.config import FP8Config, OptimizerConfig, StudentConfig
from nemo_popsd.megatron.passthrough import MegatronConfig
from nemo_popsd.observability.config import ObservabilityConfig
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.settings.bounds import Bounds, Text, check_numbers
from nemo_popsd.training.config import GuardConfig, TrainingConfig


@dataclass(kw_only=True)
class PopsdConfig:
    """Configuration of a run. Every key of `conf/*.yaml` is declared here or in a section; other keys are errors."""

    name: Annotated[str, Text.NAME] = "popsd"
    """Name of the run. If omitted, the name of the configuration file without `.yaml`."""
    output: Annotated[str, Text.PATH] = "runs/popsd"
    """Directory for checkpoints, metrics and the resolved configuration. If omitted, `runs/NAME`, where NAME is the
    run's name. All relative paths are relative to the directory in which `popsd` is started, not to the directory of
    the configuration."""
    overwrite: bool = False
    """If `output` already contains a run of nemo_popsd (marked by `.nemo_popsd`), remove the files that the run wrote,
    and nothing else, and start at step 1. If false, resume that run."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 1234
    """Seed of data order, rollouts and adapters. The random numbers do not depend on the parallel layout."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The model that is trained."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The parallel layout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows and contexts."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation of on-policy responses."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Target and divergence."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam, schedule, clipping."""
    fp8: FP8Config = field(default_factory=FP8Config)
    """FP8 in the layers, by type of pass."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Fields of megatron-core's configuration."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training loop."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Guards: quantities that are monitored during the run."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Accuracy, epistemic markers and response length on problem sets."""
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    """The paper's analysis of the teacher's signal, token by token."""
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    """Loggers and progress bar."""

    def __post_init__(self) -> None:
        check_numbers(self)
