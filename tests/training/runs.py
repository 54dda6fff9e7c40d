"""A student on this rank, with rows and responses generated from their index, without files or tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.contexts import Contexts
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.data.records import Record
from nemo_popsd.megatron.moving import BranchWeights
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.model.training import build_weights
from nemo_popsd.parallel.distributed import initialize
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from nemo_popsd.rollout.megatron_engine import MegatronEngine
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.training.reading import ResponseReader
from nemo_popsd.training.rollouts import StepRollouts, TrainingRows
from nemo_popsd.training.step import OnPolicyStep
from nemo_popsd.training.trajectory import Trajectory

VOCAB_SIZE = 203
STOPS = frozenset({2, 5, 11, 17})
"""Stop tokens, enough for random responses to end at different lengths."""


def settings(**sections: dict[str, Any]) -> PopsdConfig:
    """Configuration of a run in fp32 with short limits; `sections` override values by name."""
    config = PopsdConfig()
    base: dict[str, dict[str, Any]] = {
        "student": {"precision": "fp32", "adaptation": "full"},
        "parallel": {"sequence": "false"},
        "rollout": {"max_response_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
        "optimizer": {"lr": 1e-3},
        "training": {"prompts_per_step": 4, "steps": 5},
    }
    for values in (base, sections):
        for section, fields in values.items():
            for name, value in fields.items():
                owner = getattr(config, section)
                assert hasattr(owner, name), f"{section}.{name}"
                setattr(owner, name, value)
    config.student.lora.rank, config.student.lora.alpha = 4, 8
    return config


EVEN_TOKENS = ResponseReader(
    count_markers=lambda response: sum(token % 2 == 0 for token in response),
    marked=lambda response: [token % 2 == 0 for token in response],
    is_right=None,
)
"""Even tokens are markers; rows have no answers."""


@dataclass
class Run:
    """The objects that a step needs on this rank."""

    config: PopsdConfig
    architecture: HuggingFaceModel
    student: Student
    optimizer: StudentOptimizer
    steps: int = 0
    reader: ResponseReader = EVEN_TOKENS
    weights: BranchWeights | None = None
    """Weights of the frozen branches, from the last `on_policy_step`."""

    @property
    def sampling(self) -> SamplingParams:
        """Sampling parameters of the rollout section, with `STOPS`."""
        section = self.config.rollout
        return SamplingParams(
            section.temperature, section.top_p, section.top_k, section.max_response_tokens, stop_token_ids=STOPS
        )

    def engine(self) -> MegatronEngine:
        """Generates with the live weights."""
        return MegatronEngine(
            self.student.chunks,
            vocab_size=self.student.vocab_size,
            batch_rows=self.config.rollout.batch_rows,
            cache_tokens=self.config.rollout.cache_tokens,
            weights_version=lambda: self.steps,
            fp8=self.config.fp8,
        )

    def on_policy_step(
        self,
        engine: Any = None,
        *,
        sampling: SamplingParams | None = None,
        store: RolloutStore | None = None,
        rows: TrainingRows | None = None,
        stop: StopSignals | None = None,
    ) -> OnPolicyStep:
        """An `OnPolicyStep` with `reader`."""
        rollouts = StepRollouts(
            self.config.rollout,
            self.student,
            engine or self.engine(),
            sampling or self.sampling,
            seed=self.config.seed,
            last_step=self.config.training.steps,
            store=store,
            rows=rows,
            stop=stop or StopSignals(),
        )
        self.weights = build_weights(self.config.distillation, self.student)
        share = self.config.training.share_prefixes == "true"
        return OnPolicyStep(
            self.config.training,
            self.config.distillation,
            self.student,
            rollouts,
            self.reader,
            self.weights,
            share_prefixes=share,
        )

    def update(self) -> None:
        """Updates the weights and counts the update."""
        self.optimizer.step()
        self.steps += 1


def start(directory: Path, config: PopsdConfig, *, initial: Path | None = None) -> Run:
    """Process groups, student with the weights of `directory`, optimizer. Collective.

    Args:
        directory: model directory of the base.
        config: configuration of the run.
        initial: another model whose weights the live student gets, so that it differs from its base.
    """
    initialize(config.parallel, seed=config.seed)
    source = HuggingFaceModel(directory)
    student = Student(
        source,
        config.student,
        config.parallel,
        seed=config.seed,
        load_initial=source.load,
        megatron=config.megatron,
        fp8=config.fp8,
    )
    if initial is not None:
        with student.base.model():  # creates the copy before the live weights change
            pass
        HuggingFaceModel(initial).load(student.chunks)
    model = student.wrap(config.optimizer)
    bf16 = config.student.precision == "bf16"
    fields = config.megatron.values("optimizer")
    optimizer = StudentOptimizer(model, config.optimizer, steps=config.training.steps, bf16=bf16, fields=fields)
    return Run(config, source, student, optimizer)


class ScriptedEngine:
    """Returns given responses; records the requests."""

    def __init__(self, responses: Sequence[Sequence[int]], weights_version: Callable[[], int] = lambda: 0) -> None:
        self._responses = responses
        self._weights_version = weights_version
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        self.requests += requests
        assert len(requests) == len(self._responses)
        return [
            Rollout(list(response), [0.0] * len(response), response[-1] not in STOPS, self._weights_version())
            for response in self._responses
        ]


def row(number: int) -> PromptRow:
    """A row whose three prompts share no prefix and have different lengths."""
    contexts = Contexts(
        student=_ids(f"student/{number}", 3, 9),
        privileged=_ids(f"privileged/{number}", 12, 20),
        reference=_ids(f"reference/{number}", 5, 11),
        reference_text="r",
        reference_truncated=False,
    )
    return PromptRow(Record(id=f"row{number}", question="q", reference="r", answer=None), contexts)


def sibling(number: int) -> PromptRow:
    """One of two rows with the same prompts; its contexts share a prefix, with the reference first."""
    head, question, reference = (
        _ids("head", 2, 2),
        _ids(f"question/{number // 2}", 3, 6),
        _ids(f"r/{number // 2}", 8, 15),
    )
    contexts = replace(
        row(number).contexts,
        student=[*head, *question],
        privileged=[*head, *reference, *question],
        reference=[*head, *reference, 9],
    )
    return replace(row(number), contexts=contexts)


def response(number: int, length: int) -> list[int]:
    """Response tokens of row `number`."""
    return _ids(f"response/{number}", length, length)


def trajectory(number: int, length: int) -> Trajectory:
    """Row `number` with a response of `length` tokens."""
    return Trajectory(
        row(number), Rollout(response(number, length), [0.0] * length, truncated=False, weights_version=0)
    )


def _ids(name: str, shortest: int, longest: int) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(shortest, longest))]


def named_gradients(run: Run, scratch: Path) -> dict[str, torch.Tensor]:
    """Gradient of each tensor of the Hugging Face model, in any layout. Collective; requires full fine-tuning.

    Temporarily replaces the weights by the gradients and exports the model.
    """
    parameters = [p for chunk in run.student.chunks for p in chunk.parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)  # type: ignore[arg-type]
    run.architecture.export(run.student.chunks, scratch)
    with torch.no_grad():
        for parameter, weights in zip(parameters, kept, strict=True):
            parameter.copy_(weights)
    return load_file(scratch / "model.safetensors")
