"""Pre-training in pieces gives the weights of one piece; its pools hold what the plan says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import UserError
from nemo_popsd.testbed.pretrain import Recipe
from nemo_popsd.testbed.problems import Difficulty
from nemo_popsd.testbed.reasoner import (
    LARGER,
    LONG,
    Plan,
    Pretraining,
    Progress,
    batches_of,
    check,
    rate,
    shared_tokenizer,
)
from nemo_popsd.testbed.templates import CONTEXTS

SHORT = Difficulty(shortest=2, longest=2, sheet=2)
TINY = Plan(
    mixture=Recipe(difficulty=SHORT, warmup=2),
    long=replace(SHORT, longest=4),
    tokens=3000,
    batch_tokens=512,
    pool=6,
    sheet_pools=1,
    drill_pools=1,
    long_from=2,
    hidden=64,
    layers=1,
)


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
def test_pieces_give_the_weights_and_the_curve_of_one_piece(tmp_path: Path) -> None:
    whole = Pretraining(tmp_path / "whole", TINY)
    whole.run(1e9, log_every=2)
    assert whole.complete
    pieces = 0
    while not (piece := Pretraining(tmp_path / "pieces", TINY)).complete:
        piece.run(0.0, log_every=2)  # a step
        pieces += 1
        with (tmp_path / "pieces" / "loss.jsonl").open("a") as lines:  # as a killed piece leaves it
            lines.write(json.dumps({"step": piece.progress.step + 1, "loss": 0.0}) + "\n")
    assert pieces == whole.progress.step > 3
    assert piece.progress.pool > 1, "pieces end within pools and between them"
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "pieces")]
    for name, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][name]), name
    losses = curve(tmp_path / "whole")
    assert curve(tmp_path / "pieces") == losses
    assert [line["step"] for line in losses] == list(range(2, whole.progress.step + 1, 2))
    assert losses[-1]["loss"] < losses[0]["loss"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pieces" / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.norm.weight, states[0]["model"]["model.norm.weight"].bfloat16())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "pieces" / "model")) == loaded.config.vocab_size


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    Pretraining(tmp_path, TINY).run(0.0)
    with pytest.raises(UserError, match="another plan"):
        Pretraining(tmp_path, replace(TINY, tokens=4000))


def test_the_tokenizer_is_the_embedded_models() -> None:
    embedded = AutoTokenizer.from_pretrained(asset("nemo_popsd:tiny_reasoner"))
    assert shared_tokenizer().get_vocab() == embedded.get_vocab()


def test_pools_begin_with_sheets_and_end_with_long_problems_too() -> None:
    tokenizer = shared_tokenizer()
    plan = Plan(pool=64, sheet_pools=1, drill_pools=2, long_from=3, long_share=0.3)

    def texts(number: int) -> list[str]:
        batches = batches_of(tokenizer, plan, number)
        for batch in batches:
            width = max(len(ids) for ids, _ in batch)
            assert len(batch) * width <= plan.batch_tokens
        return [tokenizer.decode(ids) for batch in batches for ids, _ in batch]

    sheets, drills, short, mixed = map(texts, range(4))
    assert sheets == texts(0), "a function of the number alone"
    assert all("user\nVersion: " in text for text in sheets)
    assert 15 < sum("user\nPractise." in text for text in drills) < 50
    assert all(len(text) < 1500 for text in short)
    assert any(" Find " in text for text in short)
    assert any("From an even place" in text for text in short)
    assert 8 < sum(len(text) > 2000 for text in mixed) < 32


def test_the_rate_rises_stays_and_falls() -> None:
    plan = Plan(tokens=1000)
    found = [
        rate(Progress(step=step, tokens=tokens), plan) for step, tokens in ((0, 0), (99, 500), (199, 800), (1, 990))
    ]
    assert found == [0.02, 1.0, pytest.approx(0.5), 0.04]
    assert rate(Progress(step=500, tokens=999), plan) == 0.02


def test_long_problems_have_more_steps_than_short_ones() -> None:
    assert LONG.shortest > LARGER.longest
    assert LONG.families == LARGER.families


def test_the_check_has_every_family_and_length_and_keeps_its_limits(tmp_path: Path) -> None:
    training = Pretraining(tmp_path, TINY)
    found = check(training.model, training.tokenizer, 2, limits=(3, 5))
    rows = [(one["kind"], one["family"], one["context"]) for one in found]
    assert rows == [
        *(("short", family, context) for family in LARGER.families for context in CONTEXTS),
        *(("long", family, "question") for family in LARGER.families),
    ]
    assert {one["problems"] for one in found} == {2}
    for name, limit in (("short", 3), ("long", 5)):
        assert max(float(str(one["length"])) for one in found if one["kind"] == name) == limit
