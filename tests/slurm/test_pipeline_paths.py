"""The paths that slurm/pipeline.sh reads from one configuration for four jobs, which must be the same in each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nemo_popsd.config.loading import load_config
from tests.slurm.stand_in_sbatch import ROOT, submitted


def pipeline(place: Path, text: str, *words: str) -> tuple[int, str, list[list[str]]]:
    """Status, standard error and the submitted jobs, without sbatch options."""
    options = [word for word in words if word.startswith("-")]
    settings = [word for word in words if not word.startswith("-")]
    done, jobs = submitted("pipeline.sh", place, *options, "conf.yaml", *settings, text=text, answer="12")
    return done.returncode, done.stderr, [[word for word in job if not word.startswith("--")] for job in jobs]


def configuration(output: str) -> str:
    return f"output: {output}\nstudent:\n  source: nemo_popsd:tiny_reasoner\n"


@pytest.mark.parametrize(
    ("text", "word", "path"),
    [
        (configuration("runs/a"), None, "runs/a"),
        (configuration("runs/a # comment"), None, "runs/a"),
        (configuration("'runs/a # b' # comment"), None, "runs/a # b"),
        (configuration('"runs/a b"\r'), None, "runs/a b"),
        (configuration("~/a"), None, "/home/me/a"),
        (configuration("runs/a"), "output=~/a", "/home/me/a"),
        (configuration("runs/a"), "output=$HOME/a b", "/home/me/a b"),
        (configuration("runs/a"), "output=${HOME}/a", "/home/me/a"),
        (configuration("runs/a"), "output='a b'", "a b"),
        (configuration("runs/a"), "output=it's é", "it's é"),
    ],
)
def test_all_stages_have_one_output(tmp_path: Path, text: str, word: str | None, path: str) -> None:
    code, errors, (train, export) = pipeline(tmp_path, text, *([word] if word else []))
    assert (code, errors) == (0, "")
    assert export[1:] == [f"{path}/checkpoints/final", f"{path}/huggingface"]
    written = [value for value in train if value.startswith("output=")]
    # A plain path in the configuration needs no override.
    plain = word is None and f"output: {path}" in text
    assert written == ([] if plain else [f"output={path}"])


@pytest.mark.parametrize(("first", "path"), [("name: a b", "runs/a b"), ("seed: 1", "runs/conf")])
def test_a_configuration_without_an_output_has_that_of_popsd(tmp_path: Path, first: str, path: str) -> None:
    text = f"{first}\nstudent:\n  source: nemo_popsd:tiny_reasoner\n"
    code, errors, (train, export) = pipeline(tmp_path, text)
    assert (code, errors) == (0, "")
    assert f"output={path}" in train
    assert export[1:] == [f"{path}/checkpoints/final", f"{path}/huggingface"]
    assert load_config(tmp_path / "conf.yaml").output == path


@pytest.mark.parametrize("output", ["$SCRATCH/a", "runs/${name}", "~other/a", "'a'b", '"a\\"b"', "'it''s'"])
def test_an_output_that_only_one_stage_could_read_is_refused(tmp_path: Path, output: str) -> None:
    code, errors, jobs = pipeline(tmp_path, configuration(output))
    assert (code, jobs) == (2, [])
    (line,) = errors.splitlines()
    assert "error: pipeline: got output=" in line


def test_an_array_of_pipelines_is_refused(tmp_path: Path) -> None:
    code, errors, jobs = pipeline(tmp_path, configuration("runs/a"), "--array=0-2")
    assert (code, jobs) == (2, [])
    assert "start a pipeline for each run" in errors


def test_a_missing_file_of_settings_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "POPSD_ENV": "/nowhere/env.sh"}
    (tmp_path / "conf.yaml").write_text(configuration("a"))
    words = [str(ROOT / "slurm" / "pipeline.sh"), "conf.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "settings: got /nowhere/env.sh, which is not a readable file" in done.stderr
