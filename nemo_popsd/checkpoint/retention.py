"""The checkpoints of a run: which are complete, which is the newest, which may go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_popsd.atomic import PARTIAL, REPLACED, remove, write_text
from nemo_popsd.checkpoint.manifest import FILE_NAME, read_manifest
from nemo_popsd.checkpoint.training_state import FOLDER as TRAINING_STATE

FINAL = "final"
LATEST = "latest"
"""File that holds the name of the newest complete checkpoint; for people and scripts, `newest` does not need it."""


def name_of(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def complete_checkpoints(folder: Path) -> dict[str, int]:
    """Names and steps of the complete checkpoints in `folder`, by step; `final` after another of the same step."""
    found: dict[str, int] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix not in (PARTIAL, REPLACED) and (path / FILE_NAME).is_file():
                found[path.name] = int(read_manifest(path)["step"])
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0] == FINAL)))


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint from which a run can be resumed."""
    names = [name for name in complete_checkpoints(folder) if (folder / name / TRAINING_STATE).is_dir()]
    return folder / names[-1] if names else None


def point_to(checkpoint: Path) -> None:
    """Replaces the pointer to the newest checkpoint, atomically."""
    write_text(checkpoint.parent / LATEST, checkpoint.name + "\n")


def superfluous(
    checkpoints: Mapping[str, int], scores: Mapping[int, float], *, keep_last: int, keep_best: int, greatest: bool
) -> list[str]:
    """Names of checkpoints that may go. Never `final`; none where `keep_last` is 0.

    Args:
        checkpoints: names and steps of the complete ones.
        scores: the metric by step.
        keep_last: how many of the newest stay.
        keep_best: how many of the best stay besides; of equals the later.
        greatest: whether the greatest score is best.
    """
    if keep_last == 0:
        return []
    steps = sorted(step for name, step in checkpoints.items() if name != FINAL)
    stay = set(steps[-keep_last:])
    scored = [step for step in steps if step in scores]
    scored.sort(key=lambda step: (scores[step] if greatest else -scores[step], step), reverse=True)
    stay |= set(scored[:keep_best])
    return [name for name, step in checkpoints.items() if name != FINAL and step not in stay]


def prune(folder: Path, names: list[str]) -> None:
    """Removes checkpoints; one that is removed half is incomplete, and the next call or run removes the rest."""
    for name in names:
        remove(folder / name)
