"""The file of scored views."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_popsd.diagnosis.views.record import FILE, read_views, write_views
from nemo_popsd.errors import UserError
from tests.report.runs_on_disk import view_scores


def test_scores_are_read_as_they_were_written_and_a_change_is_refused(tmp_path: Path) -> None:
    assert read_views(tmp_path) is None
    write_views(view_scores(), tmp_path)
    assert read_views(tmp_path) == view_scores()
    write_views(view_scores("other"), tmp_path)  # replaces its own
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, "best": "another"}))
    with pytest.raises(UserError, match="changed after it was written"):
        read_views(tmp_path)


def test_a_file_of_another_program_is_kept(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("mine")
    with pytest.raises(UserError, match=r"no \.nemo_popsd of a diagnosis"):
        write_views(view_scores(), tmp_path)
    assert (tmp_path / FILE).read_text() == "mine"
