"""One distillation batch, with its loss through Megatron and through transformers on full logits.

The target is fixed and random. Expected gradients are written as if they were weights of a Hugging Face model, so that
conversion gives them the names and shards of a Megatron model, as they are compared with each parameter's `main_grad`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_popsd.distillation import Branches, Divergence, HiddenPair, Target, loss_from_hidden, loss_from_logits
from nemo_popsd.parallel.vocabulary import VocabShard
from tests.tiny_models import load_dense

VOCABULARY, HIDDEN, PADDED = 203, 32, 256
LENGTHS = [(4, 6), (1, 1), (9, 12), (3, 0), (7, 1), (2, 5)]
"""Prompt and response tokens: one-token prompts and responses, an empty response."""
EVERYTHING = 10_000
"""A token budget that holds all sequences at once."""

_generator = torch.Generator().manual_seed(11)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


PROMPTS = [torch.randint(0, VOCABULARY, (p,), generator=_generator).tolist() for p, _ in LENGTHS]
RESPONSES = [torch.randint(0, VOCABULARY, (r,), generator=_generator).tolist() for _, r in LENGTHS]
ANCHORS = [_random(r, HIDDEN) for _, r in LENGTHS]
SHIFTS = [_random(r, HIDDEN) for _, r in LENGTHS]
WEIGHTS = [torch.rand(r, generator=_generator) for _, r in LENGTHS]
TEACHER = 0.3 * _random(PADDED, HIDDEN)
"""The teacher's output matrix; the values of padded output vectors must not matter."""
TARGET, DIVERGENCE = Target.purified(), Divergence()


def sequences() -> list[Any]:
    from nemo_popsd.megatron.microbatches import ContextSequence

    return [ContextSequence(prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def predicting_positions(row: int) -> list[int]:
    """The positions before each response token, one by one."""
    return [position - 1 for position in range(sum(LENGTHS[row])) if position >= LENGTHS[row][0]]


def loss_function(student: Any, rows: Sequence[int]) -> Callable[..., tuple[Tensor, float]]:
    """For `forward_backward` over the sequences `rows`: Σ weight · divergence, through this rank's vocabulary shard."""
    width = student.weight.shape[0]
    shard = TEACHER.split(width)[student.tp_group.rank()]

    def loss(batch: Any, hidden_NH: Tensor) -> tuple[Tensor, float]:
        chosen = [rows[row] for row in batch.sequences]
        main_gradient = student.main_gradient
        trained = student.weight.requires_grad and student.weight.main_grad.dtype == torch.float32
        assert (main_gradient is not None) == trained
        result = loss_from_hidden(
            hidden_NH,
            student.weight,
            HiddenPair(torch.cat([ANCHORS[row] for row in chosen]), torch.cat([SHIFTS[row] for row in chosen])),
            shard,
            target=TARGET,
            divergence=DIVERGENCE,
            shard=VocabShard(VOCABULARY, width, student.tp_group),
            token_weights=torch.cat([WEIGHTS[row] for row in chosen]),
            chunk_tokens=7,
            main_gradient=main_gradient,
        )
        return result.total, result.total.item()

    return loss


def dense_gradients(directory: Path, output: Path) -> float:
    """The same loss by its definition and plain autograd in transformers, one unpadded sequence at a time.

    Writes the gradients to `output` as the weights of a model; returns the loss.
    """
    model = load_dense(directory)
    teacher = TEACHER[:VOCABULARY]
    total = torch.zeros(())
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, predicting_positions(row)]
        if response:
            shift, base = SHIFTS[row] @ teacher.T, ANCHORS[row] @ teacher.T
            options = {"target": TARGET, "divergence": DIVERGENCE, "shard": VocabShard(VOCABULARY, logits.shape[1])}
            per_token = loss_from_logits(
                Branches(logits, base=base, privileged=shift, reference=torch.zeros_like(shift)), **options
            )
            total = total + (WEIGHTS[row] * per_token).sum()
    total.backward()
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(directory / "config.json", output)
    save_file({name: p.grad.contiguous() for name, p in model.named_parameters()}, output / "model.safetensors")
    return total.item()


def expected_gradients(directory: Path, tensor: int) -> dict[str, Tensor]:
    """The gradients written by `dense_gradients`, by the names and in the shards of a Megatron model."""
    from tests.tiny_models import build_student

    model = build_student(directory, tensor=tensor).gpt
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fill_gradients(student: Any, rows: Sequence[int], token_budget: int) -> list[float]:
    """Adds the gradients of the sequences `rows` to ``main_grad``; returns the losses of the micro-batches."""
    from nemo_popsd.megatron.config import OptimizerConfig
    from nemo_popsd.megatron.forward import forward_backward, student_batches

    everything = sequences()
    batches = student_batches(student.chunks, [everything[row] for row in rows], token_budget, packed=False)
    return forward_backward(student.wrap(OptimizerConfig(distributed="false")), batches, loss_function(student, rows))


def accumulated_gradients(
    student: Any, rows: Sequence[int], token_budget: int, **optimizer: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """``main_grad`` of every trained parameter after one `forward_backward`, and the losses of the micro-batches.

    `optimizer` are fields of `OptimizerConfig`.
    """
    from nemo_popsd.megatron.config import OptimizerConfig

    for chunk in student.wrap(OptimizerConfig(distributed="false", **optimizer)):
        chunk.zero_grad_buffer()
    losses = fill_gradients(student, rows, token_budget)
    trained = {name: p for name, p in student.gpt.named_parameters() if p.requires_grad}
    return {name: p.main_grad.clone() for name, p in trained.items()}, losses


def deviations(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest deviation of each tensor, relative to its largest entry."""
    assert actual.keys() == expected.keys()
    result = {}
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name}: nothing to compare"
        result[name] = ((actual[name] - value).abs().max() / value.abs().max()).item()
    return result
