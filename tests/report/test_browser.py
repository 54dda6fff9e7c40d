"""Pages in a real browser: all plots are drawn, without errors, without requests and without unescaped text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_popsd.report import write_diagnosis_page, write_report
from tests.browser import Browser, Page, running_browser
from tests.report.runs_on_disk import EVIL, write_run, write_samples

DESKTOP, PHONE = 1280, 390
UNFOLD = "document.querySelectorAll('details').forEach(d => { d.open = true; })"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports on one run, on two and on a run without data, and a diagnosis, with texts that attempt to break out."""
    root = tmp_path_factory.mktemp("runs")
    first = write_run(root / "first", name=f"first {EVIL}", text=EVIL)
    second = write_run(root / "second", name="second", after=0.3, text=EVIL)
    for step, right in ((0, True), (6, False)):
        write_samples(second, step, {EVIL: right, "b": not right}, text=EVIL + " Wait {}")
    bare = root / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("name: bare\n")
    return {
        "one": write_report([first], first / "report.html"),
        "two": write_report([first, second], root / "two.html"),
        "bare": write_report([bare], bare / "report.html"),
        "diagnosis": write_diagnosis_page(first / "diagnosis" / "before"),
    }


def opened(browser: Browser, file: Path, width: int, *, dark: bool = False) -> Page:
    page = browser.page()
    page.open(file, width=width, dark=dark)
    assert page.complaints() == []
    assert page.requests() == [file.as_uri()]
    return page


@pytest.mark.slow
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["one", "two", "bare", "diagnosis"])
def test_pages_fit_the_width_and_escape_text(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    page = opened(browser, pages[name], width)
    assert page.value("document.documentElement.scrollWidth") <= width
    page.value(UNFOLD)
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("document.scripts.length") == page.value("document.querySelectorAll('script').length")
    assert page.value("[...document.scripts].filter(s => s.type !== 'application/json').length") == 1
    assert page.value("document.querySelectorAll('img, iframe, link[href^=http], b > script').length") == 0
    assert page.value("[...document.querySelectorAll('*')].some(e => e.hasAttribute('onerror'))") is False


def test_every_plot_is_drawn(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["two"], DESKTOP)
    lines = page.value("[...document.querySelectorAll('svg.plot')].map(s => s.querySelectorAll('path.line').length)")
    assert len(lines) >= 25
    assert min(lines) >= 1
    assert max(lines) == 3  # before, and both runs
    boxes = page.value(
        "[...document.querySelectorAll('svg path.line, svg circle.dot, svg path.whisker')].map(e => {"
        "const b = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();"
        "return [b.width + b.height, b.left >= s.left - 8 && b.right <= s.right + 8 && b.top >= s.top - 8 "
        "&& b.bottom <= s.bottom + 8]; })"
    )
    assert all(size > 0 and inside for size, inside in boxes)
    colours = page.value("[...document.querySelectorAll('svg.plot path.line')].map(e => getComputedStyle(e).stroke)")
    assert len(set(colours)) == 3
    assert "none" not in colours
    assert page.value("document.querySelectorAll('ol.push li').length") > 40
    page.value(UNFOLD)
    missing = page.value("[...document.querySelectorAll('section.card')].filter(s => !s.innerText.trim()).length")
    assert missing == 0


def test_text_stays_inside_the_plots(browser: Browser, pages: dict[str, Path]) -> None:
    for width in (DESKTOP, PHONE):
        page = opened(browser, pages["two"], width)
        outside = page.value(
            "[...document.querySelectorAll('svg text')].filter(e => { const b = e.getBoundingClientRect(),"
            "s = e.closest('.card').getBoundingClientRect(); return b.left < s.left || b.right > s.right; })"
            ".map(e => [e.textContent, e.getBoundingClientRect().x, e.closest('.card').getBoundingClientRect().x])"
        )
        assert outside == []


def test_light_and_dark_are_both_readable(browser: Browser, pages: dict[str, Path]) -> None:
    """The contrast of text on its card, by the formula of the WCAG, is at least 4.5."""
    contrast = """(() => {
        const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
            return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
        const over = (top, under) => { const [r, g, b, a = 1] = top.match(/[\\d.]+/g).map(Number);
            const below = under.match(/[\\d.]+/g).map(Number);
            return `rgb(${[r, g, b].map((v, i) => a * v + (1 - a) * below[i]).join(',')})`; };
        const ground = getComputedStyle(document.querySelector('.card')).backgroundColor;
        const sheet = light(ground);
        const texts = 'h3, .note, .verdict, td, th, .sub, mark, .chips code, svg text';
        return [...document.querySelectorAll(texts)].map((e) => {
            const style = getComputedStyle(e);
            const own = e.matches('mark, code') ? light(over(style.backgroundColor, ground)) : sheet;
            const ink = light(e.matches('svg text') ? style.fill : style.color);
            const contrast = (Math.max(own, ink) + 0.05) / (Math.min(own, ink) + 0.05);
            return [e.tagName + '.' + e.className, contrast]; }); })()"""
    grounds = []
    for dark in (False, True):
        page = opened(browser, pages["two"], DESKTOP, dark=dark)
        ratios = page.value(contrast)
        assert len(ratios) > 100
        assert [entry for entry in ratios if entry[1] < 4.5] == []
        grounds.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_values_show_under_the_pointer(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["two"], DESKTOP)
    page.move_to("#training ~ .grid svg.plot", across=0.97)
    text = page.value("document.getElementById('tip').innerText")
    assert "step 6" in text
    assert "second" in text
    assert page.value("document.querySelectorAll('.cursor circle').length") == 2
    page.move_to("h1")
    assert page.value("document.getElementById('tip').style.display") == "none"


def test_the_values_of_a_token_are_shown(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["diagnosis"], DESKTOP)
    assert page.value("document.querySelectorAll('.tokens').length") == 1
    assert page.value("document.querySelectorAll('.tokens span').length") == 24
    page.move_to(".tokens span", 6)
    text = page.value("document.querySelector('.inspector').innerText")
    assert "token 7 of 24" in text
    assert "␣6" in text
    for name in ("student", "base", "teacher", "reference-only", "target", "Δ_ref", "Δ_it"):
        assert name in text
    assert page.value("document.querySelectorAll('.alts section').length") == 5
    page.move_to(".tokens span", 5)  # its text attempts to break out
    assert "onerror=alert(2)" in page.value("document.querySelector('.inspector .now').innerText")
    grounds = "getComputedStyle(document.querySelectorAll('.tokens span')[7]).backgroundColor"
    both = page.value(grounds)
    page.value("document.querySelector('.switch button[value=show-ref]').click()")
    assert page.value(grounds) != both
    assert page.complaints() == []


def test_on_a_phone_a_tap_opens_the_panel(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["diagnosis"], PHONE)
    shown = "getComputedStyle(document.querySelector('.inspector')).display"
    assert page.value(shown) == "none"
    page.value("document.querySelectorAll('.tokens span')[6].click()")
    assert page.value(shown) == "block"
    page.value("document.querySelectorAll('.tokens span')[6].click()")
    assert page.value(shown) == "none"
