"""Scores of views of the reference before training: the page of `popsd diagnose --views`, and a section of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_popsd.diagnosis.views.record import CandidateRecord, Score, ViewScores, read_views
from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_text
from nemo_popsd.report.markup import card, esc, fixed, signed, table
from nemo_popsd.report.run import RunData
from nemo_popsd.report.shell import document, refuse_another_file

_Column = tuple[str, str, int, float, bool]
"""Name of a score, title, decimals, factor, and whether it is a difference, shown with its sign."""

_MAIN: tuple[_Column, ...] = (
    ("gain", "gain, points per nat", 1, 1.0, True),
    ("accuracy", "accuracy of the teacher, %", 1, 100.0, False),
    ("uncertain_teacher_over_reference", "teacher minus reference-only teacher, uncertain tokens", 3, 1.0, True),
    ("markers", "markers per 1,000 tokens", 2, 1.0, True),
    ("length_share", "tokens per end, %", 0, 100.0, True),
)
_CONTINUATIONS: tuple[_Column, ...] = (
    ("student", "student", 3, 1.0, False),
    ("teacher", "teacher", 3, 1.0, False),
    ("reference_only", "reference-only teacher", 3, 1.0, False),
    ("target", "target", 3, 1.0, False),
    ("teacher_over_reference", "teacher minus reference-only teacher", 3, 1.0, True),
    ("target_over_student", "target minus student", 3, 1.0, True),
)
_SIGNAL: tuple[_Column, ...] = (
    *((statistic.name, statistic.symbol, 2, 1.0, False) for statistic in SIGNAL_STATISTICS),
    ("distance", "KL(target ‖ student), nats per token", 4, 1.0, False),
    ("accuracy_over_student", "accuracy of the teacher minus that of the student, points", 1, 100.0, True),
)
_NOTES = {
    "scores": "The gain is the first-order change of the accuracy for a step along the gradient of the loss that "
    "changes the log-probability of an answer by one nat. Markers and ends are differences between target and student "
    "at the states that the student visits. docs/method.md lists the approximations.",
    "fork": "Probability of the right continuation among two, at the first token in which a right and a wrong answer "
    "to the same problem differ.",
    "uncertain": "Additional probability of tokens of right answers compared with tokens of wrong answers, relative to "
    "the average over the student's tokens, where the student is uncertain.",
}


def write_views_page(directory: Path) -> Path:
    """Writes `index.html` next to the scores in `directory`, and returns its path.

    Raises:
        UserError: `directory` does not contain scores of views.
    """
    scores = read_views(directory)
    if scores is None:
        raise UserError(
            "report",
            got=f"{str(directory)!r} without views.json",
            need="a directory that `popsd diagnose --views` wrote",
            fix="correct the path",
        )
    page = directory / "index.html"
    refuse_another_file(page)
    facts = "".join(f"<li>{esc(name)} <b>{esc(value)}</b></li>" for name, value in _facts(scores))
    header = f'<ul class="facts">{facts}</ul>'
    write_text(page, document(scores["name"], "Purified OPSD · views, scored before training", header, _body(scores)))
    return page


def section(runs: Sequence[RunData]) -> str:
    """The scores in the directories of `runs`; "" if there are none."""
    shown = [(run, scores) for run in runs for scores in run.views]
    return "".join(
        (f"<h3>{esc(run.name)}: {esc(scores['name'])}</h3>" if len(shown) > 1 else "") + _body(scores)
        for run, scores in shown
    )


def text(scores: ViewScores) -> str:
    """The main scores and the verdicts, for the terminal."""
    width = max(len("student"), *(len(candidate["name"]) for candidate in scores["candidates"]))
    lines = [f"{name}: {value}" for name, value in _facts(scores)]
    for name, title, decimals, factor, sign in _MAIN:
        lines.append(f"\n{title}")
        own = scores["student"].get(name)
        if own is not None:
            lines.append(f"  {'student':{width}}  {_shown(own, decimals, factor, False)}")
        for candidate in scores["candidates"]:
            shown = _shown(candidate["scores"].get(name), decimals, factor, sign)
            lines.append(f"  {candidate['name']:{width}}  {shown}")
    return "\n".join([*lines, "", *(one["verdict"] for one in scores["candidates"]), scores["best"]])


def _facts(scores: ViewScores) -> list[tuple[str, str]]:
    settings = scores["settings"]
    return [
        ("problems", f"{settings['problems']:,} of data.{settings['source']}"),
        ("answers of the student", f"{scores['answers']:,}, {100 * scores['right'] / scores['answers']:.1f} % right"),
        ("problems with right and wrong answers", f"{scores['compared']:,}"),
        ("intervals", f"{100 * settings['confidence']:g} %, bootstrap over problems"),
    ]


def _body(scores: ViewScores) -> str:
    candidates = scores["candidates"]
    verdicts = "".join(f"<li>{esc(candidate['verdict'])}</li>" for candidate in candidates)
    cards = [
        card("Scores", _table(candidates, _MAIN, student=scores["student"]), note=_NOTES["scores"]),
        card("Right against wrong, first difference", _table(candidates, _CONTINUATIONS, "fork_"), note=_NOTES["fork"]),
        card(
            "Right against wrong, uncertain tokens",
            _table(candidates, _CONTINUATIONS, "uncertain_"),
            note=_NOTES["uncertain"],
        ),
        card("The signal", _table(candidates, _SIGNAL)),
    ]
    return f'<p class="lead"><b>{esc(scores["best"])}</b></p><ul>{verdicts}</ul>{"".join(cards)}'


def _table(
    candidates: Sequence[CandidateRecord],
    columns: Sequence[_Column],
    prefix: str = "",
    student: Mapping[str, Score | None] | None = None,
) -> str:
    rows = []
    if student is not None:
        cells = [_cell(student.get(name), decimals, factor, False) for name, _, decimals, factor, _ in columns]
        rows.append(["student, without a reference", *cells])
    for candidate in candidates:
        scores = candidate["scores"]
        cells = [_cell(scores.get(prefix + n), decimals, factor, sign) for n, _, decimals, factor, sign in columns]
        rows.append([esc(candidate["name"]), *cells])
    return table(["", *(esc(title) for _, title, *_ in columns)], rows)


def _cell(score: Score | None, decimals: int, factor: float, sign: bool) -> str:
    if score is None:
        return "–"
    value, low, high = _numbers(score, decimals, factor, sign)
    return f"{value}<small>{low} … {high}</small>"


def _shown(score: Score | None, decimals: int, factor: float, sign: bool) -> str:
    if score is None:
        return "not defined"
    value, low, high = _numbers(score, decimals, factor, sign)
    return f"{value} [{low}, {high}]"


def _numbers(score: Score, decimals: int, factor: float, sign: bool) -> tuple[str, str, str]:
    show = signed if sign else fixed
    value, low, high = (show(factor * number, decimals) for number in (score["value"], score["low"], score["high"]))
    return value, low, high
