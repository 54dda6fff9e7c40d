"""`popsd config`."""

import re
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli
from nemo_popsd.config.keys import known_keys
from nemo_popsd.config.loading import load_config
from nemo_popsd.megatron.installed_fields import SOURCES, installed_fields
from nemo_popsd.megatron.passthrough import refusal
from tests.cli.conftest import TINY


def test_the_printed_configuration_loads_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", TINY, "training.steps=3", "data.train.answer_pattern=#### (.+)"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(TINY, ["training.steps=3", "data.train.answer_pattern=#### (.+)"])


def test_a_setting_is_explained_by_its_own_string(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--describe", "training.steps"]) == 0
    head, *text = capsys.readouterr().out.splitlines()
    assert head == "training.steps: int, default 200, from 1 to 100,000,000"
    assert " ".join(" ".join(text).split()).startswith("Number of training steps (at most 200 in the paper).")
    assert "Here:" not in " ".join(text)


def test_a_section_is_explained_with_all_its_settings_and_the_values_of_a_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["config", TINY, "--describe", "training", "training.prompts_per_step=8"]) == 0
    out = capsys.readouterr().out
    heads = {line.partition(":")[0] for line in out.splitlines() if line.startswith("training")}
    assert heads == {"training", *(key for key in known_keys() if key.startswith("training."))}
    steps, prompts = (
        out.partition(f"training.{name}: ")[2].partition("\n\n")[0] for name in ("steps", "prompts_per_step")
    )
    assert steps.endswith("\n    Here: 40")
    assert prompts.endswith("\n    Here: 8")
    assert cli.main(["config", "--describe", "hardware.memory_gib"]) == 0
    assert "GiB" in capsys.readouterr().out


@pytest.mark.parametrize("section", SOURCES)
def test_fields_of_megatron_are_listed_with_their_types_or_why_they_are_refused(
    section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", "--describe", f"megatron.{section}"]) == 0
    takes, refuses = capsys.readouterr().out.partition(f"megatron.{section} takes\n")[2].split("\nand refuses\n")
    types = dict(line.strip().split(": ", 1) for line in takes.splitlines() if line)
    fields = installed_fields(section)
    assert types == {name: kind.annotation for name, kind in fields.items() if not refusal(section, name, kind)}
    named = [name for line in refuses.splitlines() if line.startswith(" " * 8) for name in re.findall(r"\w+", line)]
    assert sorted([*types, *named]) == sorted(fields)
    assert "    set " in refuses


def test_a_setting_that_does_not_exist_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--describe", "trianing.steps"]) == 2
    assert "the nearest is training.steps" in capsys.readouterr().err
    assert cli.main(["config"]) == 2
    assert "got no configuration; need CONF, or --describe KEY" in capsys.readouterr().err
