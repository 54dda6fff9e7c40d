"""`POPSD_REHEARSE=1 slurm/train.sh`: a rehearsal on the submission host, before any node is asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def started(place: Path, *words: str, status: int = 0, rehearse: str = "1") -> tuple[int, str, list[str], list[str]]:
    """Status, standard error, arguments of the rehearsal and of sbatch."""
    programs = place / "programs"
    programs.mkdir()
    for name, code in (("python", status), ("sbatch", 0)):
        (programs / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >{place}/{name}\nexit {code}\n')
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "train.sh", *words],
        cwd=place,
        env={"PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(place), "POPSD_REHEARSE": rehearse},
        capture_output=True,
        text=True,
        timeout=60,
    )
    asked = [
        (place / name).read_text().split("\0")[:-1] if (place / name).exists() else [] for name in ("python", "sbatch")
    ]
    return done.returncode, done.stderr, asked[0], asked[1]


def test_a_run_is_rehearsed_and_then_submitted(tmp_path: Path) -> None:
    words = "conf.yaml", "output=runs/x_%a", "parallel.tensor=2"
    options = "--nodes=4", "--array=1-3", "--ntasks-per-node=4", "--gpus-per-node=4"
    code, errors, rehearsed, submitted = started(tmp_path, *options, *words)
    assert (code, errors) == (0, "")
    assert rehearsed == [
        *("-m", "nemo_popsd", "rehearse", "conf.yaml", "output=runs/x_1", "parallel.tensor=2"),
        *("nodes=4", "gpus_per_node=4"),
    ]
    assert submitted == [*options, f"{ROOT}/slurm/train.sh", *words]


def test_what_cannot_be_rehearsed_is_not_submitted(tmp_path: Path) -> None:
    code, errors, rehearsed, submitted = started(tmp_path, "conf.yaml", status=2)
    assert code == 2
    assert "no job was submitted" in errors
    assert rehearsed[-2:] == ["nodes=1", "gpus_per_node=8"]
    assert submitted == []


@pytest.mark.parametrize("options", [("--nodes=2-4",), ("--nodes", "4"), ()])
def test_unclear_numbers_of_nodes_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    code, errors, rehearsed, submitted = started(tmp_path, *options, *(["conf.yaml"] if options else []))
    assert code == 2
    assert "--nodes=N" in errors
    assert rehearsed == submitted == []


def test_without_the_setting_the_script_explains_how_to_submit_it(tmp_path: Path) -> None:
    code, errors, rehearsed, submitted = started(tmp_path, "conf.yaml", rehearse="0")
    assert (code, errors) == (2, "submit it: sbatch slurm/train.sh ...\n")
    assert rehearsed == submitted == []
