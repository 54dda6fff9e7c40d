"""The checkpoints of a run: which are complete, which is the newest, which may be removed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_popsd.checkpoint.contents import STATE
from nemo_popsd.checkpoint.manifest import DamagedCheckpointError, read_manifest
from nemo_popsd.files.atomic import is_owned, remove_directory, write_text
from nemo_popsd.files.ownership import CHECKPOINT

FINAL = "final"
LATEST = "latest"
"""File with the name of the newest complete checkpoint."""
_NAME = re.compile(r"step-(\d{6,})")


def name_of(step: int) -> str:
    """Name of the checkpoint after `step` training steps."""
    return f"step-{step:06d}"


def is_name(name: str) -> bool:
    """Whether `name` is a name that a run gives to a checkpoint. A run ignores any other name in its folder."""
    return name == FINAL or _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in the folder of a run."""

    folder: Path
    complete: dict[str, int] = field(default_factory=dict)
    """Step by name of the checkpoints with an intact manifest, sorted by step; of equal steps `final` is last."""
    damaged: dict[str, DamagedCheckpointError] = field(default_factory=dict)
    """Error by name of the checkpoints with a damaged manifest."""

    @classmethod
    def in_folder(cls, folder: Path) -> Checkpoints:
        """Reads the manifests. Checkpoints that are being written, replaced or removed have other names."""
        complete: dict[str, int] = {}
        damaged: dict[str, DamagedCheckpointError] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if is_name(path.name) and path.is_dir() and any(path.iterdir()):
                try:
                    complete[path.name] = int(read_manifest(path)["step"])
                except DamagedCheckpointError as error:
                    damaged[path.name] = error
        return cls(folder, dict(sorted(complete.items(), key=lambda item: (item[1], item[0] == FINAL))), damaged)

    def resumable(self) -> list[str]:
        """Names of the complete checkpoints from which a run can resume, the newest last."""
        return [name for name in self.complete if (self.folder / name / STATE).is_dir()]

    def newest(self) -> Path | None:
        """The newest checkpoint from which a run can resume, or None.

        Raises:
            DamagedCheckpointError: a checkpoint that may be newer has a damaged manifest.
        """
        names = self.resumable()
        newest_step = self.complete[names[-1]] if names else -1
        for name, error in self.damaged.items():
            if self._may_be_newer(name, newest_step):
                raise error
        return self.folder / names[-1] if names else None

    def _may_be_newer(self, damaged: str, step: int) -> bool:
        if match := _NAME.fullmatch(damaged):
            return int(match[1]) > step
        try:
            latest = (self.folder / LATEST).read_text().strip()
        except (OSError, ValueError):
            return True
        return latest == damaged or latest not in self.complete


def update_latest(checkpoint: Path) -> None:
    """Atomically replaces the file that names the newest checkpoint."""
    write_text(checkpoint.parent / LATEST, checkpoint.name + "\n")


def superfluous(
    checkpoints: Mapping[str, int],
    scores: Mapping[int, float],
    *,
    keep_last: int,
    keep_best: int,
    greatest: bool,
    changes: Iterable[int] = (),
) -> list[str]:
    """Names of the checkpoints that may be removed: never `final`, and none if `keep_last` is 0.

    Args:
        checkpoints: step by name of the complete checkpoints.
        scores: the metric by step.
        keep_last: number of the newest checkpoints to keep.
        keep_best: number of the best checkpoints to keep in addition; among equal scores the later step is better.
        greatest: whether the greatest score is the best.
        changes: steps after which the run changed (see `nemo_popsd.training.drift`); for each, the newest checkpoint
            that is not after it is kept.
    """
    if keep_last == 0:
        return []
    steps = sorted(step for name, step in checkpoints.items() if name != FINAL)
    kept = set(steps[-keep_last:])
    scored = [step for step in steps if step in scores]
    scored.sort(key=lambda step: (scores[step] if greatest else -scores[step], step), reverse=True)
    kept |= set(scored[:keep_best])
    kept |= {before[-1] for change in changes if (before := [step for step in steps if step <= change])}
    return [name for name, step in checkpoints.items() if name != FINAL and step not in kept]


def prune(folder: Path, names: list[str]) -> list[str]:
    """Removes checkpoints. If the process is killed during this, the next run removes the rest.

    Returns:
        The names of the checkpoints that were kept because they contain files that no run wrote.
    """
    kept = []
    for name in names:
        if is_owned(folder / name, CHECKPOINT):
            remove_directory(folder / name, CHECKPOINT)
        else:
            kept.append(name)
    return kept
