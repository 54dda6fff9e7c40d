"""The directories that a diagnosis may write to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nemo_popsd.errors import UserError
from nemo_popsd.files.ownership import DIAGNOSIS, MARK, read_mark

SUMMARY, ROLLOUTS = "summary.json", "rollouts.jsonl"
"""The files of a diagnosis; those of views have names of their own."""


def refuse_other_files(directory: Path, names: Sequence[str] = (SUMMARY, ROLLOUTS)) -> None:
    """Refuses a directory with files of these names that no diagnosis wrote.

    Raises:
        UserError: names the file.
    """
    mark = read_mark(directory)
    if mark is not None and mark.kind == DIAGNOSIS:
        return
    if present := [name for name in names if os.path.lexists(directory / name)]:
        raise UserError(
            f"diagnosis {directory}",
            got=f"{', '.join(present)} but no {MARK} of a diagnosis of nemo_popsd",
            need="a directory without such files, or an earlier diagnosis; nothing was changed",
            fix=f"set output to another directory, or move {directory} away",
        )
