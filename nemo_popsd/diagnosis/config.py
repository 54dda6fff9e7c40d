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

    Answers are sampled with the settings of `evaluation`; tokens are measured up to `rollout.max_response_tokens`, as
    in training.
    """

    source: str = "train"
    """Rows to answer: `train`, with the references of training, or `validation`. They need the text of every view and
    an answer. If you choose a view on held-out problems, later results on these problems are biased upwards."""
    problems: Annotated[int, Bounds(2, 10**6)] = 64
    """Number of rows, from the start of the source."""
    samples: Annotated[int, Bounds(2, 10**4)] = 8
    """Number of answers of the student per problem; right and wrong answers to the same problem are compared."""
    teacher_samples: Annotated[int, Bounds(1, 10**4)] = 2
    """Number of answers of the teacher per problem and view."""
    uncertain_entropy: Annotated[float, Bounds(0, 100)] = 0.5
    """Minimum entropy of the student, in nats, at which a token counts as uncertain."""

    def __post_init__(self) -> None:
        one_of("diagnosis.views.source", self.source, ("train", "validation"))
        check_numbers(self, "diagnosis.views")


@dataclass(kw_only=True)
class DiagnosisConfig:
    """The rollouts on which the teacher's signal is decomposed, and the recorded results.

    Rows are from `data.train` and need a reference solution; rollouts are generated with the settings of `rollout`.
    """

    rows: Annotated[int, Bounds(1, 10**6)] = 16
    """Number of rows, from the start of `data.train`, with one rollout each."""
    shown_rows: list[str] = field(default_factory=list)
    """Ids of rows whose rollouts are shown token by token. They may be anywhere in the file and are diagnosed in
    addition to the first `rows`. Empty shows the first `shown` rows."""
    shown: Annotated[int, Bounds(0, 10**4)] = 4
    """Number of rollouts shown token by token if `shown_rows` is empty."""
    alternatives: Annotated[int, Bounds(1, 10**4)] = 8
    """Number of most likely tokens of student, base, both teachers and target to record for each shown token."""
    listed_tokens: Annotated[int, Bounds(1, 10**4)] = 20
    """Number of tokens to list as most promoted, and as most suppressed, by each component."""
    position_bins: Annotated[int, Bounds(1, 10**4)] = 16
    """Number of equal intervals of the response over which statistics are averaged."""
    entropy_edges: Annotated[list[float], Bounds(0, 100, above=True)] = field(
        default_factory=lambda: [0.01, 0.1, 0.5, 1.0, 2.0]
    )
    """Edges, in nats of the student's entropy, between the bins over which statistics are averaged."""
    chunk_tokens: Annotated[int, Bounds(1, 10**7)] = 128
    """Number of response tokens whose logits exist at the same time, on each tensor-parallel rank."""
    in_training: bool = True
    """Diagnose before and after every training run; each costs `rows` rollouts and their forwards."""
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
    """The part of a run's configuration that a diagnosis reads."""

    diagnosis: DiagnosisConfig
    """The `diagnosis` section."""
    target: TargetConfig
    """`distillation.target`."""
    rollout: RolloutConfig
    """Sampling of responses; recorded with the results."""
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
