"""Building the training step of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.evaluation.markers import count_markers
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.model.cost import step_cost
from nemo_popsd.model.data import TrainingData
from nemo_popsd.observability.dumps import recorded
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import RolloutEngine, SamplingParams
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.training.mismatch import MismatchBounds, MismatchGuard
from nemo_popsd.training.rollouts import StepRollouts
from nemo_popsd.training.step import OnPolicyStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Update = Callable[[], None]
RunStep = Callable[[int, Sequence[PromptRow], StudentOptimizer, Update], StepMetrics]


def build_step(
    config: PopsdConfig,
    student: Student,
    engine: RolloutEngine,
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    *,
    check_lock: Callable[[], None],
    stop: StopSignals,
) -> RunStep:
    """The training step of a run: called as `OnPolicyStep`; it writes what `observability.dumps` describes.

    Args:
        config: the run.
        student: the model and its base.
        engine: generates from the student's live weights.
        sampling: how tokens are sampled.
        tokenizer: the student's.
        data: the training rows.
        check_lock: raises if the output belongs to another run; called before rollouts are written.
        stop: requests to stop.
    """
    rollouts = StepRollouts(
        config.rollout,
        student,
        engine,
        sampling,
        seed=config.seed,
        last_step=config.training.steps,
        store=RolloutStore(config.output, check_lock=check_lock) if config.rollout.save else None,
        rows=data.rows(),
        stop=stop,
    )

    def markers(response: Sequence[int]) -> int:
        return sum(count_markers(tokenizer.decode(list(response)), config.evaluation.markers).values())

    mismatch = MismatchGuard(config.guard, MismatchBounds.of(config.guard, exact=_is_exact(config)), student.split)
    cost = step_cost(config)
    step = OnPolicyStep(config.training, config.distillation, student, rollouts, markers, mismatch, cost)

    def run(number: int, rows: Sequence[PromptRow], optimizer: StudentOptimizer, update: Update) -> StepMetrics:
        with recorded(config.observability.profile, config.output, step=number, rank=dist.get_rank()):
            return step(number, rows, optimizer, update)

    return run


def _is_exact(config: PopsdConfig) -> bool:
    """Whether engine and trainer compute in fp32 with the same weights."""
    same = config.rollout.engine == "megatron" or config.rollout.vllm.dtype in ("student", "fp32")
    return config.student.precision == "fp32" and same and config.rollout.age_bound == 0
