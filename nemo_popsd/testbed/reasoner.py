"""A reasoner ten times as large as the embedded one, for two harder families and for long chains.

    python -m nemo_popsd.testbed.reasoner --output DIR --minutes 20   # again and again, until all tokens are used
    python -m nemo_popsd.testbed.reasoner --output DIR --check 32     # accuracy by family of the newest checkpoint

Pre-training proceeds in pieces: each command continues from `DIR/checkpoint.pt`, which is replaced atomically, and the
weights do not depend on where it was interrupted. Every pool of sequences is a pure function of (seed, number).
`DIR/loss.jsonl` has the loss curve; the complete model is in `DIR/model`, in bf16.

The tokenizer, the templates and the worked solutions are those of the embedded model. Arithmetic is in bf16 with fp32
weights, which CPUs with AVX512-BF16 compute 1.6 times as fast as fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_lines
from nemo_popsd.testbed.contexts import report
from nemo_popsd.testbed.data import DATA_SEED
from nemo_popsd.testbed.pretrain import (
    Encoded,
    Optimizers,
    Recipe,
    build_optimizers,
    collated,
    draw_drill,
    draw_example,
    encoded,
    model_config,
    save,
    train_step,
)
from nemo_popsd.testbed.problems import (
    FAMILIES,
    HARDER,
    Difficulty,
    Problem,
    balanced,
    draw_problem,
    records,
    split_of,
)
from nemo_popsd.testbed.templates import CONTEXTS, user_turn
from nemo_popsd.testbed.tokenizer import build_tokenizer

_CHECKPOINT, _CURVE = "checkpoint.pt", "loss.jsonl"
_POSITIONS = 4096

LARGER = Difficulty(longest=8, largest=20, largest_factor=9, families=(*FAMILIES, *HARDER))
"""Problems of up to eight steps, with larger constants than the embedded ones."""
LONG = Difficulty(shortest=32, longest=40, largest=20, largest_factor=9, families=(*FAMILIES, *HARDER))
"""Problems whose worked solutions have 800 to 1,400 tokens."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that determines the weights, up to rounding."""

    mixture: Recipe = field(default_factory=lambda: Recipe(difficulty=LARGER, learning_rate=3e-3))
    """Seed, shares of the contexts and of drills, peak learning rates, warm-up and problems; its steps and its batch
    are those of the embedded model and do not apply."""
    long: Difficulty = LONG
    """The long problems."""
    long_share: float = 0.1
    """Share of long problems once they begin."""
    tokens: int = 40_000_000
    """Tokens, padding included, to train on."""
    batch_tokens: int = 8192
    """Most tokens of a batch, padding included."""
    pool: int = 256
    """Sequences that are drawn at once, sorted by length and cut into batches."""
    sheet_pools: int = 50
    """First pools, of sheets only."""
    drill_pools: int = 75
    """Pools of drills, those of sheets included; from the end of the former on, half of the drills are operations."""
    long_from: int = 200
    """First pool with long problems."""
    hidden: int = 320
    """Width. With it, eight million parameters."""
    layers: int = 7


@dataclass(kw_only=True)
class Progress:
    """Progress of pre-training."""

    step: int = 0
    tokens: int = 0
    pool: int = 0
    """Number of the pool in use."""
    used: int = 0
    """Number of its batches that have been used."""
    seconds: float = 0.0
    """Time of all pieces."""


def larger_config(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Qwen3Config:
    """Qwen3 with one group of keys and values and heads of 64."""
    return model_config(
        tokenizer,
        hidden=plan.hidden,
        intermediate=plan.hidden * 14 // 5,
        layers=plan.layers,
        heads=max(1, plan.hidden // 64),
        groups=1,
        head_dim=64,
        positions=_POSITIONS,
    )


def shared_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's, for longer sequences."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = _POSITIONS
    return tokenizer


def batches_of(tokenizer: PreTrainedTokenizerBase, plan: Plan, number: int) -> list[list[Encoded]]:
    """The batches of a pool, shuffled; sequences of similar length share one."""
    rng = random.Random(f"{plan.mixture.seed}/pool/{number}")
    sequences = sorted((_sequence(tokenizer, plan, number, rng) for _ in range(plan.pool)), key=lambda one: len(one[0]))
    batches: list[list[Encoded]] = [[]]
    for one in sequences:
        if batches[-1] and len(one[0]) * (len(batches[-1]) + 1) > plan.batch_tokens:
            batches.append([])
        batches[-1].append(one)
    rng.shuffle(batches)
    return batches


def _sequence(tokenizer: PreTrainedTokenizerBase, plan: Plan, number: int, rng: random.Random) -> Encoded:
    mixture = plan.mixture
    if number < plan.drill_pools or rng.random() < mixture.drill_share:
        sheets = 1.0 if number < plan.sheet_pools else 0.5
        user, text, thinking = draw_drill(rng, mixture.difficulty, sheets)
        return encoded(tokenizer, user, text, thinking)
    long = number >= plan.long_from and rng.random() < plan.long_share
    problem = _pretraining_problem(rng, plan.long if long else mixture.difficulty)
    context, text, thinking = draw_example(problem, rng, mixture)
    return encoded(tokenizer, user_turn(context, problem.question, problem.reference), text, thinking)


def _pretraining_problem(rng: random.Random, difficulty: Difficulty) -> Problem:
    while True:
        problem = draw_problem(rng, difficulty)
        if split_of(problem.task) == "pretraining":
            return problem


def rate(progress: Progress, plan: Plan) -> float:
    """Multiplier of the learning rates: linear warm-up by steps, flat to 60 % of the tokens, linear decay."""
    if progress.step < plan.mixture.warmup:
        return (progress.step + 1) / plan.mixture.warmup
    left = 1 - progress.tokens / plan.tokens
    return min(1.0, max(0.02, left / 0.4))


class Pretraining:
    """A model in training, with what a checkpoint holds."""

    def __init__(self, output: Path, plan: Plan) -> None:
        """Continues from the checkpoint in `output`, if there is one.

        Raises:
            UserError: the checkpoint is of another plan.
        """
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.plan, self.progress = output, plan, Progress()
        self.tokenizer = shared_tokenizer()
        torch.manual_seed(plan.mixture.seed)
        self.model = Qwen3ForCausalLM(larger_config(self.tokenizer, plan))
        self.optimizers: Optimizers = build_optimizers(self.model, plan.mixture)
        self._recent: list[float] = []
        if (output / _CHECKPOINT).exists():
            self._restore()

    @property
    def complete(self) -> bool:
        """Whether all tokens have been used."""
        return self.progress.tokens >= self.plan.tokens

    def run(self, seconds: float, checkpoint_every: float = 300.0, log_every: int = 20) -> None:
        """Trains until all tokens are used or the time is over, and saves.

        Args:
            seconds: time of this piece.
            checkpoint_every: seconds between two checkpoints.
            log_every: steps of a line of the loss curve.
        """
        started = saved = last = time.monotonic()
        for ids, labels in self._stream():
            multiplier = rate(self.progress, self.plan)
            self._recent.append(train_step(self.model, self.optimizers, ids, labels, multiplier, bf16=True))
            self.progress.step += 1
            self.progress.tokens += ids.numel()
            self.progress.used += 1
            now = time.monotonic()
            self.progress.seconds, last = self.progress.seconds + now - last, now
            if self.progress.step % log_every == 0:
                self._log()
            if self.complete or now - started >= seconds:
                break
            if now - saved >= checkpoint_every:
                self._save()
                saved = time.monotonic()
        self._save()
        if self.complete:
            save(self.model.bfloat16(), self.tokenizer, self.output / "model")
            self.tokenizer.save_pretrained(str(self.output / "model"), save_jinja_files=False)

    def _stream(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches from where the progress is; `self.progress.used` is advanced by the caller after each."""
        while not self.complete:
            batches = batches_of(self.tokenizer, self.plan, self.progress.pool)
            for batch in batches[self.progress.used :]:
                yield collated(batch, self.tokenizer.pad_token_id)
            self.progress.pool, self.progress.used = self.progress.pool + 1, 0

    def _log(self) -> None:
        progress = self.progress
        line = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": round(sum(self._recent) / len(self._recent), 4),
            "rate": round(rate(progress, self.plan), 4),
            "seconds": round(progress.seconds),
        }
        self._recent = []
        with (self.output / _CURVE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        print(" ".join(f"{name} {value}" for name, value in line.items()), flush=True)

    def _save(self) -> None:
        state = {
            "plan": repr(self.plan),
            "progress": asdict(self.progress),
            "recent": self._recent,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
        }
        partial = self.output / f"{_CHECKPOINT}.partial"
        torch.save(state, partial)
        os.replace(partial, self.output / _CHECKPOINT)

    def _restore(self) -> None:
        state = torch.load(self.output / _CHECKPOINT, weights_only=True)
        if state["plan"] != repr(self.plan):
            raise UserError(
                "testbed",
                got=f"{self.output / _CHECKPOINT} of another plan",
                need="one plan for all pieces",
                fix="name another --output, or continue with the options of the first piece",
            )
        self.model.load_state_dict(state["model"])
        for (optimizer, _), content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        self.progress, self._recent = Progress(**state["progress"]), state["recent"]
        curve = self.output / _CURVE
        if curve.exists():  # lines beyond the checkpoint will be written again
            lines = curve.read_text(encoding="utf-8").splitlines(keepends=True)
            write_lines(curve, [line for line in lines if json.loads(line)["step"] <= self.progress.step])


def check(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, limits: tuple[int, int] = (512, 2048)
) -> list[dict[str, object]]:
    """Prints and returns the accuracy from each context by length and family; long problems have the question alone.

    Args:
        model: to check.
        tokenizer: of the model.
        count: held-out problems of each length and family.
        limits: most tokens of an answer to a short and to a long problem.
    """
    found: list[dict[str, object]] = []
    for name, difficulty, contexts, longest in (
        ("short", LARGER, CONTEXTS, limits[0]),
        ("long", LONG, CONTEXTS[:1], limits[1]),
    ):
        for family in difficulty.families:
            some = replace(difficulty, families=(family,))
            rows = records("validation", balanced("validation", count, DATA_SEED, some))
            for context in contexts:
                one = report(model, tokenizer, rows, context, max_new_tokens=longest)
                found.append({"kind": name, "family": family, **one.as_dict()})
                print(f"{name:<6}{family:<9}{one}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Trains for some minutes, or checks the accuracy and writes `report.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoint, loss curve and model")
    parser.add_argument("--minutes", type=float, default=20.0, help="of this piece; it ends after the step in progress")
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="of all pieces")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", type=int, default=0, help="problems of each family to answer, instead of training")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    training = Pretraining(options.output, Plan(tokens=options.tokens))
    if options.check:
        found = check(training.model, training.tokenizer, options.check)
        (options.output / "report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
    if not training.complete:
        training.run(60 * options.minutes)
    done = training.progress.tokens
    state = "complete" if training.complete else f"{100 * done / options.tokens:.1f} % of the tokens"
    print(f"{state}: {done:,} tokens in {training.progress.seconds / 60:.0f} minutes", flush=True)


if __name__ == "__main__":
    main()
