"""The page of scored views, its section in a report, and its text for the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_popsd.diagnosis.views.record import write_views
from nemo_popsd.errors import UserError
from nemo_popsd.report import views_text, write_report, write_views_page
from tests.report.runs_on_disk import EVIL, view_scores, write_run


def test_the_page_has_every_score_and_escapes_names(tmp_path: Path) -> None:
    write_views(view_scores(EVIL), tmp_path)
    page = write_views_page(tmp_path).read_text()
    assert page.count("0.50<small>0.25 … 0.75</small>") >= 3  # ratio and cosines
    assert "50.0<small>25.0 … 75.0</small>" in page  # accuracy, per cent
    assert "+0.500<small>+0.250 … +0.750</small>" in page
    assert "none: undecided." in page
    assert "<script>alert" not in page
    assert "<img" not in page
    with pytest.raises(UserError, match=r"without views\.json"):
        write_views_page(tmp_path / "nowhere")


def test_a_report_shows_the_scores_in_the_directory_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    without = write_report([run], tmp_path / "without.html").read_text()
    assert 'id="views"' not in without
    write_views(view_scores(), run / "views" / "model")
    page = write_report([run], tmp_path / "with.html").read_text()
    assert '<h2 id="views">Views, scored before training</h2>' in page
    assert "<b>Best: solution.</b>" in page


def test_the_text_has_main_scores_then_verdicts_then_the_best() -> None:
    lines = views_text(view_scores()).splitlines()
    assert "answers of the student: 512, 50.0 % right" in lines
    assert "  student   50.0 [25.0, 75.0]" in lines
    assert "  solution  +0.5 [+0.2, +0.8]" in lines
    assert "  none      not defined" in lines
    assert lines[-3:] == ["solution", "none: undecided.", "Best: solution."]
