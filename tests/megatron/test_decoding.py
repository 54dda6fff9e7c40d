"""Decoding from a cache of slots against forwards of the full sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (4, 40), generator=torch.Generator().manual_seed(1))
PROMPTS = [3, 9, 1, 6]
"""Length of each slot's prompt."""
STEPS = 12
KINDS = ["qwen3", "qwen2", "olmo3", "smollm3", "qwen3_moe"]
"""Norms over heads, biases, norms over projections with windows of 5 in three layers of four, layers without rotary
embedding, experts."""


def observe(rank: int, world_size: int, source: Path) -> dict[str, Any]:
    """Logits of slots at different positions by step, logits of their full sequences, and the model's final state."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

    from nemo_popsd.megatron.decoding import SlotDecoder
    from nemo_popsd.megatron.kv_cache import attentions

    student = build_student(source, parallel={"tensor": world_size, "sequence": "auto"})
    before = whole_logits(student.gpt, IDS, 203)
    parts = lambda: [a.core_attention for a in attentions(student.chunks)] + [student.gpt.rotary_pos_emb]  # noqa: E731
    modules, flags = parts(), (student.gpt.training, student.gpt.config.sequence_parallel)
    decoder = SlotDecoder(student.chunks, slots=6, capacity=48)
    steps, copied, moved = [], [], []
    with torch.no_grad(), decoder.open():
        for slots in ([0, 3], [1]):  # several prompts together, the shorter padded; slot 2 has none
            longest = max(PROMPTS[slot] for slot in slots)
            inputs = torch.stack([IDS[n, :longest].where(torch.arange(longest) < PROMPTS[n], 7) for n in slots])
            decoder.prefill(torch.tensor(slots), inputs)
        decoder.prefill(torch.tensor([2]), IDS[2:3, :1])
        decoder.copy(torch.tensor([1]), torch.tensor([5]), PROMPTS[1])  # before the slot goes beyond its prompt
        positions = torch.tensor(PROMPTS)
        rows = torch.arange(4)
        for step in range(STEPS):
            at = positions + step
            reach = int(at.max()) + 1 + step % 3  # a longer reach changes nothing
            logits = decoder.next_logits(IDS[rows, at], at, reach)
            assert logits is not None
            steps.append(gather(logits)[:, :203].clone())
        decoder.copy(torch.tensor([5]), torch.tensor([0]), PROMPTS[1])
        decoder.copy(torch.tensor([3]), torch.tensor([1]), PROMPTS[3] + STEPS)
        for step in range(3):  # slot 0 continues the prompt of slot 1, slot 1 the sequence of slot 3
            at = torch.tensor([PROMPTS[1] + step, PROMPTS[3] + STEPS + step])
            logits = decoder.next_logits(torch.stack([IDS[1, at[0]], IDS[3, at[1]]]), at, int(at.max()) + 1)
            assert logits is not None
            copied.append(gather(logits)[0, :203].clone())
            moved.append(gather(logits)[1, :203].clone())
    return {
        "whole": before,
        "steps": torch.stack(steps, dim=1),
        "copied": torch.stack(copied),
        "moved": torch.stack(moved),
        "plain": [plain is not None for plain in decoder._plain],
        "restored": all(a is b for a, b in zip(modules, parts(), strict=True)),
        "flags": flags == (student.gpt.training, student.gpt.config.sequence_parallel),
        "same after": torch.equal(before, whole_logits(student.gpt, IDS, 203)),
    }


@pytest.mark.parametrize("size", [pytest.param(1, id="tp1"), pytest.param(2, id="tp2 sp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_full_recomputation(tmp_path: Path, kind: str, size: int, layers: str) -> None:
    source = save_tiny_model(tmp_path, kind)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=2e-5)  # noqa: E731
    for seen in run_ranks(observe, size, source, layers=layers):
        whole: Tensor = seen["whole"]
        for row, begin in enumerate(PROMPTS):
            close(seen["steps"][row], whole[row, begin : begin + STEPS])
        close(seen["copied"], whole[1, PROMPTS[1] : PROMPTS[1] + 3])
        close(seen["moved"], whole[3, PROMPTS[3] + STEPS : PROMPTS[3] + STEPS + 3])
        assert seen["plain"] == [kind != "olmo3"]
        assert seen["restored"]
        assert seen["flags"]
        assert seen["same after"]


def refuse(rank: int, world_size: int, source: Path) -> list[str]:
    """Errors of a decoder for a model with another attention or rotary embedding."""
    from nemo_popsd.megatron.decoding import SlotDecoder
    from nemo_popsd.megatron.kv_cache import attentions

    student = build_student(source)
    messages = []
    first = next(attentions(student.chunks))
    for owner, name in ((first, "core_attention"), (student.gpt, "rotary_pos_emb")):
        original = getattr(owner, name)
        setattr(owner, name, torch.nn.Identity())
        try:
            with SlotDecoder(student.chunks, slots=1, capacity=8).open():
                pass
        except UserError as error:
            messages.append(str(error))
        setattr(owner, name, original)
    with SlotDecoder(student.chunks, slots=1, capacity=8).open():
        pass
    return messages


def test_attention_that_the_cache_cannot_replace_is_refused(tmp_path: Path, layers: str) -> None:
    (messages,) = run_ranks(refuse, 1, save_tiny_model(tmp_path), layers=layers)
    assert ["core attention Identity" in messages[0], "rotary embedding Identity" in messages[1]] == [True, True]
