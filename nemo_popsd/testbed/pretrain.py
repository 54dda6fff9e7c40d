"""The recipe of the embedded model: pre-training from scratch on worked solutions, in plain PyTorch.

    python -m nemo_popsd.testbed.pretrain --output DIR

Training starts with drills: finding values on a sheet, and single operations. After that, the mixture holds all three
contexts. From the question alone the model learns to hesitate, check and correct itself.
With a reference in the context it learns to state the values, so a reference makes its answers correct and short.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from nemo_popsd.testbed.contexts import ContextReport, report
from nemo_popsd.testbed.data import DATA_SEED, SIZES
from nemo_popsd.testbed.problems import (
    DIFFICULTY,
    FAMILIES,
    Difficulty,
    Problem,
    balanced,
    draw_problem,
    drill,
    problems,
    records,
    response,
    terse_thoughts,
    thoughtful_thoughts,
)
from nemo_popsd.testbed.templates import CONTEXTS, Context, user_turn
from nemo_popsd.testbed.tokenizer import build_tokenizer, save_tokenizer

_IGNORED = -100
_POOL = 16

Encoded = tuple[list[int], list[int]]
"""Token ids and labels of one sequence."""
Optimizers = list[tuple[torch.optim.Optimizer, float]]
"""Each with its peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines the weights, up to rounding."""

    seed: int = 20260
    """Seed of the initial weights, the problems and the mixture."""
    steps: int = 1600
    """Optimiser steps."""
    batch: int = 32
    """Sequences per step."""
    learning_rate: float = 4e-3
    """Peak of AdamW (embeddings, norms); linear warm-up, flat, linear decay over the last 40 %."""
    matrix_rate: float = 0.02
    """Peak of Muon (the matrices of the layers)."""
    warmup: int = 50
    """Steps of the warm-up."""
    question_reference_share: float = 0.25
    """Share of sequences with question and reference."""
    reference_share: float = 0.12
    """Share of sequences with the reference alone; the rest see the question alone."""
    thoughtful_with_reference: float = 0.2
    """Share of sequences with a reference whose solution still hesitates and checks."""
    no_thinking: float = 0.04
    """Share of sequences from any context with thinking switched off."""
    drill_steps: int = 600
    """Initial steps that contain drills only. The first two thirds of these steps and half of all later drills are
    about finding values on sheets."""
    drill_share: float = 0.1
    """Share of drills afterwards."""
    difficulty: Difficulty = field(default_factory=lambda: DIFFICULTY)
    """The problems and the worked solutions."""


def model_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden: int = 128,
    intermediate: int = 320,
    layers: int = 4,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 48,
    positions: int = 1024,
) -> Qwen3Config:
    """A small Qwen3: grouped-query attention, query and key norms, an independent head size, tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        torch_dtype="float32",
    )


def draw_example(problem: Problem, rng: random.Random, recipe: Recipe) -> tuple[Context, str, bool]:
    """Draw context, assistant text and whether thinking is on for one sequence of the mixture."""
    draw = rng.random()
    context: Context = "question"
    if draw < recipe.reference_share:
        context = "reference"
    elif draw < recipe.reference_share + recipe.question_reference_share:
        context = "question+reference"
    thinking = rng.random() >= recipe.no_thinking
    thoughtful = thinking and (context == "question" or rng.random() < recipe.thoughtful_with_reference)
    thoughts = thoughtful_thoughts(problem, rng, recipe.difficulty) if thoughtful else terse_thoughts(problem)
    return context, response(thoughts, problem.answer, thinking=thinking), thinking


def draw_drill(rng: random.Random, difficulty: Difficulty, sheets: float) -> tuple[str, str, bool]:
    """Draw user turn, assistant text and whether thinking is on: a sheet without a task, or single operations.

    Args:
        rng: random generator.
        difficulty: of the operations.
        sheets: share of sheets. A small model that sees versions and sheets only together with problems does not learn
            to connect them, since the sheet alone explains most of a solution. Sheets therefore have
            `difficulty.sheet` values.
    """
    if rng.random() < sheets:
        problem = draw_problem(rng, replace(difficulty, shortest=difficulty.sheet, longest=difficulty.sheet))
        user = user_turn("question+reference", problem.which, problem.reference)
        return user, response(terse_thoughts(problem), problem.answer), True
    return "Practise.", drill(rng, difficulty), False


def batches(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of `(ids, labels)`, both `[B, T]`; only the assistant's tokens have labels.

    Sequences of similar length share a batch: several batches are drawn at once and sorted.
    """
    order = random.Random(f"{recipe.seed}/order")
    source = problems("pretraining", recipe.seed, recipe.difficulty)
    drawn = 0
    while True:
        sequences = []
        for problem, rng in (next(source) for _ in range(_POOL * recipe.batch)):
            drawn += 1
            if drawn <= recipe.drill_steps * recipe.batch or rng.random() < recipe.drill_share:
                sheets = 1.0 if drawn <= recipe.drill_steps * recipe.batch * 2 / 3 else 0.5
                user, text, thinking = draw_drill(rng, recipe.difficulty, sheets)
            else:
                context, text, thinking = draw_example(problem, rng, recipe)
                user = user_turn(context, problem.question, problem.reference)
            sequences.append(encoded(tokenizer, user, text, thinking))
        sequences.sort(key=lambda pair: len(pair[0]))
        pool = [sequences[i : i + recipe.batch] for i in range(0, len(sequences), recipe.batch)]
        order.shuffle(pool)
        for batch in pool:
            yield collated(batch, tokenizer.pad_token_id)


def encoded(tokenizer: PreTrainedTokenizerBase, user: str, text: str, thinking: bool) -> Encoded:
    """Token ids and labels of one conversation; only the assistant's tokens, the end included, have labels."""
    turns = [{"role": "user", "content": user}]
    rendered = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    prompt = tokenizer.encode(str(rendered), add_special_tokens=False)
    answer = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + answer, [_IGNORED] * len(prompt) + answer


def collated(batch: Sequence[Encoded], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of sequences, right-padded: both `[B, T]`, int64."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), padding)
    labels = torch.full((len(batch), longest), _IGNORED)
    for i, (sequence, targets) in enumerate(batch):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        labels[i, : len(targets)] = torch.tensor(targets)
    return ids, labels


def pretrain(output: Path, recipe: Recipe, *, log_every: int = 50, quick_every: int = 0) -> Qwen3ForCausalLM:
    """Train a model by the recipe and save it with its tokenizer in Hugging Face format.

    Args:
        output: folder to create.
        recipe: what to train.
        log_every: steps between lines of progress.
        quick_every: steps between short evaluations, each of which also saves the model; 0 means none.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(output, recipe.difficulty)
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(model_config(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizers = build_optimizers(model, recipe)
    stream = batches(tokenizer, recipe)
    started, recent = time.perf_counter(), 0.0
    for step in range(1, recipe.steps + 1):
        recent += train_step(model, optimizers, *next(stream), _rate(step, recipe))
        if step % log_every == 0:
            print(f"step {step} loss {recent / log_every:.4f} {time.perf_counter() - started:.0f} s", flush=True)
            recent = 0.0
        if quick_every and step % quick_every == 0:
            model.save_pretrained(str(output))
            evaluate(model, tokenizer, 128, temperatures=(1.0,), seed=recipe.seed + 1, difficulty=recipe.difficulty)
    save(model, tokenizer, output)
    return model


def train_step(
    model: Qwen3ForCausalLM,
    optimizers: Optimizers,
    ids: torch.Tensor,
    labels: torch.Tensor,
    multiplier: float,
    *,
    bf16: bool = False,
) -> float:
    """One update on a batch `[B, T]`.

    Args:
        model: updated in place.
        optimizers: with their peak learning rates.
        ids: token ids.
        labels: the same where a token has a loss.
        multiplier: of the peak learning rates.
        bf16: compute products in bf16; weights and sums stay in fp32.

    Returns:
        The mean cross-entropy of a labelled token before the update, in nats.
    """
    targets = labels[:, 1:]
    labelled = targets != _IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        loss = functional.cross_entropy(model.lm_head(hidden[labelled]), targets[labelled])
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * multiplier
        optimizer.step()
    return loss.item()


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Writes the weights in Hugging Face format, with sampling at temperature 1 as the default."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(str(output))


def evaluate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    temperatures: tuple[float, ...] = (0.0, 1.0),
    seed: int,
    difficulty: Difficulty = DIFFICULTY,
) -> list[ContextReport]:
    """Print and return the accuracy from every context on `count` held-out problems."""
    rows = records("validation", balanced("validation", count, seed, difficulty))
    reports = []
    for temperature in temperatures:
        for context in CONTEXTS:
            reports.append(report(model, tokenizer, rows, context, temperature=temperature, seed=seed))
            print(reports[-1], flush=True)
    return reports


def build_optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings and norms; each with its peak learning rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        (torch.optim.Muon(matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=0.01), recipe.matrix_rate),
        (torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0), recipe.learning_rate),
    ]


def _rate(step: int, recipe: Recipe) -> float:
    """Multiplier of the learning rate."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    flat = max(recipe.warmup, 0.6 * recipe.steps)
    return 1.0 if step <= flat else max(0.02, (recipe.steps - step) / (recipe.steps - flat))


def main(arguments: list[str] | None = None) -> None:
    """Train, save, evaluate on held-out problems (by default the shipped rows) and write `report.json`."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description="Train the embedded testbed model from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, its tokenizer and the report")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--learning-rate", type=float, default=recipe.learning_rate)
    parser.add_argument("--matrix-rate", type=float, default=recipe.matrix_rate)
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(recipe.difficulty.families), help="families of problems"
    )
    parser.add_argument(
        "--question-reference-share", type=float, default=recipe.question_reference_share, help="share of the mixture"
    )
    parser.add_argument("--drill-share", type=float, default=recipe.drill_share, help="share of the mixture")
    parser.add_argument("--reference-share", type=float, default=recipe.reference_share, help="share of the mixture")
    parser.add_argument(
        "--thoughtful-with-reference",
        type=float,
        default=recipe.thoughtful_with_reference,
        help="share of the sequences with a reference",
    )
    parser.add_argument(
        "--drill-steps", type=int, default=recipe.drill_steps, help="initial steps that contain drills only"
    )
    parser.add_argument("--problems", type=int, default=SIZES["validation"], help="held-out problems of the evaluation")
    parser.add_argument("--quick-every", type=int, default=0, help="steps between quick evaluations; 0: none")
    parser.add_argument("--measure-only", action="store_true", help="evaluate the model in the folder without training")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = replace(
        recipe,
        seed=options.seed,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        matrix_rate=options.matrix_rate,
        question_reference_share=options.question_reference_share,
        reference_share=options.reference_share,
        drill_share=options.drill_share,
        thoughtful_with_reference=options.thoughtful_with_reference,
        drill_steps=options.drill_steps,
        difficulty=replace(recipe.difficulty, families=tuple(options.families)),
    )
    if options.measure_only:
        model = Qwen3ForCausalLM.from_pretrained(str(options.output), dtype=torch.float32)
    else:
        model = pretrain(options.output, recipe, quick_every=options.quick_every)
    reports = evaluate(
        model, build_tokenizer(recipe.difficulty), options.problems, seed=DATA_SEED, difficulty=recipe.difficulty
    )
    (options.output / "report.json").write_text(json.dumps([r.as_dict() for r in reports], indent=2) + "\n")


if __name__ == "__main__":
    main()
