"""The SVG and HTML of plots and charts: lines, axes, and escaping of names."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from nemo_popsd.report.bars import Estimate, interval_chart, push_chart, share_bar
from nemo_popsd.report.plots import MOST_POINTS, Series, legend, line_plot, nice_ticks, series_class, tick_texts
from tests.report.runs_on_disk import EVIL

NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (-0.13, 0.21, [-0.2, -0.1, 0, 0.1, 0.2, 0.3]),
        (60, 60, [54, 57, 60, 63, 66]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1]),
        (1e-6, 9e-6, [0, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5]),
        (-3, -1, [-3, -2.5, -2, -1.5, -1]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]) -> None:
    actual = nice_ticks(low, high, 4)
    assert actual[0] <= low
    assert actual[-1] >= high
    if low != high or low == 0:
        assert actual == pytest.approx(ticks, abs=1e-12)


def test_ticks_of_an_axis_have_the_decimals_that_their_interval_needs() -> None:
    assert tick_texts([0, 2.5, 5]) == ["0.0", "2.5", "5.0"]
    assert tick_texts([-0.25, 0, 0.25]) == ["−0.25", "0.00", "0.25"]
    assert tick_texts([1000, 2000]) == ["1,000", "2,000"]
    assert tick_texts([0, 5e-5, 1e-4]) == ["0", "5.0e−5", "1.0e−4"]
    assert tick_texts([0.1, 0.2, 0.30000000000000004]) == ["0.1", "0.2", "0.3"]


def paths(svg: str, css: str) -> list[str]:
    return re.findall(rf'<path class="{css}" d="([^"]*)"', svg)


def test_a_line_goes_through_its_finite_points() -> None:
    points = [(0, 0.0), (5, NAN), (10, 4.0), (20, INFINITE)]
    svg = line_plot([Series("a", points, "s1", [(0, -1.0, 1.0), (10, 3.0, 5.0)])], label="x & y")
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "x & y"
    (line,) = paths(svg, "line s1")
    (first, last) = (tuple(map(float, pair.split())) for pair in line.removeprefix("M").split("L"))
    assert first[0] == 46
    assert last[0] == 330
    assert first[1] > last[1]
    (band,) = paths(svg, "band s1")
    assert band.count("L") == 3
    data = json.loads(unescape(re.search(r'data-plot="([^"]*)"', svg)[1]))
    assert [point[2:] for point in data["series"][0]["points"]] == [["0", "0"], ["10", "4.00"]]


def test_a_long_line_is_thinned_and_keeps_its_peaks() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(20_000)]
    points[12_345] = (12_345.0, 99.0)
    points[777] = (777.0, -99.0)
    kept = Series("a", points, "s1").drawable()
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(kept)
    assert {(12_345.0, 99.0), (777.0, -99.0)} <= set(kept)
    assert set(kept) <= set(points)


def test_one_point_is_a_dot_and_missing_points_are_reported() -> None:
    assert "<circle" in line_plot([Series("a", [(3, 1.0)], "s1")], label="x")
    assert "not measured" in line_plot([Series("a", [(3, NAN)], "s1"), Series("b", [], "s2")], label="x")
    assert "not measured" in interval_chart([], label="x")
    assert "not measured" in push_chart([], label="x")


def test_an_interval_extends_from_low_to_high() -> None:
    rows = [Estimate("before", 60.0, 55.0, 65.0, "base"), Estimate("after", 50.0, None, None, "s1")]
    root = ElementTree.fromstring(interval_chart(rows, label="accuracy"))
    whiskers = [e.get("d") for e in root if "whisker" in e.get("class", "")]
    dots = [float(e.get("cx")) for e in root if "dot" in e.get("class", "")]
    assert len(whiskers) == 1
    low, high = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whiskers[0]).groups())
    assert dots[1] < low < dots[0] < high
    assert dots[0] == pytest.approx((low + high) / 2, abs=0.2)


def test_bars_have_a_common_scale_and_a_side() -> None:
    html = push_chart([("Wait", 2.0), (" 4", -1.0)], label="x")
    assert re.findall(r'<i class="(\w+)" style="width:([\d.]+)%"', html) == [("up", "50.0"), ("down", "25.0")]
    assert "␣4" in html
    shares = share_bar([("rollout", 3.0, "s1"), ("training", 1.0, "s2")], label="x")
    assert re.findall(r"width:([\d.]+)%", shares) == ["75.00", "25.00"]
    assert share_bar([("rollout", 0.0, "s1")], label="x")


def test_names_are_escaped() -> None:
    drawn = [
        line_plot([Series(EVIL, [(0, 1.0), (1, 2.0)], "s1")], label=EVIL, x_label=EVIL, x_names=[EVIL, EVIL]),
        interval_chart([Estimate(EVIL, 1.0, 0.0, 2.0, "s1")], label=EVIL),
        push_chart([(EVIL, 1.0)], label=EVIL),
        share_bar([(EVIL, 1.0, "s1")], label=EVIL),
        legend([(EVIL, "s1")]),
    ]
    for html in drawn:
        assert "<script" not in html
        assert "<img" not in html
        assert "\x00" not in html
        ElementTree.fromstring(f"<div>{html}</div>")


def test_colours_repeat_after_the_last() -> None:
    assert [series_class(i) for i in (0, 5, 6)] == ["s1", "s6", "s1"]
