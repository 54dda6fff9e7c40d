"""The card of an export: the fields that the Hub reads, without paths of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_popsd.checkpoint.model_card import Scores, base_reference, hub_name, model_card
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import DataConfig, SourceConfig
from nemo_popsd.embedded.names import asset
from nemo_popsd.evaluation.comparison import Evaluation
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.megatron.config import LoRAConfig, StudentConfig
from tests.evaluation.scores import score

CACHE = "/home/me/.cache/huggingface/hub"
MODEL = f"{CACHE}/models--Qwen--Qwen3-8B/snapshots/abc123"
ROWS = f"{CACHE}/datasets--openai--gsm8k/snapshots/def/main/train-*.parquet"
VERSIONS = {"nemo_popsd": "0.1", "megatron-bridge": None}


def card(*, base: str = "Qwen/Qwen3-8B", **changes: Any) -> str:
    config = PopsdConfig(
        student=StudentConfig(source=MODEL, lora=LoRAConfig(rank=64, alpha=128)),
        data=DataConfig(train=SourceConfig(path=ROWS, more_paths=["/secret/more.jsonl"], limit=5)),
        evaluation=EvaluationConfig(resamples=200),
    )
    known: dict[str, Any] = {
        "name": "mine",
        "step": 200,
        "adapter": False,
        "scores": {},
        "versions": VERSIONS,
        "data_digest": "d" * 64,
    }
    return model_card(config, base=base, **{**known, **changes})


def evaluation(right: int) -> Evaluation:
    scores = [score(f"p{n}", n < right) for n in range(10)]
    return Evaluation.of(scores, EvaluationConfig(resamples=200))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (MODEL, "Qwen/Qwen3-8B"),
        (ROWS, "openai/gsm8k"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/models/Qwen3-8B", None),
        ("Qwen3-8B", None),
        ("nemo_popsd:tiny_reasoner", None),
        ("a/b/c", None),
    ],
)
def test_names_on_the_hub(path: str, name: str | None) -> None:
    assert hub_name(path) == name


def test_a_relative_path_that_exists_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_reference("models/mine") == str(tmp_path / "models" / "mine")
    assert base_reference("models/mine", "Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert base_reference("models/other", "models/mine") == str(tmp_path / "models" / "mine")
    assert base_reference("nemo_popsd:tiny_reasoner") == str(asset("nemo_popsd:tiny_reasoner"))
    assert base_reference(MODEL) == "Qwen/Qwen3-8B"


def test_the_front_matter_is_what_the_hub_reads() -> None:
    front = yaml.safe_load(card().split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-8B",
        "base_model_relation": "finetune",
        "tags": ["nemo_popsd", "self-distillation"],
    }
    adapter = yaml.safe_load(card(adapter=True).split("---\n")[1])
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")
    assert "base_model" not in yaml.safe_load(card(base="/secret/Qwen3-8B").split("---\n")[1])


def test_the_card_has_base_method_data_and_versions_and_no_paths() -> None:
    text = card()
    for part in (
        "# mine",
        "[Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B)",
        "arXiv 2607.02234",
        "| steps | 200 of 32 prompts |",
        "| trained weights | LoRA, rank 64, alpha 128, bf16 |",
        "| target | purified, beta 1.0, cap 10.0 |",
        "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k), the first 5 rows",
        "- `more.jsonl`, the first 5 rows",
        f"`{'d' * 64}`",
        "| nemo_popsd | 0.1 |",
        "| megatron-bridge |  |",
        "Not evaluated.",
        "vllm serve mine",
    ):
        assert part in text, part
    for private in ("/secret", "/home/me"):
        assert private not in text + card(base="/secret/Qwen3-8B", adapter=True)


def test_scores_have_intervals_and_changes() -> None:
    text = card(scores={"aime24": Scores(evaluation(8), evaluation(5)), "mine": Scores(evaluation(3))})
    [row] = [line for line in text.splitlines() if line.startswith("| aime24")]
    title, base, trained, change = (cell.strip() for cell in row.strip("|").split("|"))
    assert title == "aime24 (10 problems, avg@1)"
    assert (base.partition(" ")[0], trained.partition(" ")[0], change.partition(" ")[0]) == ("50.0", "80.0", "+30.0")
    assert all(cell.endswith("]") for cell in (base, trained, change))
    [row] = [line for line in text.splitlines() if line.startswith("| mine (")]
    assert row.count("|") == 5
    assert "95 % bootstrap intervals" in text
