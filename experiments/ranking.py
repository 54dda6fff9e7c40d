"""Compares the ranking of the arms before training with the results of training: `python -m experiments.ranking`.

The target of every arm is scored on the tuning rows as `popsd diagnose --views` scores views, in one diagnosis whose
answers are kept in runs/experiments/ranking. The results of training are read from the records of the main comparison;
`--views` adds the arms of the table `views`. The other tables vary settings that no score of the untrained student
depends on. For each score the command prints Spearman's rank correlation over the arms and its p-value from
permutations of the arms.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from experiments.arms import ARMS, Arm
from experiments.intervals import p_text
from experiments.pages import rows_of
from experiments.plan import CONF, RUNS
from experiments.records import load
from experiments.results import FIGURES, Done, change, finished
from experiments.rows import make
from experiments.tables import TABLES
from nemo_popsd.commands.views import without_rows
from nemo_popsd.config.loading import load_config, to_dict_config
from nemo_popsd.diagnosis.views.record import CandidateRecord, ViewScores, read_views, write_views
from nemo_popsd.diagnosis.views.verdicts import KINDS, shown

_VIEWS = TABLES["views"]
_SCORED = (*ARMS, *(entry.arm for entry in _VIEWS.entries))
_TITLES = {arm.name: arm.title for arm in _SCORED}
_PERMUTATIONS = 100_000
_OUTCOMES = ("accuracy", "markers", "tokens")
"""Short names of `FIGURES`, in its order."""


class Compared(NamedTuple):
    """A score before training and the change after training that it should predict."""

    score: str
    outcome: str
    title: str


COMPARED = (
    Compared("order", "accuracy", "order of the verdicts (kind, then gain)"),
    Compared("gain", "accuracy", "gain"),
    Compared("uncertain_target_over_student", "accuracy", "target less student, uncertain tokens"),
    Compared("fork_target_over_student", "accuracy", "target less student, first difference"),
    Compared("accuracy", "accuracy", "accuracy of the teacher"),
    Compared("markers", "accuracy", "markers per 1,000 tokens, target less student"),
    Compared("markers", "markers", "markers per 1,000 tokens, target less student"),
    Compared("length_share", "tokens", "tokens per end, target against student"),
)
"""The first is the recommendation of the command; the others are its parts."""


@dataclass(frozen=True)
class Correlation:
    """A rank correlation over arms."""

    arms: int
    rho: float
    p: float
    """Two-sided p-value from permutations of the arms."""

    @classmethod
    def of(cls, scores: Sequence[float], outcomes: Sequence[float]) -> Correlation:
        """Spearman's correlation; equal scores share their rank. NaN if all scores are equal."""
        if len(set(scores)) == 1:
            return cls(len(scores), math.nan, math.nan)
        rho = float(spearmanr(scores, outcomes).statistic)
        generator = np.random.default_rng(0)
        ranks = [np.asarray(spearman_ranks(values)) for values in (list(scores), list(outcomes))]
        centred = [(values - values.mean()) / values.std() for values in ranks]
        permuted = np.array([generator.permutation(centred[0]) for _ in range(_PERMUTATIONS)])
        found = permuted @ centred[1] / len(scores)
        extreme = np.count_nonzero(np.abs(found) >= abs(rho) - 1e-9)
        return cls(len(scores), rho, (1 + float(extreme)) / (1 + _PERMUTATIONS))


def spearman_ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def recorded(done: Done) -> dict[str, dict[str, float]]:
    """Mean changes by title of the arm, and by outcome (`_OUTCOMES`)."""
    return {
        arm.title: {word: change(runs, of).mean for word, of in zip(_OUTCOMES, FIGURES.values(), strict=True)}
        for arm, runs in done.items()
    }


def values_of(candidates: Sequence[CandidateRecord], score: str) -> list[float]:
    """A score of every candidate; `order` is the negative rank in the order of the verdicts."""
    if score == "order":
        keys = [(KINDS.index(one["kind"]), -_value(one, "gain")) for one in candidates]
        return [-float(sorted(keys).index(key)) for key in keys]
    return [_value(one, score) for one in candidates]


def _value(candidate: CandidateRecord, score: str) -> float:
    found = candidate["scores"][score]
    return 0.0 if found is None else found["value"]


def table(scores: ViewScores, changes: Mapping[str, Mapping[str, float]]) -> str:
    """The scores of each arm before training and its changes, best gain first."""
    lines = [
        "| arm | gain, points per nat | target less student, uncertain tokens | teacher less reference-only teacher | "
        "markers per 1,000 tokens | verdict | accuracy after training, change |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(scores["candidates"], key=lambda one: -_value(one, "gain")):
        cells = [
            "" if (found := one["scores"][name]) is None else shown(found, decimals)
            for name, decimals in (
                ("gain", 1),
                ("uncertain_target_over_student", 3),
                ("uncertain_teacher_over_reference", 3),
                ("markers", 1),
            )
        ]
        after = f"{changes[title]['accuracy']:+.1f}" if (title := _TITLES[one["name"]]) in changes else ""
        lines.append(f"| {title} | {' | '.join(cells)} | {one['kind']} | {after} |")
    return "\n".join(lines)


def correlations(candidates: Sequence[CandidateRecord], changes: Mapping[str, Mapping[str, float]]) -> str:
    """The rank correlation of each score with the change by training, over the arms that have both."""
    known = [one for one in candidates if _TITLES[one["name"]] in changes]
    lines = ["| before training | change after training | arms | rank correlation | p |", "|---|---|---|---|---|"]
    for one in COMPARED:
        outcomes = [changes[_TITLES[candidate["name"]]][one.outcome] for candidate in known]
        found = Correlation.of(values_of(known, one.score), outcomes)
        rho = "" if math.isnan(found.rho) else f"{found.rho:+.2f}"
        lines.append(f"| {one.title} | {one.outcome} | {found.arms} | {rho} | {p_text(found.p)} |")
    return "\n".join(lines)


def score_arms(arms: Sequence[Arm], output: Path, problems: int, samples: int) -> ViewScores:
    """Scores the target of each arm on the tuning rows; answers on disk are used."""
    from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
    from nemo_popsd.model.views import score_candidates
    from nemo_popsd.parallel.distributed import initialize, shutdown

    words = [
        f"output={output}",
        f"data.train.path={make('tuning-views')}",
        "data.train.columns.answer=answer",
        f"diagnosis.views.problems={problems}",
        f"diagnosis.views.samples={samples}",
    ]
    config = load_config(str(CONF), words)
    initialize(config.parallel, seed=config.seed)
    model = PurifiedOPSDModel(to_dict_config(without_rows(config)))
    candidates = {arm.name: load_config(str(CONF), [*words, *arm.overrides]) for arm in arms}
    scores = score_candidates(model, config, candidates, output)
    write_views(scores, output)
    shutdown()
    return scores


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=256, help="tuning rows that are answered")
    parser.add_argument("--samples", type=int, default=8, help="the student's answers to each")
    parser.add_argument("--again", action="store_true", help="score although runs/experiments/ranking has scores")
    parser.add_argument("--views", action="store_true", help="with the arms of the table `views`")
    options = parser.parse_args()
    records = load()
    changes = recorded(finished(records))
    arms, output = ARMS, RUNS / "ranking"
    if options.views:
        arms, output = _SCORED, RUNS / "ranking-views"
        changes |= recorded(rows_of(_VIEWS, load(_VIEWS.file), records))
    scores = (None if options.again else read_views(output)) or score_arms(
        arms, output, options.problems, options.samples
    )
    print(
        f"{scores['answers']} answers to {scores['settings']['problems']} problems, {scores['compared']} of them with "
    )
    print("right and wrong answers\n")
    print(table(scores, changes))
    print()
    print(correlations(scores["candidates"], changes))
    for helping in (True, False):
        part = [one for one in scores["candidates"] if (one["kind"] == "helps") == helping]
        if len(part) > 2:
            print(f"\nAmong the arms that are {'' if helping else 'not '}expected to help:\n")
            print(correlations(part, changes))


if __name__ == "__main__":
    main()
