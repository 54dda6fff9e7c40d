"""docs/full_size.md: its comparisons as they are written, with small models of both architectures and a few rows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_popsd.embedded.names import asset
from tests.docs.command_checks import statements
from tests.docs.pages import ROOT, text_of
from tests.docs.test_commands import run
from tests.docs.test_examples import POSITIONS, SMALL, below, write_parquet
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow(seconds=25), pytest.mark.timeout(1500)]

PAGE = "docs/full_size.md"
FEW = [word for word in SMALL if not word.startswith("evaluation.problems=")]
CONTESTS = ("aime24", "aime25", "hmmt25")


def model(folder: Path, name: str, **config: object) -> None:
    """Random weights in the architecture of `name`, with the tokenizer of the embedded model."""
    tokenizer = asset("nemo_popsd:tiny_reasoner")
    size = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    made = save_tiny_model(folder / "models" / name, vocab_size=size, max_position_embeddings=POSITIONS, **config)
    (made / "chat_template.jinja").unlink()
    for file in tokenizer.glob("*token*.json"):
        (made / file.name).write_bytes(file.read_bytes())


def contests(folder: Path) -> None:
    """Thirty problems per contest; a test evaluates one of them."""
    for contest in CONTESTS:
        lines = [json.dumps({"problem": f"Find {n}*3 ({contest}).", "answer": str(3 * n)}) for n in range(30)]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{contest}.jsonl").write_text("\n".join(lines))


def small(folder: Path) -> None:
    model(folder, "Qwen3-1.7B", tie_word_embeddings=True)
    rows = [{"problem": f"What is {n}+5?", "solution": f"It is {n + 5}.", "answer": f"{n + 5}"} for n in range(6)]
    write_parquet(folder / "data/openthoughts_math/data/train-00000-of-00001.parquet", rows)


def paper(folder: Path) -> None:
    model(folder, "Qwen3-8B", tie_word_embeddings=False)
    rows = [
        {"uuid": str(n), "input": f"What is {n}+5?", "output": f"It is {n + 5}.", "domain": "math", "meta": ""}
        for n in range(6)
    ]
    (folder / "data" / "dasd").mkdir(parents=True)
    (folder / "data" / "dasd" / "stage1.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


COMPARISONS: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    "Qwen3-1.7B on one H100": ("small", small, ["base", "Purified, answer", "Purified", "OPSD"]),
    "Qwen3-8B on one node": ("paper", paper, ["base", "OPSD", "Purified"]),
}
"""Beginning of a title to the directory in runs/, what makes model and rows, and the rows of the table."""


def commands_of(title: str) -> list[list[str]]:
    """The commands of a section for one process and without a server; jobs are run as the commands in them."""
    [section] = [part for part in text_of(PAGE).split("\n## ") if part.startswith(title)]
    [script] = re.findall(r"^```bash run\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    commands = []
    for words in statements(script):
        job = re.fullmatch(r"sbatch slurm/(train|evaluate)\.sh", " ".join(words[:2]))
        as_run = ["popsd", job[1], *words[2:]] if job else words
        commands.append([below(word) for word in as_run if not word.startswith(("rollout.engine=", "rollout.vllm."))])
    return commands


@pytest.mark.parametrize("title", COMPARISONS)
def test_a_comparison_works_as_it_is_written(title: str, tmp_path: Path) -> None:
    name, prepare, arms = COMPARISONS[title]
    prepare(tmp_path)
    contests(tmp_path)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    log = tmp_path / "log"
    for words in commands_of(title):
        evaluates = words[:2] == ["popsd", "evaluate"]
        changed = [*FEW, *["evaluation.problems=1", "evaluation.samples_per_problem=2"] * evaluates]
        extra = changed if any(word.startswith("conf/") for word in words) else []
        assert run([*words, *extra], tmp_path, log) == 0, f"{shlex.join(words)}\n{log.read_text()[-4000:]}"
    head, _, *rows = (line for line in (tmp_path / f"runs/{name}/table.md").read_text().splitlines() if "|" in line)
    assert [row.split("|")[1].strip() for row in rows] == arms
    assert [title in head for title in (*CONTESTS, "average, %", "published")] == [True] * 5
    assert (tmp_path / f"runs/{name}/report.html").is_file()
