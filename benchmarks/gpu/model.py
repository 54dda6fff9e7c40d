"""A random model with the shape of Qwen3-0.6B, a run on it, and rows whose lengths are the limits of the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.contexts import Contexts
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.data.records import Record
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.student import Student
from nemo_popsd.model.training import build_weights
from nemo_popsd.parallel.distributed import initialize
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams
from nemo_popsd.rollout.megatron_engine import MegatronEngine
from nemo_popsd.training.reading import ResponseReader
from nemo_popsd.training.rollouts import StepRollouts
from nemo_popsd.training.step import OnPolicyStep

STEPS = 3
RESPONSES = "responses.json"
"""File in the folder that the parts share: the responses of each step, with loss and gradient norm."""

_QWEN3_600M: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # large enough that the branches differ by more than the rounding of bf16
}
_TINY = _QWEN3_600M | {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def random_model(work: Path, *, rehearse: bool) -> Path:
    """Directory of the model in bf16, which the first call creates in `work`."""
    directory = work / "model"
    if not (directory / "config.json").exists():
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen3ForCausalLM(Qwen3Config(**(_TINY if rehearse else _QWEN3_600M), dtype="bfloat16"))
        model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def settings(directory: Path, *, rehearse: bool, precision: str = "bf16", adaptation: str = "lora") -> PopsdConfig:
    """The configuration of a run on packed sequences; its limits are the lengths of all rows."""
    config = PopsdConfig()
    config.student.source = str(directory)
    config.student.precision, config.student.adaptation = precision, adaptation
    limits = (8, 16, 8) if rehearse else (128, 256, 256)
    config.data.max_prompt_tokens, config.data.max_reference_tokens, config.rollout.max_response_tokens = limits
    config.training.prompts_per_step, config.training.steps = 4, STEPS
    config.training.packing, config.training.self_check = True, False
    config.rollout.save = False
    config.optimizer.warmup_steps = 0
    config.optimizer.lr = 1e-4
    return config


@dataclass
class Run:
    """Student, optimizer and configuration of a run, from which steps are made."""

    config: PopsdConfig
    architecture: HuggingFaceModel
    student: Student
    optimizer: StudentOptimizer
    steps: int = 0

    @property
    def sampling(self) -> SamplingParams:
        """The sampling of the run, without stop tokens: every response ends at the limit."""
        section = self.config.rollout
        return SamplingParams(
            section.temperature, section.top_p, section.top_k, section.max_response_tokens, frozenset()
        )

    def engine(self, rows: int | None = None) -> MegatronEngine:
        """The engine that generates with the live weights, for at most `rows` rows together."""
        return MegatronEngine(
            self.student.chunks,
            vocab_size=self.student.vocab_size,
            batch_rows=rows or self.config.rollout.batch_rows,
            cache_tokens=self.config.rollout.cache_tokens,
            weights_version=lambda: self.steps,
        )

    def step(self, engine: RolloutEngine) -> OnPolicyStep:
        """A training step with rollouts by `engine`."""
        rollouts = StepRollouts(
            self.config.rollout,
            self.student,
            engine,
            self.sampling,
            seed=self.config.seed,
            last_step=self.config.training.steps,
            store=None,
            rows=None,
            stop=StopSignals(),
        )
        reader = ResponseReader(
            count_markers=lambda response: 0, marked=lambda response: [False] * len(response), is_right=None
        )
        weights = build_weights(self.config.distillation, self.student)
        return OnPolicyStep(self.config.training, self.config.distillation, self.student, rollouts, reader, weights)

    def update(self) -> None:
        """Updates the weights and counts the step."""
        self.optimizer.step()
        self.steps += 1

    def rows(self, step: int) -> list[PromptRow]:
        """Rows of a step, whose contexts have the maximum lengths."""
        rng = random.Random(step)
        data = self.config.data
        rows = []
        for index in range(self.config.training.prompts_per_step):
            prompt, reference = (
                [rng.randrange(self.student.vocab_size) for _ in range(length)]
                for length in (data.max_prompt_tokens, data.max_reference_tokens)
            )
            contexts = Contexts(prompt, [*reference, *prompt], reference, "r", reference_truncated=False)
            rows.append(PromptRow(Record(f"row{step}.{index}", "q", "r", None), contexts))
        return rows


def start(config: PopsdConfig) -> Run:
    """Creates the process group of one rank, the student and the optimizer."""
    initialize(config.parallel, seed=config.seed)
    source = HuggingFaceModel(Path(config.student.source))
    student = Student(
        source, config.student, config.parallel, seed=config.seed, load_initial=source.load, fp8=config.fp8
    )
    optimizer = StudentOptimizer(
        student.wrap(config.optimizer),
        config.optimizer,
        steps=config.training.steps,
        bf16=config.student.precision == "bf16",
    )
    return Run(config, source, student, optimizer)


class KeepingEngine:
    """Generates by `engine`, and keeps the responses."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.responses: list[list[int]] = []

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `RolloutEngine`."""
        rollouts = self._engine.generate(requests, sampling)
        self.responses = [rollout.response for rollout in rollouts]
        return rollouts


class ScriptedEngine:
    """Returns given responses in order, as if the weights of `version` had generated them."""

    responses: Sequence[list[int]] = ()
    version = 0

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `RolloutEngine`."""
        return [
            Rollout(response, [0.0] * len(response), truncated=True, weights_version=self.version)
            for response in self.responses
        ]
