"""Means over the seeds of runs that differ only in their seed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from nemo_popsd.cli.main import main
from nemo_popsd.config.loading import load_config, save_resolved
from nemo_popsd.report.arms import Mean, _quantile, arms, section, text
from nemo_popsd.report.groups import colours_of, grouped
from nemo_popsd.report.run import RunData, read_run
from tests.report.runs_on_disk import write_run


def seeded(directory: Path, seed: int, *, after: float, rate: float = 1e-5) -> Path:
    """A run whose accuracy changes from 0.6 to `after`."""
    write_run(directory, name=directory.name, after=after)
    config = load_config(directory / "config.yaml", [f"seed={seed}", f"optimizer.lr={rate}"])
    save_resolved(config, directory / "config.yaml")
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of one arm, not sorted by seed, and one seed of another arm."""
    folder = tmp_path_factory.mktemp("arms")
    afters = ((3, 0.62, 1e-5), (1, 0.63, 1e-5), (2, 0.67, 1e-5), (1, 0.5, 3e-5))
    for number, (seed, after, rate) in enumerate(afters):
        seeded(folder / f"r{number}", seed, after=after, rate=rate)
    return folder


@pytest.fixture
def runs(written: Path, tmp_path: Path) -> list[RunData]:
    """Copies that a test may change."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return [read_run(tmp_path / f"r{number}") for number in range(4)]


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30, 31, 60, 500])
def test_the_quantile_matches_students_t(degrees: int) -> None:
    from scipy.stats import t as student_t  # takes most of a second

    assert _quantile(degrees) == pytest.approx(student_t.ppf(0.975, degrees), abs=2e-3)


def test_a_mean_has_the_interval_of_its_seeds() -> None:
    mean = Mean.of([2.0, 3.0, 7.0])
    assert mean.value == pytest.approx(4.0)
    assert mean.half_width == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-3)
    assert mean.text(sign=True) == "+4.0 ± 6.6"
    assert Mean.of([5.0]).text() == "5.0"


def test_runs_that_differ_only_in_their_seed_form_an_arm(runs: list[RunData]) -> None:
    first, second = arms(runs)
    assert (first.seeds, second.seeds) == ([1, 2, 3], [1])
    assert (first.differences, second.differences) == ("optimizer.lr=1e-05", "optimizer.lr=3e-05")
    figures = first.figures("accuracy", 100.0)
    assert figures is not None
    assert [mean.value for mean in figures] == pytest.approx([60.0, 64.0, 4.0])
    (alone,) = arms(runs[:3])
    assert alone.differences == "r0"


def test_the_seeds_of_an_arm_are_one_line_with_an_interval(runs: list[RunData]) -> None:
    first, second = grouped(runs)
    assert (first.label, first.css, second.label, second.css) == ("optimizer.lr=1e-05, 3 seeds", "s1", "r3", "s2")
    values = iter(([(0.0, 1.0), (1.0, 2.0)], [(0.0, 3.0), (1.0, 3.0)], [(0.0, 2.0), (1.0, 7.0), (2.0, 9.0)]))
    line = first.series(lambda run: next(values))
    assert line.points == [(0.0, 2.0), (1.0, 4.0)], "only the steps that all seeds have"
    step, low, high = line.band[1]
    assert (step, low, high) == pytest.approx((1.0, 4.0 - 6.57, 4.0 + 6.57), abs=0.01)
    alone = second.series(lambda run: [(0.0, 1.0)], [(0.0, 0.5, 1.5)])
    assert (alone.points, alone.band) == ([(0.0, 1.0)], [(0.0, 0.5, 1.5)])
    assert colours_of(runs) == ["s1", "s1", "s1", "s2"]
    assert colours_of([runs[0], read_run(runs[0].directory)]) == ["s1", "s2"], "one seed, twice"
    for run in runs:
        run.config["name"] = "slow" if run in first.runs else "fast"
    assert [group.label for group in grouped(runs)] == ["slow, 3 seeds", "fast"]


def test_the_table_is_on_the_page_and_on_the_terminal(runs: list[RunData], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run.directory) for run in runs]
    assert main(["report", *folders]) == 0
    out = capsys.readouterr().out
    assert "optimizer.lr=1e-05 (seeds 1, 2, 3)" in out
    assert "change +4.0 ± 6.6" in out
    page = (runs[0].directory / "report.html").read_text()
    assert '<h2 id="seeds">Over seeds</h2>' in page
    assert "+4.0 ± 6.6" in page
    assert main(["report", folders[0], folders[3]]) == 0
    assert "seeds" not in capsys.readouterr().out
    assert '<h2 id="seeds">' not in (runs[0].directory / "report.html").read_text()


def test_a_run_without_an_evaluation_at_its_end_leaves_a_dash(runs: list[RunData]) -> None:
    (runs[1].directory / "metrics.jsonl").write_text("")
    again = [read_run(run.directory) for run in runs]
    assert "<td>–</td>" in section(again)
    assert "change –" in text(again)
