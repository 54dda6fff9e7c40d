"""Answers to the same questions before and after training, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from nemo_popsd.diagnosis.schema import RolloutRecord
from nemo_popsd.evaluation.markers import DEFAULT_MARKERS, marker_spans
from nemo_popsd.files.json_files import damaged
from nemo_popsd.report.markup import esc
from nemo_popsd.report.run import AFTER, BEFORE, RunData, read_lines

MOST_FLIPS = 50
"""Maximum number of problems to list in each direction."""


@dataclass(frozen=True)
class Answer:
    """One response."""

    text: str
    tokens: int
    truncated: bool
    correct: bool | None
    """None if it was not scored."""


@dataclass(frozen=True)
class Pair:
    """One question with its answers; a missing answer is None."""

    row: str
    question: str
    expected: str | None
    before: Answer | None
    after: Answer | None


def answer_pairs(run: RunData, count: int) -> tuple[list[Pair], str]:
    """Up to `count` questions with answers before and after training, and a phrase that describes their origin.

    The answers are the samples of the first and last evaluation of the run, if these were kept. Answers that became
    wrong and answers that became right come first, alternating. Otherwise the answers are those of the two diagnoses.
    """
    pairs = _scored_pairs(run)
    if pairs:
        lost, won = _flips(pairs)
        rest = [pair for pair in pairs if pair not in lost and pair not in won]
        changed = [pair for two in zip_longest(lost, won) for pair in two if pair is not None]
        origin = (
            f"held-out questions: of {len(pairs)}, {len(lost)} became wrong and {len(won)} became right; "
            "these come first"
        )
        return (changed + rest)[:count], origin
    before, after = (run.diagnoses[name].rollouts if name in run.diagnoses else [] for name in (BEFORE, AFTER))
    later = {rollout["row"]: rollout for rollout in after}
    pairs = [
        Pair(rollout["row"], rollout["question"], None, _rollout(rollout), _rollout(later.get(rollout["row"])))
        for rollout in before
    ]
    return pairs[:count], "training questions, with the responses of the diagnoses before and after training"


def _flips(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs whose answer became wrong, and those whose answer became right."""
    both = [(pair, pair.before.correct, pair.after.correct) for pair in pairs if pair.before and pair.after]
    scored = [(pair, before, after) for pair, before, after in both if before is not None and after is not None]
    return [p for p, before, after in scored if before and not after], [p for p, b, after in scored if after and not b]


def flipped(run: RunData, markers: Sequence[str]) -> str:
    """The problems whose first answer flipped between the first and the last evaluation, with both answers in a
    collapsed block; "" if there are none.
    """
    lost, won = _flips(_scored_pairs(run))
    parts = []
    for pairs, what, arrow in ((lost, "became wrong", "right → wrong"), (won, "became right", "wrong → right")):
        if not pairs:
            continue
        inner = "".join(
            f"<details><summary>{esc(pair.row)} <small>{esc(_first_line(pair.question))}</small></summary>"
            f"{pair_cards(pair, markers)}</details>"
            for pair in pairs[:MOST_FLIPS]
        )
        more = f'<p class="note">and {len(pairs) - MOST_FLIPS} more</p>' if len(pairs) > MOST_FLIPS else ""
        count = f"{len(pairs)} problem{'s' if len(pairs) > 1 else ''} {what} ({arrow})"
        parts.append(f'<details class="flips"><summary>{count}</summary>{inner}{more}</details>')
    return "".join(parts)


def _first_line(text: str) -> str:
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= 80 else line[:79] + "…"


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


def _first_samples(directory: Path) -> dict[str, Answer]:
    scores = {
        str(line.get("problem")): bool(line.get("correct"))
        for line in read_lines(directory / "scores.jsonl")
        if line.get("sample") == 0
    }
    return {
        str(line["problem"]): Answer(
            str(line.get("text", "")), _tokens(line, file), is_truncated(line), scores.get(str(line["problem"]))
        )
        for file in sorted(directory.glob("samples-*.jsonl"))
        for line in read_lines(file)
        if line.get("sample") == 0 and "problem" in line
    }


def _tokens(line: dict[str, object], file: Path) -> int:
    tokens = line.get("tokens", 0)
    if not isinstance(tokens, int):
        raise damaged(file, f"tokens={tokens!r}")
    return tokens


def _rollout(rollout: RolloutRecord | None) -> Answer | None:
    if rollout is None:
        return None
    return Answer("".join(rollout["pieces"]), len(rollout["pieces"]), is_truncated(rollout), None)


def is_truncated(line: Mapping[str, object]) -> bool:
    """Whether a response of an evaluation or a diagnosis was truncated at its limit; older files name the key `cut`."""
    return bool(line.get("truncated", line.get("cut")))


def pair_cards(pair: Pair, markers: Sequence[str] = DEFAULT_MARKERS) -> str:
    """One question and both answers, with highlighted markers."""
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
        css, text = ("right", "correct") if answer.correct else ("wrong", "wrong")
        badges.append(f'<span class="badge {css}">{text}</span>')
    if answer.truncated:
        badges.append('<span class="badge wrong">truncated</span>')
    return "".join(badges)


def _body(answer: Answer | None, markers: Sequence[str]) -> str:
    if answer is None:
        return '<p class="absent">not on disk</p>'
    return f'<div class="rollout" tabindex="0">{_marked(answer.text, markers)}</div>'


def _marked(text: str, markers: Sequence[str]) -> str:
    parts, done = [], 0
    for start, end in marker_spans(text, markers):
        if start < done:
            continue
        parts += [esc(text[done:start]), f"<mark>{esc(text[start:end])}</mark>"]
        done = end
    return "".join([*parts, esc(text[done:])])
