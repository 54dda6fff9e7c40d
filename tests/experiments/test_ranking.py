"""The ranking of the arms before training against what training did."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy.stats import spearmanr

from experiments.arms import OPSD, PURIFIED
from experiments.ranking import COMPARED, Correlation, correlations, table, values_of
from nemo_popsd.diagnosis.views.record import CandidateRecord, Score
from tests.report.runs_on_disk import view_scores


def candidate(name: str, kind: str, value: float) -> CandidateRecord:
    score: Score = {"value": value, "low": value - 1, "high": value + 1}
    names = [one.score for one in COMPARED if one.score != "order"] + ["uncertain_teacher_over_reference"]
    return {"name": name, "family": "", "scores": dict.fromkeys(names, score), "kind": kind, "verdict": ""}


def test_the_correlation_is_spearmans_and_its_p_value_that_of_all_permutations() -> None:
    scores, outcomes = [1.0, 5.0, 2.0, 2.0, 9.0], [0.3, 0.1, 0.2, 0.5, 0.9]
    found = Correlation.of(scores, outcomes)
    rho = spearmanr(scores, outcomes).statistic
    assert found.rho == pytest.approx(rho)
    exact = [abs(spearmanr(p, outcomes).statistic) >= abs(rho) - 1e-9 for p in itertools.permutations(scores)]
    assert found.p == pytest.approx(sum(exact) / math.factorial(5), abs=0.01)
    assert math.isnan(Correlation.of([1.0, 1.0], [0.1, 0.2]).rho)


def test_arms_are_compared_by_the_order_of_the_verdicts_and_by_each_score() -> None:
    known = [candidate(PURIFIED.name, "helps", 2.0), candidate(OPSD.name, "undecided", 3.0)]
    assert values_of(known, "order") == [0.0, -1.0]
    assert values_of(known, "gain") == [2.0, 3.0]
    changes = {
        arm.title: dict.fromkeys(("accuracy", "markers", "tokens"), value)
        for arm, value in ((PURIFIED, 4.0), (OPSD, -9.0))
    }
    scores = view_scores()
    scores["candidates"] = known
    lines = table(scores, changes).splitlines()
    assert lines[2].startswith("| OPSD, JSD | +3.0 [+2.0, +4.0] |")
    assert lines[3].endswith("| helps | +4.0 |")
    rows = correlations(known, changes).splitlines()[2:]
    assert len(rows) == len(COMPARED)
    assert rows[0].startswith("| order of the verdicts (kind, then gain) | accuracy | 2 | +1.00 |")
    assert rows[1].startswith("| gain | accuracy | 2 | -1.00 |")
