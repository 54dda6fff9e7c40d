"""Named sets are found in the user's directory and in the caches, and nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.data.named_sets import NAMED_SETS, named_source, refuse_another_size
from nemo_popsd.data.sources import read_records
from nemo_popsd.errors import UserError

ROWS = [{"id": n, "problem": f"What is {n}+1?", "answer": str(n + 1), "url": "u"} for n in range(30)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def table() -> Any:
    from datasets import Dataset  # with pandas and aiohttp: most of a second for each worker that collects this file

    return Dataset.from_list(ROWS)


def prepared(home: Path, repository: str, split: str, rows: list[dict]) -> Path:
    """The file that `datasets` writes when it loads a repository of the Hub."""
    from datasets.arrow_writer import ArrowWriter
    from datasets.naming import camelcase_to_snakecase

    owner, name = repository.split("/")
    dataset = camelcase_to_snakecase(name)
    folder = (
        home / "datasets" / f"{owner}___{dataset}" / "default" / "0.0.0" / "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
    )
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / f"{dataset}-{split}.arrow")) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return folder


def read(name: str, directory: str = "") -> list[tuple[str, str | None]]:
    records, _ = read_records(named_source(name, directory), need_reference=False, need_answer=True)
    refuse_another_size(name, len(records))
    return [(record.question, record.answer) for record in records]


WANTED = [(row["problem"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_a_file_of_the_user_is_found(form: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    if form == "jsonl":
        (own / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "parquet":
        table().to_parquet(own / "aime24.parquet")
    else:
        table().save_to_disk(own / "aime24")
    assert read("aime24", str(own)) == WANTED


@pytest.mark.parametrize(("repository", "split"), NAMED_SETS["aime24"].repositories)
def test_the_cache_of_datasets_is_found(repository: str, split: str, home: Path) -> None:
    columns = {"problem": "Problem", "answer": "Answer"} if repository.startswith("Maxwell") else {}
    rows = [{columns.get(key, key): value for key, value in row.items()} for row in ROWS]
    prepared(home, repository, split, rows)
    assert read("aime24") == WANTED


def test_math500_is_found_under_the_name_that_datasets_gives_it(home: Path) -> None:
    rows = [{"problem": "q", "solution": "s", "answer": r"\frac{1}{2}", "unique_id": str(n)} for n in range(500)]
    prepared(home, "HuggingFaceH4/MATH-500", "test", rows)
    assert len(read("math500")) == 500


def test_gsm8k_takes_the_answer_from_the_solution(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"so it is\n#### {n}"} for n in range(1319)]
    folder = prepared(home, "openai/gsm8k", "test", rows)
    assert read("gsm8k")[7] == ("q7", "7")
    # The cache may be elsewhere.
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "moved"))
    folder.parents[3].rename(tmp_path / "moved")
    assert read("gsm8k")[7] == ("q7", "7")


def test_the_cache_of_the_hub_client_is_found(home: Path) -> None:
    snapshot = home / "hub" / "datasets--MathArena--hmmt_feb_2025" / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    table().to_parquet(snapshot / "train-00000-of-00001.parquet")
    assert read("hmmt25") == WANTED


def test_the_users_file_comes_first(home: Path, tmp_path: Path) -> None:
    prepared(home, "HuggingFaceH4/aime_2024", "train", ROWS)
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row | {"problem": "mine"}) + "\n" for row in ROWS))
    assert read("aime24", str(tmp_path))[0][0] == "mine"


def test_the_message_for_a_missing_set_names_all_searched_places(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is downloaded") as raised:
        named_source("aime25", str(tmp_path))
    message = str(raised.value)
    assert str(tmp_path / "aime25.jsonl") in message
    assert str(home / "datasets" / "math-ai___aime25") in message
    assert str(home / "hub" / "datasets--math-ai--aime25") in message
    assert "evaluation.sets_directory" in message


def test_files_that_are_not_the_set_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "aime24.jsonl"
    file.write_text('{"text": "q", "label": "1"}\n')
    with pytest.raises(UserError, match="got columns text, label; need one of problem, question"):
        named_source("aime24", str(tmp_path))
    file.write_text("nonsense\n")
    with pytest.raises(UserError, match="not valid JSON"):
        named_source("aime24", str(tmp_path))
    file.write_text("")
    with pytest.raises(UserError, match="no row"):
        named_source("aime24", str(tmp_path))
    with pytest.raises(UserError, match="got 29 usable problems; need 30"):
        refuse_another_size("aime24", 29)
