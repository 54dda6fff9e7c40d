"""Building the training step of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import shares_prefixes
from nemo_popsd.evaluation.answers import extract_answer
from nemo_popsd.evaluation.equivalence import AnswerVerifier, require_math_verify
from nemo_popsd.evaluation.markers import count_markers
from nemo_popsd.megatron.student import Student
from nemo_popsd.model.data import TrainingData
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import RolloutEngine, SamplingParams
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.training.rollouts import StepRollouts
from nemo_popsd.training.step import OnPolicyStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
) -> OnPolicyStep:
    """The training step of a run.

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

    return OnPolicyStep(
        config.training,
        config.distillation,
        student,
        rollouts,
        markers,
        share_prefixes=shares_prefixes(config),
        is_right=_grader(config, tokenizer),
    )


def _grader(config: PopsdConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int], str], bool] | None:
    """Whether a response's token ids end in the expected answer; None if the training rows have no answers, or no
    question has several responses.

    Raises:
        UserError: math-verify is not installed.
    """
    if config.rollout.per_prompt == 1 or config.data.train.columns.answer is None:
        return None
    require_math_verify()
    settings = config.evaluation
    verifier = AnswerVerifier(settings.verify_seconds)  # its worker ends with this process

    def is_right(response: Sequence[int], expected: str) -> bool:
        text = tokenizer.decode(list(response))
        answer = extract_answer(text, settings.answer_pattern, last_number=settings.without_box == "last_number")
        return verifier.compare(answer, expected).correct

    return is_right
