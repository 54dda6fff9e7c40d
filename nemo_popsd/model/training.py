"""Construction of the training step of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import shares_prefixes
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.data.records import Record
from nemo_popsd.diagnosis.pieces import marked_tokens, token_pieces
from nemo_popsd.distillation.config import DistillationConfig
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.evaluation.answers import extract_answer
from nemo_popsd.evaluation.equivalence import AnswerVerifier, require_math_verify
from nemo_popsd.evaluation.markers import count_markers
from nemo_popsd.megatron.moving import BranchWeights
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.model.cost import step_cost
from nemo_popsd.model.data import TrainingData
from nemo_popsd.observability.dumps import recorded
from nemo_popsd.observability.metrics import StepMetrics
from nemo_popsd.parallel.distributed import device
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import RolloutEngine, SamplingParams
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.training.mismatch import MismatchBounds, MismatchGuard
from nemo_popsd.training.reading import ResponseReader
from nemo_popsd.training.rollouts import StepRollouts
from nemo_popsd.training.step import OnPolicyStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Update = Callable[[], None]


class RunStep:
    """The training step of a run, with the profiles and dumps of `observability.dumps`."""

    def __init__(self, step: OnPolicyStep, config: PopsdConfig) -> None:
        """Store the references."""
        self._step, self._config = step, config

    @property
    def weights(self) -> BranchWeights:
        """Weights of the frozen branches."""
        return self._step.weights

    def __call__(
        self, number: int, rows: Sequence[PromptRow], optimizer: StudentOptimizer, update: Callable[[], None]
    ) -> StepMetrics:
        """Run the step like `OnPolicyStep`."""
        profile, output = self._config.observability.profile, self._config.output
        with recorded(profile, output, step=number, rank=dist.get_rank()):
            return self._step(number, rows, optimizer, update)


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
    """Build the training step of a run. It is called like `OnPolicyStep`, see `RunStep`.

    Args:
        config: configuration of the run.
        student: the model and its base.
        engine: generates from the student's live weights.
        sampling: sampling parameters.
        tokenizer: the student's tokenizer.
        data: the training rows.
        check_lock: raises if the output belongs to another run; called before rollouts are written.
        stop: stop requests.
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

    if config.fp8.frozen:
        logger.warning(
            "fp8.frozen=true (%s): the rounding errors of the frozen passes are distilled with the target; `popsd "
            "diagnose --fp8` compares them with the effect",
            config.fp8.recipe,
        )
    reader, weights = build_reader(config, tokenizer), build_weights(config.distillation, student)
    mismatch = MismatchGuard(config.guard, MismatchBounds.of(config.guard, exact=_is_exact(config)), student.split)
    cost = step_cost(config)
    step = OnPolicyStep(
        config.training,
        config.distillation,
        student,
        rollouts,
        reader,
        weights,
        mismatch,
        cost,
        share_prefixes=shares_prefixes(config),
    )
    return RunStep(step, config)


def _is_exact(config: PopsdConfig) -> bool:
    """Whether engine and trainer compute in fp32 with the same weights.

    False on a GPU, where fp32 products may be rounded to TF32: NVIDIA's containers set
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    """
    if device().type != "cpu" or config.student.precision != "fp32":
        return False
    same = config.rollout.engine == "megatron" or config.rollout.vllm.dtype in ("student", "fp32")
    return same and config.rollout.age_bound == 0


def build_weights(config: DistillationConfig, student: Student) -> BranchWeights:
    """Build the weights of the frozen branches of a run; moving weights are copies of the student's."""
    output_follows = "anchor" if build_target(config.target).base else "teacher"
    return BranchWeights(student, config.anchor, config.teacher, output_follows=output_follows)


def build_reader(config: PopsdConfig, tokenizer: PreTrainedTokenizerBase) -> ResponseReader:
    """Build the reader of responses, which applies the rules of the run's evaluation.

    Raises:
        UserError: rows have answers, but the library that compares them is missing.
    """
    settings, train = config.evaluation, config.data.train
    verifier = AnswerVerifier(settings.verify_seconds)

    def count(response: Sequence[int]) -> int:
        return sum(count_markers(tokenizer.decode(list(response)), settings.markers).values())

    def is_right(record: Record, response: Sequence[int]) -> bool:
        text = tokenizer.decode(list(response), skip_special_tokens=False)
        answer = extract_answer(text, settings.answer_pattern, last_number=settings.without_box == "last_number")
        return record.answer is not None and verifier.compare(answer, record.answer).correct

    has_answers = train.columns.answer is not None or train.answer_pattern is not None
    if has_answers:
        require_math_verify()
    return ResponseReader(
        count_markers=count,
        marked=lambda response: marked_tokens(token_pieces(tokenizer, response), settings.markers),
        is_right=is_right if has_answers else None,
    )
