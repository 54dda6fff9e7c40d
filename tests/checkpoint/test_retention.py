from __future__ import annotations

from pathlib import Path

import pytest

from nemo_popsd.checkpoint.manifest import write_manifest
from nemo_popsd.checkpoint.retention import complete_checkpoints, newest, point_to, prune, superfluous

STEPS = {f"step-{step:06d}": step for step in (10, 20, 30, 40)}
SCORES = {10: 0.5, 20: 0.7, 30: 0.7, 40: 0.1}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "greatest", "kept"),
    [
        (0, 0, True, [10, 20, 30, 40]),
        (0, 1, True, [10, 20, 30, 40]),
        (1, 0, True, [40]),
        (2, 0, True, [30, 40]),
        (1, 1, True, [30, 40]),  # of the equals the later
        (1, 2, True, [20, 30, 40]),
        (1, 1, False, [40]),
        (1, 2, False, [10, 40]),
        (9, 9, True, [10, 20, 30, 40]),
    ],
)
def test_which_go(keep_last: int, keep_best: int, greatest: bool, kept: list[int]) -> None:
    checkpoints = {**STEPS, "final": 40}
    going = superfluous(checkpoints, SCORES, keep_last=keep_last, keep_best=keep_best, greatest=greatest)
    assert [step for name, step in STEPS.items() if name not in going] == kept
    assert "final" not in going


def test_a_checkpoint_without_the_metric_is_none_of_the_best() -> None:
    going = superfluous(STEPS, {10: 0.1}, keep_last=1, keep_best=3, greatest=True)
    assert going == ["step-000020", "step-000030"]


def _save(path: Path, step: int, *, resumable: bool = True) -> None:
    path.mkdir()
    if resumable:
        (path / "training_state").mkdir()
    write_manifest(path, {"step": step}, {})


def test_the_newest_is_the_newest_complete_one_that_can_be_resumed(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    _save(tmp_path / "step-000002", 2)
    _save(tmp_path / "step-000010", 10)
    _save(tmp_path / "weights-only", 12, resumable=False)
    _save(tmp_path / "step-000014.partial", 14)
    (tmp_path / "step-000016").mkdir()
    assert newest(tmp_path) == tmp_path / "step-000010"
    _save(tmp_path / "final", 10)
    assert newest(tmp_path) == tmp_path / "final"
    assert complete_checkpoints(tmp_path) == {"step-000002": 2, "step-000010": 10, "final": 10, "weights-only": 12}
    point_to(tmp_path / "step-000010")
    prune(tmp_path, ["step-000010"])
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert not (tmp_path / "step-000010").exists()
