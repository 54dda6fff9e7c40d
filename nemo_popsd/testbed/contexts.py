"""Accuracy, length and epistemic markers of a testbed model's answers from each of the three contexts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_popsd.testbed.templates import Context, user_turn

MARKERS = ("wait", "maybe", "perhaps", "check")
"""Epistemic markers, counted regardless of case."""
_MARKER = re.compile(rf"\b({'|'.join(MARKERS)})\b", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class ContextReport:
    """Answers of one model from one context."""

    context: Context
    temperature: float
    """0 means greedy."""
    problems: int
    accuracy: float
    """Share of answers whose last box holds the right value."""
    standard_error: float
    markers: float
    """Epistemic markers per answer."""
    length: float
    """Tokens per answer."""
    finished: float
    """Share of answers that end with the end token."""

    def __str__(self) -> str:
        mode = "greedy" if self.temperature == 0 else f"T={self.temperature:g}"
        return (
            f"{self.context:<18} {mode:<7} n={self.problems} accuracy {100 * self.accuracy:5.1f} "
            f"+- {100 * self.standard_error:.1f} %  markers {self.markers:.2f}  tokens {self.length:.1f}  "
            f"finished {100 * self.finished:.1f} %"
        )

    def as_dict(self) -> dict[str, object]:
        """The report as plain values."""
        return asdict(self)


def right(text: str, answer: str) -> bool:
    r"""Whether the last `\boxed{}` of an answer holds the right value."""
    boxes = _BOXED.findall(text)
    return bool(boxes) and boxes[-1].strip() == answer


def count_markers(text: str) -> int:
    """How many epistemic markers a text holds."""
    return len(_MARKER.findall(text))


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 128,
) -> list[list[int]]:
    """Token ids of one answer per user turn, end token included; greedy when `temperature` is 0.

    Uses the global torch generator, so seed it for the same answers.
    """
    answers: list[list[int]] = []
    for first in range(0, len(prompts), batch_size):
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts[first : first + batch_size]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        mode: dict[str, float | bool | None] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            mode = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        generate = cast(Callable[..., torch.Tensor], model.generate)
        output = generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **mode,
        )
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            answers.append(ids[:end])
    return answers


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    context: Context,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> ContextReport:
    """Answer every row once from one context and summarise the answers."""
    training = model.training
    model.eval()
    torch.manual_seed(seed)
    prompts = [user_turn(context, row["question"], row["reference"]) for row in rows]
    answers = sample_answers(model, tokenizer, prompts, temperature=temperature, max_new_tokens=max_new_tokens)
    model.train(training)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    n = len(rows)
    accuracy = sum(right(text, row["answer"]) for text, row in zip(texts, rows, strict=True)) / n
    return ContextReport(
        context=context,
        temperature=temperature,
        problems=n,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / n),
        markers=sum(map(count_markers, texts)) / n,
        length=sum(map(len, answers)) / n,
        finished=sum(ids[-1] == tokenizer.eos_token_id for ids in answers) / n,
    )
