"""docs/examples.md: its three runs from rows to an export, as they are written, with a small model and a few rows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nemo_popsd.embedded.names import asset
from tests.docs.command_checks import statements
from tests.docs.pages import text_of, yaml_files
from tests.docs.test_commands import run
from tests.tiny_models import load_dense, save_tiny_model

pytestmark = [pytest.mark.slow(seconds=25), pytest.mark.timeout(1500)]

PAGE = "docs/examples.md"
SHARED = Path(__file__).parents[2] / ".." / "shared"
SMALL = [
    "student.precision=fp32",
    "training.steps=2",
    "training.prompts_per_step=2",
    "optimizer.warmup_steps=0",
    "rollout.max_response_tokens=8",
    "evaluation.problems=2",
    "evaluation.max_response_tokens=8",
    "diagnosis.rows=2",
    "observability.progress_bar=false",
]
POSITIONS = 131_072


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def gsm8k(folder: Path) -> None:
    """Published rows, and a model with random weights and the real tokenizer of Qwen3."""
    tokenizer = SHARED / "tokenizers" / "qwen3"
    if not tokenizer.is_dir():
        pytest.skip(f"{tokenizer.resolve()} is missing")
    for split, name in (("train", "gsm8k_train_1k.jsonl"), ("test", "gsm8k_test_200.jsonl")):
        lines = (SHARED / "data" / name).read_text(encoding="utf-8").splitlines()[:12]
        write_parquet(folder / f"data/gsm8k/main/{split}-00000-of-00001.parquet", [json.loads(line) for line in lines])
    model = save_tiny_model(folder / "models" / "Qwen3-8B", vocab_size=151_936, max_position_embeddings=POSITIONS)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    for file in tokenizer.iterdir():
        (model / file.name).write_bytes(file.read_bytes())


def embedded(folder: Path) -> None:
    """The embedded model, without its limit of positions."""
    model = Path(shutil.copytree(asset("nemo_popsd:tiny_reasoner"), folder / "models" / "Qwen3-8B"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))


def chats(folder: Path) -> None:
    """Two shards of messages, and problems in verl's layout."""
    embedded(folder)
    for shard in range(2):
        asked = [(f"What is {n}+{shard}?", f"It is {n + shard}.") for n in range(4)]
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": r}]} for q, r in asked]
        write_parquet(folder / f"data/chats/data/train-0000{shard}-of-00002.parquet", rows)
    problems = [
        {
            "prompt": [{"role": "user", "content": f"What is {n}+5?"}],
            "reward_model": {"style": "rule", "ground_truth": f"{n + 5}"},
        }
        for n in range(3)
    ]
    write_parquet(folder / "data/held_out.parquet", problems)


def contest(folder: Path) -> None:
    """Rows of OpenThoughts3, and problems in the layout of MathArena."""
    embedded(folder)
    solved = [
        {
            "domain": domain,
            "conversations": [
                {"from": "human", "value": f"What is {n}+{n}?"},
                {"from": "gpt", "value": f"<think>\nHm.\n</think>\n\nIt is {2 * n}."},
            ],
        }
        for domain in ("math", "code")
        for n in range(4)
    ]
    write_parquet(folder / "data/OpenThoughts3-1.2M/data/train-00000-of-00001.parquet", solved)
    problems = [{"problem_idx": n, "problem": f"Find {n}*3.", "answer": 3 * n, "problem_type": ["a"]} for n in range(3)]
    write_parquet(folder / "data/contest.parquet", problems)


EXAMPLES = {
    "GSM8K": ("gsm8k", gsm8k),
    "Chat messages in Parquet": ("chats", chats),
    "Contest problems": ("contest", contest),
}
"""Title of the section to the name of its run, and what makes model and rows."""


def commands_of(title: str) -> list[list[str]]:
    """The commands in the section of the page with this title that are run, with paths below the working directory."""
    [section] = [part for part in text_of(PAGE).split("\n## ") if part.startswith(f"{title}\n")]
    [script] = re.findall(r"^```bash run\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [[below(word) for word in words] for words in statements(script)]


def below(text: str) -> str:
    return re.sub(r"(?<![\w.])/(models|data)/", r"\1/", text)


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_works_as_it_is_written(title: str, tmp_path: Path) -> None:
    name, prepare = EXAMPLES[title]
    prepare(tmp_path)
    commands, log, configuration = commands_of(title), tmp_path / "log", f"{name}.yaml"
    (tmp_path / configuration).write_text(below(yaml_files()[configuration]))
    for words in commands:
        small = SMALL if configuration in words else []
        assert run([*words, *small], tmp_path, log) == 0, f"{shlex.join(words)}\n{log.read_text()[-4000:]}"
        if "--compare" in words:
            assert log.read_text().startswith("base: models_Qwen3-8B (by --base)")
    metrics = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    losses = [line["train/loss"] for line in map(json.loads, metrics) if "train/loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 1 for loss in losses)
    assert (tmp_path / "runs" / name / "report.html").is_file()
    export = tmp_path / commands[-1][3]
    card = (export / "README.md").read_text()
    assert "base_model: Qwen/Qwen3-8B" in card
    assert f"| {'contest (2 problems, avg@4)' if name == 'contest' else 'validation (2 problems, avg@1)'} |" in card
    assert str(tmp_path) not in card
    if (export / "adapter_config.json").exists():
        from peft import PeftModel

        content = json.loads((export / "adapter_config.json").read_text())
        assert content["base_model_name_or_path"] == "Qwen/Qwen3-8B"
        model = PeftModel.from_pretrained(load_dense(tmp_path / "models" / "Qwen3-8B"), export)
    else:
        model = load_dense(export)
    with torch.no_grad():
        assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())
