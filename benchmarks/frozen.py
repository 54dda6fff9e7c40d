"""Compares frozen passes with shared prefixes and with separate sequences, and measures their share of a step.

    python -m benchmarks.frozen                 # the tables of RESULTS-frozen.md, some minutes on an idle core
    python -m benchmarks.frozen --quick         # only the longest reference

The model is a random Qwen3 on this machine's device. Lengths are those of a run with prompts of 256, references of 512,
2,048 and 8,192 and responses of 1,024 tokens, divided by `--divisor` on a CPU. The model is narrow, so that attention
has the same share of the arithmetic as in Qwen3-8B at full lengths. Shared and separate passes alternate in one
process, and seconds are the minimum of the repetitions; on a CPU they are processor seconds, which other load changes
little.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import interleaved, machine, peak_bytes, processor_time
from benchmarks.tables import table
from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.contexts import Contexts
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.data.records import Record
from nemo_popsd.distillation import Target
from nemo_popsd.megatron.config import OptimizerConfig, StudentConfig
from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.megatron.microbatches import ContextSequence, TokenCount
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.prefix.forward import shared_hidden_states
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import initialize
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams, sibling_seeds
from nemo_popsd.rollout.megatron_engine import MegatronEngine
from nemo_popsd.training.branches import FrozenBranches
from nemo_popsd.training.rollouts import StepRollouts
from nemo_popsd.training.step import OnPolicyStep
from nemo_popsd.training.trajectory import Trajectory

PROMPT, RESPONSE, REFERENCES = 256, 1024, (512, 2048, 8192)
TOKENS, CACHE_TOKENS, QUESTIONS = 32768, 65536, 2
PER_PROMPT, ORDERS = (1, 4, 8), ("question_first", "reference_first")
VOCABULARY = 512
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
"""Attention has 0.17 of the operations of a causal forward of 1,184 tokens; in Qwen3-8B 0.16 at 9,472 tokens."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of one row, and its responses."""

    prompt: int
    reference: int
    response: int
    per_prompt: int
    order: str

    def contexts(self, seed: int) -> Contexts:
        """Prompts of random tokens that share the prefixes given by the order of the templates."""
        draw = random.Random(seed)
        question, reference, end = (
            [draw.randrange(VOCABULARY) for _ in range(count)] for count in (self.prompt - 1, self.reference - 1, 1)
        )
        both = [*question, *reference] if self.order == "question_first" else [*reference, *question]
        return Contexts(
            [*question, *end], [*both, *end], [*reference, *end], reference_text="", reference_truncated=False
        )

    def sequences(self, seed: int) -> list[ContextSequence]:
        """The sequences of base, privileged and reference-only teacher."""
        draw, contexts = random.Random(-seed), self.contexts(seed)
        responses = [[draw.randrange(VOCABULARY) for _ in range(self.response)] for _ in range(self.per_prompt)]
        prompts = contexts.student, contexts.privileged, contexts.reference
        return [ContextSequence(prompt, response) for prompt in prompts for response in responses]


class Passes:
    """Both ways to compute the hidden states of sequences."""

    def __init__(self, chunks: Sequence[ModelChunk], token_budget: int) -> None:
        """`token_budget` is that of one forward pass."""
        self._chunks, self._budget = chunks, token_budget

    def separate(self, sequences: Sequence[ContextSequence]) -> TokenCount:
        """Computes each sequence separately, packed."""
        batches = student_batches(self._chunks, sequences, self._budget, packed=True)
        frozen_hidden_states(self._chunks, batches)
        return TokenCount.of(batches)

    def shared(self, sequences: Sequence[ContextSequence]) -> TokenCount:
        """Computes each distinct prefix once."""
        return shared_hidden_states(self._chunks, sequences, self._budget, CACHE_TOKENS)[1]


HEAD = ["F", "responses", "order", "tokens separate", "shared", "share", "s separate", "shared", "share"]
HEAD += ["seconds / tokens", "MiB separate", "shared"]


def compare(passes: Passes, sequences: Sequence[ContextSequence], repetitions: int) -> list[str]:
    """Table cells: tokens, seconds and peak memory of both methods."""
    counts: dict[str, TokenCount] = {}

    def action(name: str, way: Callable[[Sequence[ContextSequence]], TokenCount]) -> Callable[[], None]:
        def run() -> None:
            counts[name] = way(sequences)

        return run

    actions = {"separate": action("separate", passes.separate), "shared": action("shared", passes.shared)}
    seconds = interleaved(actions, repetitions, processor_time)
    peaks = [peak_bytes(actions[name]) / 2**20 for name in ("separate", "shared")]
    share = counts["shared"].real / counts["separate"].real
    time = seconds["shared"] / seconds["separate"]
    cells = [f"{counts['separate'].real:,}", f"{counts['shared'].real:,}", f"{share:.3f}"]
    cells += [f"{seconds['separate']:.2f}", f"{seconds['shared']:.2f}", f"{time:.3f}", f"{time / share:.2f}"]
    cells += [f"{peak:.0f}" for peak in peaks]
    print(*cells, file=sys.stderr, flush=True)
    return cells


def frozen_passes(passes: Passes, divisor: int, repetitions: int, *, quick: bool) -> list[list[str]]:
    """One row per reference length, number of responses and order, preceded by sequences without a common prefix."""
    alone = Lengths(PROMPT // divisor, 2048 // divisor, RESPONSE // divisor, 2, ORDERS[0]).sequences(1)
    alone = [ContextSequence([number, *other.prompt], other.response) for number, other in enumerate(alone)]
    rows = [["2,048", "2", "nothing in common", *compare(passes, alone, repetitions)]]
    for reference in REFERENCES[-1:] if quick else REFERENCES:
        for per_prompt in PER_PROMPT[:2] if quick else PER_PROMPT:
            for order in ORDERS:
                sizes = PROMPT // divisor, reference // divisor, RESPONSE // divisor
                cells = compare(passes, Lengths(*sizes, per_prompt, order).sequences(reference), repetitions)
                rows.append([f"{reference:,}", str(per_prompt), order.replace("_", " "), *cells])
    return rows


STEP_HEAD = ["responses", "order", "passes", "rollout s", "base pass s", "two further passes s", "training s", "step s"]
STEP_HEAD += ["further passes / step"]


def steps(student: Student, optimizer: StudentOptimizer, divisor: int, repetitions: int) -> list[list[str]]:
    """The parts of a step on `QUESTIONS` questions, with separate and with shared passes."""
    rows = []
    for per_prompt in PER_PROMPT[:2]:
        for order in ORDERS:
            lengths = Lengths(PROMPT // divisor, REFERENCES[-1] // divisor, RESPONSE // divisor, per_prompt, order)
            rows += _step(student, optimizer, lengths, divisor, repetitions)
    return rows


class _Known:
    """Returns responses that were generated before."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self._rollouts = rollouts

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        return self._rollouts


def _step(
    student: Student, optimizer: StudentOptimizer, lengths: Lengths, divisor: int, repetitions: int
) -> list[list[str]]:
    config = PopsdConfig()
    config.rollout.per_prompt = lengths.per_prompt
    config.training.frozen_tokens, config.training.microbatch_tokens = TOKENS // divisor, TOKENS // 4 // divisor
    config.training.frozen_cache_tokens, config.distillation.diagnosed_tokens = CACHE_TOKENS, 0
    rows = [PromptRow(Record(f"row{number}", "q", "r", None), lengths.contexts(number)) for number in range(QUESTIONS)]
    seeds = sibling_seeds(1, lengths.per_prompt)
    requests = [Request(row.contexts.student, seed) for row in rows for seed in seeds]
    sampling = SamplingParams(1.1, 0.95, 20, lengths.response, frozenset())
    engine = MegatronEngine(
        student.chunks, vocab_size=VOCABULARY, batch_rows=64, cache_tokens=1 << 20, weights_version=lambda: 1
    )
    rollouts: list[Rollout] = []

    def generate() -> None:
        rollouts[:] = engine.generate(requests, sampling)

    seconds = interleaved({"rollout": generate}, 1, processor_time)
    trajectories = [Trajectory(rows[i // lengths.per_prompt], rollout) for i, rollout in enumerate(rollouts)]

    def frozen(target: Target, cache: int | None) -> Callable[[], None]:
        branches = FrozenBranches(
            student.base,
            target,
            token_budget=config.training.frozen_tokens,
            diagnosed_tokens=0,
            packed=True,
            shared_cache_tokens=cache,
        )
        return lambda: branches.target_states(trajectories) and None

    def step(share: bool) -> Callable[[], None]:
        known = StepRollouts(
            config.rollout,
            student,
            _Known(rollouts),
            sampling,
            seed=0,
            last_step=100,
            store=None,
            rows=None,
            stop=StopSignals(),
        )
        on_policy = OnPolicyStep(
            config.training, config.distillation, student, known, lambda response: 0, share_prefixes=share
        )
        return lambda: on_policy(2, rows, optimizer, optimizer.step) and None

    base, purified = Target(base=1.0), Target.purified()
    actions = {
        "base": frozen(base, None),
        "frozen, separate": frozen(purified, None),
        "frozen, shared": frozen(purified, CACHE_TOKENS),
        "step, separate": step(share=False),
        "step, shared": step(share=True),
    }
    seconds |= interleaved(actions, repetitions, processor_time)
    training = seconds["step, separate"] - seconds["frozen, separate"]
    cells = []
    for way in ("separate", "shared"):
        further = seconds[f"frozen, {way}"] - seconds["base"]
        total = seconds["rollout"] + seconds[f"step, {way}"]
        parts = seconds["rollout"], seconds["base"], further, training, total
        row = [str(lengths.per_prompt), lengths.order.replace("_", " "), way, *(f"{part:.2f}" for part in parts)]
        cells.append([*row, f"{further / total:.2f}"])
    return cells


def build_student(folder: str) -> Student:
    """A random model on one rank, with adapters."""
    import transformers

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**MODEL)).save_pretrained(folder)
    initialize(ParallelConfig(), seed=0)
    source = open_source(folder)
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    config = StudentConfig(precision=precision, adaptation="lora")
    return Student(source.architecture, config, ParallelConfig(), seed=0, load_initial=source.load)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the longest reference, with fewer responses")
    parser.add_argument(
        "--divisor", type=int, default=1 if torch.cuda.is_available() else 8, help="divisor of all lengths"
    )
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        student = build_student(folder)
        with student.base.model() as chunks:
            passes = Passes(chunks, TOKENS // options.divisor)
            rows = frozen_passes(passes, options.divisor, options.repetitions, quick=options.quick)
        print(f"{machine()}; lengths divided by {options.divisor}\n\n{table(HEAD, rows)}\n", flush=True)
        bf16 = student.chunks[0].config.bf16
        optimizer = StudentOptimizer(student.wrap(OptimizerConfig()), OptimizerConfig(), steps=100, bf16=bf16)
        print(table(STEP_HEAD, steps(student, optimizer, options.divisor, options.repetitions)))


if __name__ == "__main__":
    main()
