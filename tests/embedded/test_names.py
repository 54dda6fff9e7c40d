"""The embedded files are those that the recipe makes, and fit the default configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_popsd.config.loading import load_config
from nemo_popsd.data.dataset import build_dataset
from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import UserError
from nemo_popsd.testbed.contexts import ContextReport, report
from nemo_popsd.testbed.data import SIZES, shipped_text
from nemo_popsd.testbed.problems import Split, split_of
from nemo_popsd.testbed.tokenizer import build_tokenizer

_MODEL = asset("nemo_popsd:tiny_reasoner")


@pytest.mark.parametrize("split", list(SIZES))
def test_rows_are_those_that_the_generator_draws(split: Split) -> None:
    text = asset(f"nemo_popsd:tiny_{split}").read_text(encoding="utf-8")
    assert text == shipped_text(split)
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == SIZES[split]
    assert {split_of(_task(row)) for row in rows} == {split}


def _task(row: dict[str, str]) -> str:
    """The question without its version, which the splits must not share."""
    return row["question"].partition(" Version: ")[0]


def test_shipped_splits_share_no_task() -> None:
    train, validation = (
        {_task(json.loads(line)) for line in asset(f"nemo_popsd:tiny_{split}").read_text().splitlines()}
        for split in SIZES
    )
    assert len(train) == SIZES["train"]
    assert len(validation) == SIZES["validation"]
    assert not train & validation


@pytest.mark.parametrize("name", ["nemo_popsd:tiny", "tiny_train", "nemo_popsd:../assets", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="nemo_popsd:tiny_reasoner"):
        asset(name)


def test_model_folder_is_small_and_complete() -> None:
    files = {path.name for path in _MODEL.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= (files)
    assert sum(path.stat().st_size for path in _MODEL.iterdir()) < 4 * 2**20
    assert json.loads((_MODEL / "tokenizer_config.json").read_text())["chat_template"]
    assert (_MODEL.parent / "MODEL_CARD.md").is_file()


def test_the_shapes_of_the_model_exercise_the_hard_cases() -> None:
    config = json.loads((_MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] % 128, "the vocabulary must need padding"
    assert config["num_key_value_heads"] % 2 == 0
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]


def test_the_shipped_tokenizer_equals_the_built_one() -> None:
    shipped, built = AutoTokenizer.from_pretrained(_MODEL), build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert (shipped.eos_token, shipped.pad_token) == (built.eos_token, built.pad_token)


def _reports(temperature: float, count: int = 128) -> dict[str, ContextReport]:
    model = AutoModelForCausalLM.from_pretrained(_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    path: Path = asset("nemo_popsd:tiny_validation")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return {
        context: report(model, tokenizer, rows, context, temperature=temperature)  # type: ignore[arg-type]
        for context in ("question", "question+reference")
    }


@pytest.mark.slow
def test_at_temperature_1_the_shipped_model_is_better_with_the_reference() -> None:
    """Alone it solves some problems; with the reference it solves 15 points more, with half the markers and tokens."""
    reports = _reports(temperature=1.0)
    alone, taught = reports["question"], reports["question+reference"]
    assert 0.30 <= alone.accuracy <= 0.80
    assert taught.accuracy >= alone.accuracy + 0.15
    assert taught.markers < alone.markers / 2
    assert taught.length < alone.length / 2
    assert alone.finished > 0.98


@pytest.mark.slow
def test_greedy_answers_are_more_accurate_than_sampled_ones() -> None:
    """The model card states that evaluation samples at temperature 1 because greedy answers leave little to learn."""
    reports = _reports(temperature=0.0)
    alone, taught = reports["question"], reports["question+reference"]
    assert 0.80 < alone.accuracy < 0.97
    assert taught.markers < alone.markers / 2


def test_the_default_recipe_fits_the_positions_of_the_model() -> None:
    """Checked with the shipped limits, which tests of complete runs reduce."""
    config = load_config(Path(__file__).parents[2] / "conf" / "tiny.yaml")
    folder = asset(config.student.source)
    dataset, counts = build_dataset(config.data, config.data.train, AutoTokenizer.from_pretrained(folder))
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert dataset.builder.longest_context + config.rollout.max_response_tokens <= positions
    assert counts.rows_kept == SIZES["train"]
    assert counts.references_truncated == 0
