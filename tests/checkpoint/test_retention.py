"""The complete, newest, kept and removed checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_popsd.checkpoint.manifest import file_digests, write_manifest
from nemo_popsd.checkpoint.retention import Checkpoints, is_name, prune, superfluous, update_latest
from nemo_popsd.errors import UserError

STEPS = {f"step-{step:06d}": step for step in (10, 20, 30, 40)}
SCORES = {10: 0.5, 20: 0.7, 30: 0.7, 40: 0.1}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "greatest", "kept"),
    [
        (0, 0, True, [10, 20, 30, 40]),
        (0, 1, True, [10, 20, 30, 40]),
        (1, 0, True, [40]),
        (2, 0, True, [30, 40]),
        (1, 1, True, [30, 40]),  # of equal scores the later step is better
        (1, 2, True, [20, 30, 40]),
        (1, 1, False, [40]),
        (1, 2, False, [10, 40]),
        (9, 9, True, [10, 20, 30, 40]),
    ],
)
def test_the_last_and_the_best_checkpoints_are_kept(
    keep_last: int, keep_best: int, greatest: bool, kept: list[int]
) -> None:
    checkpoints = {**STEPS, "final": 40}
    removed = superfluous(checkpoints, SCORES, keep_last=keep_last, keep_best=keep_best, greatest=greatest)
    assert [step for name, step in STEPS.items() if name not in removed] == kept
    assert "final" not in removed


def test_a_checkpoint_without_the_metric_is_not_one_of_the_best() -> None:
    removed = superfluous(STEPS, {10: 0.1}, keep_last=1, keep_best=3, greatest=True)
    assert removed == ["step-000020", "step-000030"]


def test_the_newest_checkpoint_from_before_a_change_is_kept() -> None:
    def kept(*changes: int) -> list[int]:
        removed = superfluous(STEPS, {}, keep_last=1, keep_best=0, greatest=True, changes=changes)
        return [step for name, step in STEPS.items() if name not in removed]

    assert kept(20) == [20, 40]
    assert kept(29) == [20, 40]
    assert kept(9) == [40], "there was none yet"
    assert kept(15, 35) == [10, 30, 40]


def _save(path: Path, step: int, *, resumable: bool = True) -> None:
    path.mkdir()
    (path / "model_config.yaml").write_text("")
    files = ["model_config.yaml"]
    if resumable:
        (path / "training_state").mkdir()
        (path / "training_state" / "index.json").write_text("")
        files.append("training_state/index.json")
    write_manifest(path, {"step": step}, file_digests(path, files))


def test_the_newest_checkpoint_is_complete_and_resumable(tmp_path: Path) -> None:
    assert Checkpoints.in_folder(tmp_path / "nowhere").newest() is None
    _save(tmp_path / "step-000002", 2)
    _save(tmp_path / "step-000010", 10)
    _save(tmp_path / "step-000012", 12, resumable=False)
    _save(tmp_path / "step-000014.partial", 14)
    _save(tmp_path / "step-000013.removed", 13)
    (tmp_path / "step-000016").mkdir()
    checkpoints = Checkpoints.in_folder(tmp_path)
    assert checkpoints.newest() == tmp_path / "step-000010"
    _save(tmp_path / "final", 10)
    checkpoints = Checkpoints.in_folder(tmp_path)
    assert checkpoints.newest() == tmp_path / "final"
    assert checkpoints.complete == {"step-000002": 2, "step-000010": 10, "final": 10, "step-000012": 12}
    update_latest(tmp_path / "step-000010")
    assert prune(tmp_path, ["step-000010"]) == []
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert not (tmp_path / "step-000010").exists()


def test_files_that_no_run_wrote_are_ignored_and_kept(tmp_path: Path) -> None:
    """A renamed copy of a checkpoint, and notes in the folder of a checkpoint."""
    _save(tmp_path / "step-000002", 2)
    _save(tmp_path / "my-best", 99)
    assert Checkpoints.in_folder(tmp_path).complete == {"step-000002": 2}
    assert not any(map(is_name, ("my-best", "step-12", "step-000002.damaged", "latest", "final.partial")))
    (tmp_path / "step-000002" / "notes.txt").write_text("mine")
    assert prune(tmp_path, ["step-000002"]) == ["step-000002"]
    assert (tmp_path / "step-000002" / "notes.txt").read_text() == "mine"


def test_a_damaged_manifest_is_ignored_in_an_older_checkpoint_and_an_error_in_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        _save(tmp_path / f"step-{step:06d}", step)
    (tmp_path / "step-000002" / "manifest.json").write_bytes(b"")
    (tmp_path / "step-000004" / "manifest.json").unlink()
    checkpoints = Checkpoints.in_folder(tmp_path)
    assert checkpoints.newest() == tmp_path / "step-000006"
    assert list(checkpoints.damaged) == ["step-000002", "step-000004"]
    (tmp_path / "step-000006" / "manifest.json").unlink()
    os.mkfifo(tmp_path / "step-000006" / "manifest.json")
    _save(tmp_path / "step-000005", 5)
    with pytest.raises(UserError, match=r"step-000006: got a manifest\.json that is not a regular file"):
        Checkpoints.in_folder(tmp_path).newest()


@pytest.mark.parametrize(("latest", "is_newest"), [("final", True), (None, True), ("step-000006", False)])
def test_a_damaged_final_checkpoint_is_older_if_latest_names_another(
    tmp_path: Path, latest: str | None, is_newest: bool
) -> None:
    _save(tmp_path / "step-000006", 6)
    _save(tmp_path / "final", 4)
    (tmp_path / "final" / "manifest.json").write_text("{")
    if latest:
        update_latest(tmp_path / latest)
    if is_newest:
        with pytest.raises(UserError, match="final: got an unreadable"):
            Checkpoints.in_folder(tmp_path).newest()
    else:
        assert Checkpoints.in_folder(tmp_path).newest() == tmp_path / "step-000006"
