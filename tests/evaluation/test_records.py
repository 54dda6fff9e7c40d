"""The files of an evaluation, including those of a killed one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.records import (
    EvaluationDirectory,
    Problem,
    Sample,
    prompt_digest,
)
from tests.evaluation.scores import sample_settings, score

SETTINGS = sample_settings({"p": "1", "q": "2"}, model="a")
PROBLEMS = [Problem("p", "1+1?", "2"), Problem("q", "2+2?", "4")]


def sample(problem: str = "p", number: int = 0, text: str = "two\nlines   é") -> Sample:
    return Sample(problem, number, text, tokens=3, truncated=False)


def opened(path: Path, **changes: object) -> EvaluationDirectory:
    directory = EvaluationDirectory(path / "set")
    directory.begin(dataclasses.replace(SETTINGS, **changes), PROBLEMS)  # type: ignore[arg-type]
    return directory


def test_records_are_read_back(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    with directory.append_to(0) as file:
        file.add([sample(), sample("q")])
        file.add([sample(number=1)])
    with directory.append_to(3) as file:
        file.add([sample("q", 1)])
    again = EvaluationDirectory(directory.path)
    assert set(again.samples()) == {("p", 0), ("p", 1), ("q", 0), ("q", 1)}
    assert again.samples()["p", 0] == sample()
    assert again.problems() == PROBLEMS
    assert again.settings()["stop_token_ids"] == [2, 3]
    directory.conclude([score("p")], {"accuracy": 1.0})
    assert again.scores() == [score("p")]
    assert again.summary() == {"accuracy": 1.0}


def test_samples_are_on_the_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    directory = opened(tmp_path)
    path = directory.path / "samples-00000.jsonl"
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()))
    with directory.append_to(0) as file:
        file.add([sample()])
        file.add([sample(number=1)])
    assert [content.count(b"\n") for content in synced] == [1, 2]


@pytest.mark.parametrize("tail", ['{"problem": "p", "sam', '{"problem": "q", "sample": 0}', "{"])
def test_a_partial_line_is_skipped_and_then_removed(tmp_path: Path, tail: str) -> None:
    directory = opened(tmp_path)
    with directory.append_to(0) as file:
        file.add([sample()])
    path = directory.path / "samples-00000.jsonl"
    with path.open("a") as torn:
        torn.write(tail)
    assert set(directory.samples()) == {("p", 0)}
    with directory.append_to(0) as file:
        file.add([sample("q")])
    assert set(directory.samples()) == {("p", 0), ("q", 0)}
    assert all(json.loads(line) for line in path.read_text().split("\n")[:-1])


def test_damaged_and_repeated_samples_are_refused(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    with directory.append_to(0) as file:
        file.add([sample()])
    with directory.append_to(1) as file:
        file.add([sample()])
    with pytest.raises(UserError, match="sample 0 of problem 'p' twice"):
        directory.samples()
    (directory.path / "samples-00001.jsonl").write_text("what?\n")
    with pytest.raises(UserError, match=r"samples-00001\.jsonl:1: got damaged data"):
        directory.samples()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    with directory.append_to(0), directory.append_to(1), pytest.raises(UserError, match="another process"):
        directory.append_to(0)
    directory.append_to(0).__exit__(None, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_digest": "other"},
        {"engine": "other"},
        {"seed": 2},
        {"temperature": 0.6},
        {"top_p": 0.9},
        {"top_k": 20},
        {"max_response_tokens": 9},
        {"stop_token_ids": (2,)},
        {"prompts": {"p": "other", "q": "2"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_samples_of_different_settings_are_not_mixed(tmp_path: Path, changes: dict[str, object]) -> None:
    directory = opened(tmp_path)
    before = (directory.path / "settings.json").read_bytes()
    with directory.append_to(0) as file:
        file.add([sample()])
    with pytest.raises(UserError, match="not mixed") as raised:
        opened(tmp_path, **changes)
    assert next(iter(changes)).removesuffix("s") in str(raised.value)
    assert (directory.path / "settings.json").read_bytes() == before
    opened(tmp_path, model="moved elsewhere")


def test_settings_with_the_older_name_of_the_digest_are_read(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    with directory.append_to(0) as file:
        file.add([sample()])
    settings = directory.settings()
    settings["fingerprint"] = settings.pop("weights_digest")
    (directory.path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="weights_digest='other' where the samples have 'f'"):
        opened(tmp_path, weights_digest="other")
    assert opened(tmp_path).settings()["weights_digest"] == "f"
    assert len(directory.samples()) == 1


def test_settings_may_change_before_the_first_sample(tmp_path: Path) -> None:
    opened(tmp_path)
    assert opened(tmp_path, seed=7).settings()["seed"] == 7


def test_problems_may_be_added(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    with directory.append_to(0) as file:
        file.add([sample()])
    more = dataclasses.replace(SETTINGS, prompts={"q": "2", "r": "3"})
    directory.begin(more, [PROBLEMS[1], Problem("r", "3+3?", "6")])
    assert directory.settings()["prompts"] == {"p": "1", "q": "2", "r": "3"}
    assert [problem.id for problem in directory.problems()] == ["p", "q", "r"]
    with pytest.raises(UserError, match="other prompts for 1 problems, including 'p'"):
        opened(tmp_path, prompts={"p": "9"})


def test_replace_removes_the_old_samples(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    with directory.append_to(2) as file:
        file.add([sample()])
    directory.replace(dataclasses.replace(SETTINGS, seed=9), PROBLEMS, [sample("q")])
    assert set(directory.samples()) == {("q", 0)}


def test_an_unfinished_evaluation_is_refused(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    for read in (directory.scores, directory.summary):
        with pytest.raises(UserError, match="a finished evaluation"):
            read()
    with pytest.raises(UserError, match=r"no settings\.json"):
        EvaluationDirectory(tmp_path / "nothing").settings()


def test_the_old_key_of_truncated_is_read(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    line = {"problem": "p", "sample": 0, "text": "x", "tokens": 3, "cut": True}
    (tmp_path / "set" / "samples-00000.jsonl").write_text(json.dumps(line) + "\n")
    assert directory.samples()["p", 0].truncated
    directory.conclude([score("p", truncated=True)], {})
    file = tmp_path / "set" / "scores.jsonl"
    file.write_text(file.read_text().replace('"truncated"', '"cut"'))
    assert directory.scores()[0].truncated


def test_different_prompts_have_different_digests() -> None:
    assert len({prompt_digest(prompt) for prompt in ([1, 2], [12], [1, 2, 3], [])}) == 4
    assert prompt_digest([1, 2]) == prompt_digest((1, 2))
