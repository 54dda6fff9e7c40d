"""The same questions answered before and after training, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nemo_popsd.evaluation.markers import DEFAULT_MARKERS, marker_spans
from nemo_popsd.files.json_files import damaged
from nemo_popsd.report.markup import esc
from nemo_popsd.report.run import AFTER, BEFORE, RunData, read_lines


@dataclass(frozen=True)
class Answer:
    """One response."""

    text: str
    tokens: int
    cut: bool
    correct: bool | None
    """None where it was not scored."""


@dataclass(frozen=True)
class Pair:
    """One question with its answers; None where one is not there."""

    row: str
    question: str
    expected: str | None
    before: Answer | None
    after: Answer | None


def answer_pairs(run: RunData, count: int) -> tuple[list[Pair], str]:
    """Up to `count` questions with answers from before and after, and where they come from, in words.

    From the samples of the first and the last evaluation of the run, if they were kept: those that became wrong and
    those that became right first, in turn. Otherwise from the diagnoses before and after training.
    """
    pairs = _scored_pairs(run)
    if pairs:
        lost = [pair for pair in pairs if pair.before and pair.after and pair.before.correct and not pair.after.correct]
        won = [pair for pair in pairs if pair.before and pair.after and pair.after.correct and not pair.before.correct]
        rest = [pair for pair in pairs if pair not in lost and pair not in won]
        turns = [pair for turn in zip_longest(lost, won) for pair in turn if pair is not None]
        told = f"held-out questions: of {len(pairs)}, {len(lost)} became wrong and {len(won)} became right; these first"
        return (turns + rest)[:count], told
    before, after = (run.diagnoses[name].rollouts if name in run.diagnoses else [] for name in (BEFORE, AFTER))
    later = {rollout["row"]: rollout for rollout in after}
    pairs = [
        Pair(rollout["row"], rollout["question"], None, _rollout(rollout), _rollout(later.get(rollout["row"])))
        for rollout in before
    ]
    return pairs[:count], "training questions, as the diagnoses before and after training drew them"


def _scored_pairs(run: RunData) -> list[Pair]:
    """The first sample of each held-out problem in the first and in the last evaluation."""
    if run.before is None or run.before.directory is None:
        return []
    problems = read_lines(run.before.directory / "problems.jsonl")
    before = _first_samples(run.before.directory)
    after = _first_samples(run.after.directory) if run.after and run.after.directory else {}
    return [
        Pair(
            str(problem["id"]),
            str(problem.get("question", "")),
            problem.get("answer"),
            before.get(str(problem["id"])),
            after.get(str(problem["id"])),
        )
        for problem in problems
        if str(problem.get("id")) in before
    ]


def _first_samples(directory: Path) -> dict[Any, Answer]:
    scores = {
        str(line.get("problem")): bool(line.get("correct"))
        for line in read_lines(directory / "scores.jsonl")
        if line.get("sample") == 0
    }
    return {
        str(line["problem"]): Answer(
            str(line.get("text", "")), _tokens(line, file), bool(line.get("cut")), scores.get(str(line["problem"]))
        )
        for file in sorted(directory.glob("samples-*.jsonl"))
        for line in read_lines(file)
        if line.get("sample") == 0 and "problem" in line
    }


def _tokens(line: dict[str, Any], file: Path) -> int:
    tokens = line.get("tokens", 0)
    if not isinstance(tokens, int):
        raise damaged(file, f"tokens={tokens!r}")
    return tokens


def _rollout(rollout: dict[str, Any] | None) -> Answer | None:
    if rollout is None:
        return None
    return Answer("".join(rollout["pieces"]), len(rollout["pieces"]), bool(rollout["cut"]), None)


def pair_cards(pair: Pair, markers: Sequence[str] = DEFAULT_MARKERS) -> str:
    """One question with both answers, their markers marked."""
    expected = f' <span class="badge">expected {esc(pair.expected)}</span>' if pair.expected is not None else ""
    columns = "".join(
        f'<section class="card"><h3>{title}{_badges(answer)}</h3>{_body(answer, markers)}</section>'
        for title, answer in (("before", pair.before), ("after", pair.after))
    )
    return (
        f'<div class="sample"><p class="question"><b>{esc(pair.row)}</b>{expected}\n{esc(pair.question)}</p>'
        f'<div class="two">{columns}</div></div>'
    )


def _badges(answer: Answer | None) -> str:
    if answer is None:
        return ""
    badges = [f'<span class="badge">{answer.tokens:,} tokens</span>']
    if answer.correct is not None:
        css, text = ("right", "right") if answer.correct else ("wrong", "wrong")
        badges.append(f'<span class="badge {css}">{text}</span>')
    if answer.cut:
        badges.append('<span class="badge wrong">cut</span>')
    return "".join(badges)


def _body(answer: Answer | None, markers: Sequence[str]) -> str:
    if answer is None:
        return '<p class="absent">not on disk</p>'
    return f'<div class="rollout" tabindex="0">{_marked(answer.text, markers)}</div>'


def _marked(text: str, markers: Sequence[str]) -> str:
    parts, done = [], 0
    for begin, end in marker_spans(text, markers):
        if begin < done:
            continue
        parts += [esc(text[done:begin]), f"<mark>{esc(text[begin:end])}</mark>"]
        done = end
    return "".join([*parts, esc(text[done:])])
