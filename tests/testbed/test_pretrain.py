"""The recipe trains, is deterministic, and saves a model that transformers can load."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_popsd.testbed.contexts import count_markers, right
from nemo_popsd.testbed.pretrain import Recipe, batches, evaluate, pretrain
from nemo_popsd.testbed.tokenizer import build_tokenizer


@pytest.mark.slow
def test_three_steps_train_save_load_and_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(steps=3, batch=4, warmup=1)
    first = pretrain(tmp_path / "first", recipe, log_every=1)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    second = pretrain(tmp_path / "second", recipe)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, second.state_dict()[name], rtol=0, atol=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    ids = torch.tensor([tokenizer.encode("Let a = 3")])
    torch.testing.assert_close(loaded(ids).logits, first.eval()(ids).logits)
    reports = evaluate(first, tokenizer, 2, temperatures=(1.0,), seed=1)
    assert [r.context for r in reports] == ["question", "question+reference", "reference"]
    assert all(r.problems == 2 and r.length <= 256 for r in reports)


def test_batches_label_only_the_assistant_and_contain_every_context() -> None:
    tokenizer = build_tokenizer()
    stream = batches(tokenizer, replace(Recipe(), batch=8, drill_steps=0, drill_share=0.0))
    seen = set()
    for _ in range(16):
        ids, labels = next(stream)
        assert ids.shape == labels.shape
        for row, targets in zip(ids, labels, strict=True):
            answer = targets[targets != -100]
            assert answer[-1] == tokenizer.eos_token_id
            end = int((targets != -100).nonzero()[-1])
            start = int((targets != -100).nonzero()[0])
            assert torch.equal(row[start : end + 1], answer)
            assert (row[end + 1 :] == tokenizer.pad_token_id).all()
            prompt = tokenizer.decode(row[:start])
            assert prompt.endswith(("assistant\n", "</think>\n\n"))
            seen.add(("modulo" in prompt or "ring" in prompt, "Reference" in prompt, prompt.endswith("</think>\n\n")))
    assert {pair[:2] for pair in seen} == {(True, False), (True, True), (False, True)}
    assert any(no_thinking for *_, no_thinking in seen)


def test_pretraining_starts_with_drills() -> None:
    tokenizer = build_tokenizer()
    stream = batches(tokenizer, replace(Recipe(), batch=4, drill_steps=16, drill_share=0.0))
    texts = [text for _ in range(32) for text in tokenizer.batch_decode(next(stream)[0])]
    drills = [re.search(r"user\n(Practise\.|Version: (blue|red)\.\n)", text) is not None for text in texts]
    assert drills == [True] * 64 + [False] * 64


def test_drills_start_with_sheets_without_a_task() -> None:
    tokenizer = build_tokenizer()
    stream = batches(tokenizer, replace(Recipe(), batch=4, drill_steps=48, drill_share=0.0))
    texts = [text for _ in range(48) for text in tokenizer.batch_decode(next(stream)[0])]
    sheets = [text for text in texts if "Practise." not in text]
    assert all(text in sheets for text in texts[:64])  # the sequences that are sorted and shuffled together
    assert 12 < len(sheets) - 128 < 52, "then one half"
    for text in sheets:
        user, _, assistant = text.partition("<|im_end|>")
        [version] = re.findall(r"user\nVersion: (blue|red)\.\n", user)
        values = re.findall(r"Then ([a-i]) = (\d+)", assistant)
        assert values == re.findall(rf"([a-i]) {version} (\d+)", user)
        assert len(values) == 8


def test_answers_and_markers_are_read_from_the_text() -> None:
    assert right("\\boxed{3} \\boxed{42}", "42")
    assert not right("\\boxed{42} \\boxed{3}", "42")
    assert not right("42", "42")
    assert count_markers("Wait, check 3. Maybe not; checks, waiting") == 3
