"""Values mean the same in files and overrides, by the type of their key and not by the rules of YAML 1.1."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.config import interpolation
from nemo_popsd.config.loading import from_dict_config, load_config, save_resolved, to_dict_config
from nemo_popsd.errors import UserError

PROSE = ["student", "teacher", "question_block", "system"]
TEXTS = [
    *(f"data.templates.{name}" for name in PROSE),
    "evaluation.thinking_end",
    *(f"data.{source}.columns.{name}" for source in ("train", "validation") for name in ("id", "answer", "question")),
    "evaluation.endpoint.model",
    "observability.wandb.project",
    "observability.mlflow.experiment",
]
KEYS = {int: "training.steps", float: "rollout.temperature", bool: "data.shuffle", str: "name"}


def value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def both(folder: Path, key: str, text: str) -> list[Any]:
    """`text` as the value of `key` in a file, and in an override: the value read, or None if it was refused."""
    nested = "".join(f"{'  ' * level}{part}:\n" for level, part in enumerate(key.split(".")))
    (folder / "file.yaml").write_text(f"{nested.rstrip()} {text}\n")
    (folder / "empty.yaml").write_text("")
    values: list[Any] = []
    for name, words in (("file.yaml", []), ("empty.yaml", [f"{key}={text}"])):
        printed = ""
        try:
            values.append(value(load_config(folder / name, words), key))
        except UserError as error:
            values.append(None)
            printed = str(error)
        assert (values[-1] is None) == (key in printed), printed
    return values


@pytest.mark.parametrize(
    ("value_type", "text", "read"),
    [
        (int, "12", 12),
        (int, "+12", 12),
        (int, "1_000", 1000),
        *(
            (int, text, None)
            for text in ("1:30", "010", "08", "0o10", "0x10", "0b11", "1e3", "1.0", "1__0", "'3'", "true")
        ),
        *((int, text, None) for text in ("null", "~", "2026-11-28", "\uff11\uff12", "\u0663", "9" * 5000)),
        (float, "1e-2", 0.01),
        (float, "1.0e-2", 0.01),
        (float, ".5", 0.5),
        (float, "1.", 1.0),
        (float, "2", 2.0),
        *(
            (float, text, None)
            for text in ("1:30", "01.5", "1e", "0x1", "'0.5'", "1_0.5", "half", "true", "1e400", ".nan")
        ),
        (bool, "true", True),
        (bool, "False", False),
        *((bool, text, None) for text in ("yes", "no", "on", "off", "y", "1", "0", "'true'", "null")),
        *(
            (str, text, text)
            for text in ("1:30", "010", "yes", "no", "on", "off", "1e5", "2026-11-28", "5", "0x10", ".inf")
        ),
        (str, "'yes'", "yes"),
        (str, '"a b"', "a b"),
        (str, "null", None),
        (str, "~", None),
    ],
)
def test_values_are_read_by_the_type_of_their_key(value_type: type, text: str, read: object, tmp_path: Path) -> None:
    assert both(tmp_path, KEYS[value_type], text) == [read, read]


@pytest.mark.parametrize("key", ["training.steps", "name", "optimizer.lr", "data.train.path", "evaluation.markers"])
@pytest.mark.parametrize("text", ["???", "'???'"])
def test_a_missing_value_is_missing_and_not_the_default(key: str, text: str, tmp_path: Path) -> None:
    assert both(tmp_path, key, text) == [None, None]
    with pytest.raises(UserError, match=rf"{key}=\?\?\? \(missing\); need a value; set {key}"):
        load_config(tmp_path / "file.yaml")


def test_a_missing_value_may_be_given_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("training:\n  steps: ???")
    assert load_config(tmp_path / "file.yaml", ["training.steps=3"]).training.steps == 3


@pytest.mark.parametrize("text", ["[a, '???']", "['???']"])
def test_a_missing_value_in_a_list_is_refused(text: str, tmp_path: Path) -> None:
    assert both(tmp_path, "evaluation.markers", text) == [None, None]


@pytest.mark.parametrize(
    ("variable", "key", "read"),
    [
        ("12", "training.steps", 12),
        ("010", "training.steps", None),
        ("1:30", "training.steps", None),
        ("yes", "data.shuffle", None),
        ("true", "data.shuffle", True),
        ("1e-2", "rollout.temperature", 0.01),
        ("5", "name", "5"),
    ],
)
def test_the_value_of_a_variable_is_read_like_literal_text(
    variable: str, key: str, read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POPSD_TEST", variable)
    assert both(tmp_path, key, "${oc.env:POPSD_TEST}") == [read, read]


@pytest.mark.parametrize(
    "text",
    [
        "name: ${output}\noutput: ${name}",
        "name: ${name}",
        "name: ${",
        "name: ${nope}",
        "seed: ${student}",
        "seed: ${name}",
    ],
)
def test_unresolvable_interpolations_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(UserError, match=r"set (name|output|seed)$"):
        load_config(tmp_path / "file.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "name: a-${seed}-${training.steps}",
        "output: ${.name}\nstudent: {source: '${..name}'}",
        "evaluation: {sets: {mine: a.jsonl}}\noutput: ${evaluation.sets.mine}",
        "data: {train: {path: b, more_paths: ['${name}', '${data.train.path}/${.path}']}}",
        "name: ${training}",
        "name: ${nope}",
        "name: ${${output}}",
    ],
)
def test_an_interpolation_finds_the_same_among_few_values_as_among_all(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.yaml").write_text(text)

    def outcome() -> object:
        try:
            return load_config(tmp_path / "file.yaml")
        except UserError as error:
            return str(error)

    few = outcome()
    monkeypatch.setattr(interpolation, "_PLAIN", re.compile("(?!)"))
    assert outcome() == few


def test_exponential_interpolations_are_refused_quickly(tmp_path: Path) -> None:
    words = [f"{a}=${{{b}}}${{{b}}}" for a, b in pairwise(TEXTS)]
    (tmp_path / "file.yaml").write_text("")
    start = time.monotonic()
    assert len(load_config(tmp_path / "file.yaml", ["rollout.vllm.dtype=student", *words[-7:]]).name) == 4
    with pytest.raises(UserError, match="characters"):
        load_config(tmp_path / "file.yaml", words[-12:])
    assert time.monotonic() - start < 5
    with pytest.raises(UserError, match="need at most 25"):
        load_config(tmp_path / "file.yaml", words)


@pytest.mark.parametrize("text", ["${a}", "\\${a}", "a\\\\${b} $ {c} ${", "$", "\\", "{question}$", "${question}"])
def test_escaped_interpolations_are_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("")
    config = load_config(tmp_path / "file.yaml")
    config.data.templates.student, config.evaluation.markers = text, [text]
    save_resolved(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert from_dict_config(to_dict_config(config)) == config


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("name", "a\nb"),
        ("name", "a\x1bb"),
        ("name", ""),
        ("name", "n" * 201),
        ("output", "a\x00b"),
        ("student.source", "a\nb"),
        ("data.templates.student", "{question}\x00"),
        ("data.templates.student", "x" * 20001),
        ("observability.wandb.project", "p\u2028q"),
        ("evaluation.markers", ["a\x07"]),
    ],
)
def test_texts_with_control_characters_or_of_great_length_are_refused(key: str, text: object, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("")
    with pytest.raises(UserError, match=f"set {key}$") as printed:
        load_config(tmp_path / "file.yaml", [f"{key}={json.dumps(text)}"])
    assert len(str(printed.value)) < 500
    assert str(printed.value).isprintable()


def test_prose_has_lines(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text('data: {templates: {student: "{question}\\n\\tthink"}}')
    assert load_config(tmp_path / "file.yaml").data.templates.student == "{question}\n\tthink"
