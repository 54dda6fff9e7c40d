"""Measures the quality of each target without training: `python -m experiments.ceiling`, on the tuning rows.

1. Answers are sampled token by token from the target P; all its contexts see the tokens so far. They show the behaviour
   of the target, but not the course of training.
2. In worked solutions, values are guessed before they are checked. The probability of the right digits of a guess is
   measured in each context. Purification keeps what question and reference together add to the reference alone.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from experiments.arms import ARMS
from experiments.plan import CONF
from experiments.premise import MODEL
from experiments.rows import tuning_problems
from nemo_popsd.config.loading import load_config
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.distillation.definition import Branches, target_from_logits
from nemo_popsd.distillation.target_families import Target, build_target
from nemo_popsd.parallel.vocabulary import VocabShard
from nemo_popsd.testbed.contexts import count_markers, right
from nemo_popsd.testbed.problems import Difficulty, Problem, response, thoughtful_thoughts
from nemo_popsd.testbed.templates import CONTEXTS, Context, user_turn

_LONGEST = 256
_BATCH = 64


@dataclass
class _Branch:
    """The contexts of many rows, left-padded, with their cache."""

    model: Any
    tokens: Tensor
    mask: Tensor
    cache: Any

    @classmethod
    def of(cls, model: Any, tokenizer: Any, turns: Sequence[str]) -> _Branch:
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
            for t in turns
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        return cls(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            StaticCache(config=model.config, max_cache_len=batch["input_ids"].shape[1] + _LONGEST),
        )

    def next_logits(self) -> Tensor:
        """Logits after the tokens that were appended last: [B, V]."""
        width = self.tokens.shape[1]
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        found = self.model(
            input_ids=self.tokens, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache
        )
        return found.logits[:, -1]

    def append(self, tokens: Tensor) -> None:
        self.tokens = tokens[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.tokens)], dim=1)


@torch.no_grad()
def follow(
    model: Any, tokenizer: Any, problems: Sequence[Problem], target: Target, contexts: Sequence[Context], borrow: bool
) -> list[list[int]]:
    """One answer to each problem, sampled from the target at temperature 1; the student is the base.

    Args:
        model: the base.
        tokenizer: tokenizer of the model.
        problems: problems to answer.
        target: target distribution to sample from.
        contexts: context of student and base, context of the teacher, and the second context.
        borrow: whether the teacher sees the reference of the next problem.
    """
    references = [problem.reference for problem in problems]
    if borrow:
        references = references[1:] + references[:1]
    branches = [
        _Branch.of(model, tokenizer, [user_turn(c, p.question, r) for p, r in zip(problems, references, strict=True)])
        for c in contexts
    ]
    answers: list[list[int]] = [[] for _ in problems]
    running = set(range(len(problems)))
    while running and max(map(len, answers)) < _LONGEST:
        base, privileged, reference = (branch.next_logits() for branch in branches)
        log_p = target_from_logits(
            Branches(base, base, privileged, reference),
            target=target,
            shard=VocabShard(base.shape[1], base.shape[1]),
        )
        drawn = torch.multinomial(log_p.exp(), 1)[:, 0]
        for branch in branches:
            branch.append(drawn)
        for row in sorted(running):
            answers[row].append(int(drawn[row]))
            if answers[row][-1] == tokenizer.eos_token_id:
                running.remove(row)
    return answers


_GUESS = re.compile(r"(Then|Maybe|Perhaps) [a-i] =( \d)?")


@torch.no_grad()
def guesses(model: Any, tokenizer: Any, problems: Sequence[Problem], target: Target) -> dict[str, float]:
    """Mean probability of the right digits of guessed values in worked solutions, by each context and by the target.

    Args:
        model: the base.
        tokenizer: tokenizer of the model.
        problems: problems with worked solutions as in pre-training.
        target: target of the contexts question, question and reference, reference.
    """
    sums = dict.fromkeys((*CONTEXTS, "target"), 0.0)
    digits = 0
    for number, problem in enumerate(problems):
        thoughts = thoughtful_thoughts(problem, random.Random(number), Difficulty(mistake=0.0))
        answer = tokenizer.encode(response(thoughts, problem.answer), add_special_tokens=False)
        texts = [tokenizer.decode(answer[:place]) for place in range(len(answer))]
        places = [place for place, text in enumerate(texts) if _GUESS.fullmatch(text.rpartition("\n")[2].rstrip())]
        places = [place for place in places if tokenizer.decode(answer[place]).strip().isdigit()]
        logits = {}
        for context in CONTEXTS:
            turn = [{"role": "user", "content": user_turn(context, problem.question, problem.reference)}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            logits[context] = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1][places]
        base, privileged, reference = (logits[context] for context in CONTEXTS)
        followed = target_from_logits(
            Branches(base, base, privileged, reference),
            target=target,
            shard=VocabShard(base.shape[1], base.shape[1]),
        )
        right_ids = torch.tensor(answer)[places, None]
        for name, log_probs in (*((c, x.log_softmax(-1)) for c, x in logits.items()), ("target", followed)):
            sums[name] += float(log_probs.gather(1, right_ids).exp().sum())
        digits += len(places)
    return {name: total / digits for name, total in sums.items()}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="directory of the base")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="some of the arms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    problems = tuning_problems()
    print("| target | accuracy, % | markers per answer | tokens per answer |\n|---|---|---|---|", flush=True)
    seen: set[tuple[Target, bool]] = set()
    for arm in (arm for arm in ARMS if arm.name in options.arms):
        settings = load_config(str(CONF), list(arm.overrides)).distillation.target
        target, borrow = build_target(settings), settings.borrowed == Borrowed.PRIVILEGED
        if (target, borrow) in seen:  # arms that differ only in the divergence
            continue
        seen.add((target, borrow))
        torch.manual_seed(1)
        answers = []
        for first in range(0, len(problems), _BATCH):
            some = problems[first : first + _BATCH]
            answers += follow(model, tokenizer, some, target, CONTEXTS, borrow)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        accuracy = sum(right(t, p.answer) for t, p in zip(texts, problems, strict=True)) / len(problems)
        error = (accuracy * (1 - accuracy) / len(problems)) ** 0.5
        markers = sum(map(count_markers, texts)) / len(problems)
        length = sum(map(len, answers)) / len(problems)
        print(f"| {arm.title} | {100 * accuracy:.1f} ± {100 * error:.1f} | {markers:.2f} | {length:.1f} |", flush=True)
    found = guesses(model, tokenizer, problems[:128], build_target(load_config(str(CONF), []).distillation.target))
    print("\nprobability of the right digit of a guess: " + ", ".join(f"{name} {p:.3f}" for name, p in found.items()))


if __name__ == "__main__":
    main()
