"""The recipes of the package, and copies of them with other values."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from nemo_popsd.config.keys import known_keys
from nemo_popsd.config.loading import by_key, load_config
from nemo_popsd.config.recipes import FOLDER, READ_PATHS, purpose, recipe_names, with_value, write_recipe
from nemo_popsd.errors import UserError

ROOT = Path(__file__).parents[2]
WORDS = [
    "name=mine",
    "training.steps=3",
    "optimizer.lr=1e-5",
    "data.train.columns.question=problem",
    "data.train.path=a.jsonl",
    "data.train.more_paths=[b.jsonl]",
    "student.lora={rank: 8, alpha: 16}",
    "evaluation.markers=[Wait, 'Let me: think']",
    r'data.templates.student="Q\n{question}"',
    "data.train.answer_pattern=#### (.+)",
    "distillation.target.cap=null",
    "megatron.ddp.average_in_collective=true",
]


def test_the_package_has_the_recipes_of_the_repository_once() -> None:
    assert FOLDER.is_symlink()
    assert FOLDER.resolve() == ROOT / "conf"
    assert {"tiny", "qwen3_8b"} < set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_loads_as_the_recipe_with_the_same_overrides(name: str, tmp_path: Path) -> None:
    assert purpose(name)
    path = write_recipe(name, tmp_path / "a" / "b", WORDS)
    assert path == tmp_path / "a" / "b" / f"{name}.yaml"
    assert load_config(path) == load_config(ROOT / "conf" / f"{name}.yaml", WORDS)


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_keeps_every_line_but_those_of_its_values(name: str, tmp_path: Path) -> None:
    text = (ROOT / "conf" / f"{name}.yaml").read_text()
    plain = write_recipe(name, tmp_path, []).read_text()
    assert plain == text.replace(f"conf/{name}.yaml", str(tmp_path / f"{name}.yaml"))
    changed = write_recipe(name, tmp_path / "changed", ["seed=5"]).read_text()
    lines = [(a, b) for a, b in zip(plain.splitlines(), changed.splitlines(), strict=True) if a != b]
    lines = [(a, b) for a, b in lines if not a.lstrip().startswith("#")]
    assert len(lines) == 1
    assert re.match(r"seed: 5( # yours; the recipe has 1234)?$", lines[0][1])


def test_every_setting_of_a_section_can_be_set(tmp_path: Path) -> None:
    """The value of each setting of the recipe, written into a file without it, produces the same configuration."""
    config = load_config(ROOT / "conf" / "tiny.yaml")
    text = "seed: 1234\n"
    for key, value in by_key(config).items():
        if not is_dataclass(known_keys()[key]) and value != {}:
            text = with_value(text, key, value)
    (tmp_path / "all.yaml").write_text(text)
    assert load_config(tmp_path / "all.yaml") == config


def test_paths_that_exist_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    path = write_recipe("tiny", Path("mine"), ["data.train.path=rows.jsonl", "student.source=Qwen/Qwen3-8B"])
    config = load_config(path)
    assert config.data.train.path == str(tmp_path / "rows.jsonl")
    assert config.student.source == "Qwen/Qwen3-8B"
    assert set(READ_PATHS) < set(by_key(config))


def test_a_wrong_name_a_wrong_setting_and_an_existing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe 'absent'; need one of .*tiny"):
        write_recipe("absent", tmp_path)
    with pytest.raises(UserError, match=r"the nearest is training\.steps"):
        write_recipe("tiny", tmp_path, ["training.stepz=3"])
    assert list(tmp_path.iterdir()) == []
    path = write_recipe("tiny", tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"tiny\.yaml, which exists"):
        write_recipe("tiny", tmp_path, ["seed=1"])
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="need a directory that can be written"):
        write_recipe("tiny", path / "below")
