"""Configuration of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.distillation.config import TargetConfig
from nemo_popsd.errors import UserError
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.settings.bounds import Bounds, check_numbers
from nemo_popsd.settings.checks import one_of


@dataclass(kw_only=True)
class ViewsConfig:
    """`popsd diagnose --views`: the answers from which views of the reference are scored before training.

    Answers are sampled as `evaluation` sets; tokens are measured up to `rollout.max_response_tokens`, as in training.
    """

    source: str = "train"
    """Rows that are answered, which need the text of every view and an answer: `train`, whose references training
    would show, or `validation`. What is chosen on held-out problems makes a later result on them optimistic."""
    problems: Annotated[int, Bounds(2, 10**6)] = 64
    """How many rows, from the start of the source."""
    samples: Annotated[int, Bounds(2, 10**4)] = 8
    """The student's answers to each problem; right and wrong answers to the same problem are compared."""
    teacher_samples: Annotated[int, Bounds(1, 10**4)] = 2
    """The teacher's answers to each problem under each view."""
    uncertain_entropy: Annotated[float, Bounds(0, 100)] = 0.5
    """Entropy of the student, in nats, from which on a token counts as uncertain."""

    def __post_init__(self) -> None:
        one_of("diagnosis.views.source", self.source, ("train", "validation"))
        check_numbers(self, "diagnosis.views")


@dataclass(kw_only=True)
class DiagnosisConfig:
    """Which rollouts the teacher's signal is decomposed on, and how much of it is recorded.

    Rows come from `data.train` (a reference solution is needed), rollouts are generated as `rollout` sets.
    """

    rows: Annotated[int, Bounds(1, 10**6)] = 16
    """How many rows, from the start of `data.train`; one rollout each."""
    shown_rows: list[str] = field(default_factory=list)
    """Ids of rows whose rollouts are shown token by token. They are diagnosed in addition to the first `rows`, wherever
    they are in the file. Empty shows the first `shown`."""
    shown: Annotated[int, Bounds(0, 10**4)] = 4
    """Rollouts shown token by token where `shown_rows` names none."""
    alternatives: Annotated[int, Bounds(1, 10**4)] = 8
    """Most likely tokens of student, base, both teachers and target that are kept for each token shown."""
    listed_tokens: Annotated[int, Bounds(1, 10**4)] = 20
    """Tokens listed as most promoted, and as most suppressed, by each component."""
    position_bins: Annotated[int, Bounds(1, 10**4)] = 16
    """Number of equal intervals of the response over which figures are averaged."""
    entropy_edges: Annotated[list[float], Bounds(0, 100, above=True)] = field(
        default_factory=lambda: [0.01, 0.1, 0.5, 1.0, 2.0]
    )
    """Borders, in nats of the student's entropy, between the bins over which figures are averaged."""
    chunk_tokens: Annotated[int, Bounds(1, 10**7)] = 128
    """Response tokens whose logits exist at one time, on each tensor-parallel rank."""
    in_training: bool = True
    """Diagnose at the start and at the end of every training run: twice `rows` rollouts and their forwards."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Scores of views before training."""

    def __post_init__(self) -> None:
        check_numbers(self, "diagnosis")
        edges = self.entropy_edges
        if edges != sorted(set(edges)):
            raise UserError(
                "configuration",
                got=f"diagnosis.entropy_edges={edges!r}",
                need="different numbers in ascending order",
                fix="set diagnosis.entropy_edges",
            )


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """Everything that a diagnosis reads of a run's configuration."""

    diagnosis: DiagnosisConfig
    """The `diagnosis` section."""
    target: TargetConfig
    """`distillation.target`."""
    rollout: RolloutConfig
    """How responses are sampled; recorded beside the results."""
    seed: int
    """Seed of the run."""
    markers: Sequence[str]
    """`evaluation.markers`."""
    frozen_tokens: int
    """`training.frozen_tokens`."""
    packing: bool
    """`training.packing`."""
    expert_parallel: bool
    """Whether data-parallel ranks share experts, so that their forwards are collective."""
    data_path: str
    """`data.train.path`; recorded."""
    student_source: str
    """`student.source`; recorded."""
