"""The checkpoints of a run: which are complete, which is the newest, which may go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_popsd.checkpoint.contents import STATE
from nemo_popsd.checkpoint.manifest import DamagedCheckpointError, read_manifest
from nemo_popsd.files.atomic import is_owned, remove_directory, write_text
from nemo_popsd.files.ownership import CHECKPOINT

FINAL = "final"
LATEST = "latest"
"""File that holds the name of the newest complete checkpoint."""
_NAME = re.compile(r"step-(\d{6,})")


def name_of(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def is_name(name: str) -> bool:
    """Whether a run gives this name to a checkpoint. What has any other name in its folder is somebody else's."""
    return name == FINAL or _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Checkpoints:
    """What is in the folder of a run's checkpoints."""

    folder: Path
    complete: dict[str, int] = field(default_factory=dict)
    """Names and steps of those with a whole manifest, by step; `final` after another of the same step."""
    damaged: dict[str, DamagedCheckpointError] = field(default_factory=dict)
    """What is wrong with the manifests of the others, by name."""

    @classmethod
    def in_folder(cls, folder: Path) -> Checkpoints:
        """Reads the manifests; those of checkpoints that are being written, replaced or removed have other names."""
        found: dict[str, int] = {}
        damaged: dict[str, DamagedCheckpointError] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if is_name(path.name) and path.is_dir() and any(path.iterdir()):
                try:
                    found[path.name] = int(read_manifest(path)["step"])
                except DamagedCheckpointError as error:
                    damaged[path.name] = error
        return cls(folder, dict(sorted(found.items(), key=lambda item: (item[1], item[0] == FINAL))), damaged)

    def resumable(self) -> list[str]:
        """Names of the complete ones from which a run can be resumed, the newest last."""
        return [name for name in self.complete if (self.folder / name / STATE).is_dir()]

    def newest(self) -> Path | None:
        """The newest one, to resume from; None where there is none.

        Raises:
            DamagedCheckpointError: the newest one's manifest is damaged.
        """
        names = self.resumable()
        reached = self.complete[names[-1]] if names else -1
        for name, error in self.damaged.items():
            if self._may_be_newer(name, reached):
                raise error
        return self.folder / names[-1] if names else None

    def _may_be_newer(self, damaged: str, reached: int) -> bool:
        if match := _NAME.fullmatch(damaged):
            return int(match[1]) > reached
        try:
            latest = (self.folder / LATEST).read_text().strip()
        except (OSError, ValueError):
            return True
        return latest == damaged or latest not in self.complete


def update_latest(checkpoint: Path) -> None:
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


def prune(folder: Path, names: list[str]) -> list[str]:
    """Removes checkpoints; what a kill leaves of one is removed by the next run.

    Returns:
        The names of those that stay, since they hold something that no run wrote.
    """
    kept = []
    for name in names:
        if is_owned(folder / name, CHECKPOINT):
            remove_directory(folder / name, CHECKPOINT)
        else:
            kept.append(name)
    return kept
