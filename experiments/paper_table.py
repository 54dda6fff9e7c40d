r"""Writes the paper's table from finished evaluations, with intervals.

    python -m experiments.paper_table base=runs/q/evaluation/models_Qwen3-8B Purified=runs/q/evaluation/purified \
        --published paper Qwen3-8B --write runs/q/table.md

The first name is the base. DIR is OUTPUT/evaluation/MODEL with one directory per problem set. A name given several
times has several seeds: their responses to a problem are pooled, and the change with each seed is listed below the
table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.published import PUBLISHED
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import Average, Evaluation, average, read_evaluations
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.files.atomic import write_text

Sets = dict[str, Evaluation]
"""The evaluations of one model by problem set."""

COLUMNS = {
    "accuracy": ("average, %", 100.0, 1),
    "mean_tokens": ("tokens per response", 1.0, 0),
    "markers_per_1000_tokens": ("markers per 1,000 tokens", 1.0, 2),
    "cut_share": ("truncated, %", 100.0, 1),
}
"""Statistics averaged over the sets: title, factor and digits by the name in the summary of an evaluation."""


def read_arms(words: Sequence[str]) -> dict[str, list[Sets]]:
    """The evaluations of each arm, one per seed, by name and in the order of the words.

    Raises:
        UserError: a word is not NAME=DIR, only one name is given, a directory contains no complete evaluation, or the
            sets differ.
    """
    arms: dict[str, list[Sets]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not name or not equals or not path:
            raise UserError("paper_table", got=word, need="NAME=DIR", fix="name each evaluation")
        arms.setdefault(name, []).append(read_evaluations(path))
    if len(arms) < 2:
        raise UserError("paper_table", got=f"only {', '.join(arms)}", need="a base and an arm", fix="name another one")
    sets = {tuple(one) for seeds in arms.values() for one in seeds}
    if len(sets) > 1:
        raise UserError(
            "paper_table",
            got=f"evaluations of different sets: {'; '.join(', '.join(names) for names in sorted(sets))}",
            need="the same sets for all",
            fix="evaluate all models on the same sets",
        )
    return arms


def pooled(seeds: Sequence[Sets]) -> Sets:
    """The responses of all seeds to the same problems as one evaluation of each set."""
    first = seeds[0]
    return {
        name: replace(first[name], scores=tuple(score for seed in seeds for score in seed[name].scores))
        for name in first
    }


def table(arms: Mapping[str, Sequence[Sets]], published: tuple[str, str] | None, *, resamples: int) -> str:
    """Markdown: a row for the base and for each arm, followed by notes on the numbers.

    Args:
        arms: evaluations of each arm, the base first.
        published: source and model in `PUBLISHED` whose scores are added as two columns.
        resamples: bootstrap resamples of each interval.
    """
    named = {name: pooled(seeds) for name, seeds in arms.items()}
    base_name, base = next(iter(named.items()))
    scores = PUBLISHED[published] if published else None
    head = ["", *base, *(cell for title, _, _ in COLUMNS.values() for cell in (title, "change"))]
    head += ["published, %", "published change"] if scores else []
    lines = [head, ["---"] * len(head)]
    for name, sets in named.items():
        cells = [
            name,
            *(f"{100 * average('accuracy', [one], None, resamples=resamples).value:.1f}" for one in sets.values()),
        ]
        for statistic, (_, factor, digits) in COLUMNS.items():
            compared = None if name == base_name else list(base.values())
            found = average(statistic, list(sets.values()), compared, resamples=resamples)
            cells += [f"{factor * found.value:,.{digits}f}", _change(found, factor, digits)]
        if scores:
            value = scores.base if name == base_name else scores.arms.get(name)
            cells += ["" if value is None else f"{value:.1f}"]
            cells += ["" if value is None or name == base_name else f"{value - scores.base:+.1f}"]
        lines.append(cells)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n\n".join([text, *_notes(arms, published, resamples)]) + "\n"


def _change(found: Average, factor: float, digits: int) -> str:
    if found.change is None:
        return ""
    low, high = found.change.interval
    shown = [f"{factor * value:+,.{digits}f}" for value in (found.change.difference, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _notes(arms: Mapping[str, Sequence[Sets]], published: tuple[str, str] | None, resamples: int) -> list[str]:
    """Notes on the intervals, the change with each seed, and the source of the published numbers."""
    base_name, base = next(iter(arms.items()))
    sets = base[0]
    samples = sorted({one.summary.samples_per_problem for one in sets.values()})
    problems = sum(one.summary.problems for one in sets.values())
    confidence = 100 * next(iter(sets.values())).summary.confidence
    notes = [
        f"{problems} problems, {'/'.join(map(str, samples))} responses to each by {base_name}. Brackets: "
        f"{confidence:g} % bootstrap intervals over problems, of changes over the problems that both have. They do not "
        "contain what another training with another seed would change."
    ]
    for name, seeds in arms.items():
        if name != base_name and len(seeds) > 1:
            found = [
                average("accuracy", list(seed.values()), list(pooled(base).values()), resamples=resamples)
                for seed in seeds
            ]
            each = ", ".join(f"{100 * one.change.difference:+.1f}" for one in found if one.change is not None)
            notes.append(f"{name}, change with each of {len(seeds)} seeds: {each}.")
    if published:
        scores = PUBLISHED[published]
        notes.append(
            f"Published: {scores.source} for {published[1]}, by the protocol of conf/{scores.protocol}.yaml, not ours. "
            "Bases of different reports differ by 3 to 6 points: compare changes."
        )
    return notes


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", metavar="NAME=DIR", help="evaluations, the base first")
    parser.add_argument(
        "--published",
        nargs=2,
        metavar=("SOURCE", "MODEL"),
        help=f"add published scores: {'; '.join(' '.join(key) for key in PUBLISHED)}",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args(words)
    published = tuple(options.published) if options.published else None
    if published and published not in PUBLISHED:
        parser.error(
            f"--published {' '.join(published)}: choose one of {'; '.join(' '.join(key) for key in PUBLISHED)}"
        )
    try:
        text = table(read_arms(options.evaluations), published, resamples=EvaluationConfig().resamples)
    except UserError as error:
        parser.error(str(error))
    if options.write:
        write_text(options.write, text)
    print(text)


if __name__ == "__main__":
    main()
