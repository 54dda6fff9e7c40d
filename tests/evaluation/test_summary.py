import json
import math
import statistics

import pytest

from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.records import SampleScore
from nemo_popsd.evaluation.summary import EvaluationSummary, figures_of
from tests.evaluation.scores import score


def summary(scores: list[SampleScore], **settings: object) -> EvaluationSummary:
    return EvaluationSummary.from_scores(scores, EvaluationConfig(**settings))  # type: ignore[arg-type]


def test_accuracy_is_a_mean_over_problems() -> None:
    # p: 1 of 1, q: 1 of 3; over samples it would be 2 of 4.
    samples = [score("p"), score("q"), score("q", False, sample=1), score("q", False, sample=2)]
    found = summary(samples)
    assert found.accuracy == pytest.approx((1 + 1 / 3) / 2)
    assert found.accuracy_stderr == pytest.approx(statistics.stdev([1, 1 / 3]) / math.sqrt(2))
    assert (found.problems, found.samples, found.samples_per_problem) == (2, 4, 1)
    assert found.majority == 0.5  # q's wrong answer has two votes
    assert summary(samples[::-1]) == found


def test_standard_error_of_single_samples_is_the_binomial_one() -> None:
    found = summary([score(f"{n:03}", n < 30) for n in range(100)])
    assert found.accuracy == pytest.approx(0.3)
    assert found.accuracy_stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    low, high = found.intervals["accuracy"]
    assert (low, high) == pytest.approx((0.3 - 1.96 * 0.0458, 0.3 + 1.96 * 0.0458), abs=0.015)


def test_one_problem_has_no_standard_error() -> None:
    assert summary([score("p"), score("p", False, sample=1)]).accuracy_stderr is None


def test_marker_rate_is_over_all_tokens() -> None:
    found = summary([score("p", waits=10), score("q", tokens=900)])
    assert found.marker_rates == {"Wait": 10.0, "Check": 2.0}
    assert found.markers_per_1000_tokens == 12.0
    assert found.mean_tokens == 500


def test_shares() -> None:
    found = summary(
        [
            score("p", truncated=True, closed_thinking=False, looping=True, repeated=0.5),
            score("q", False, answer=None, vote=None, decided_by="missing", segments=4),
            score("r", False, decided_by="timeout"),
            score("s", False, decided_by="crash"),
        ]
    )
    assert (found.cut_share, found.unanswered_share, found.undecided_share) == (0.25, 0.25, 0.5)
    assert (found.closed_thinking_share, found.looping_share, found.repeated_share) == (0.75, 0.25, 0.125)
    assert found.segments == 7 / 4


def test_pass_at_k() -> None:
    samples = [score("p", number == 0, sample=number) for number in range(6)]
    samples += [score("q", True, sample=number) for number in range(6)]
    found = summary(samples).pass_at
    assert found == {"2": pytest.approx((1 / 3 + 1) / 2), "4": pytest.approx((2 / 3 + 1) / 2), "6": 1.0}
    assert list(summary(samples, pass_k=[8, 3, 1]).pass_at) == ["1", "3"]  # at most the number of samples
    assert summary(samples[:1]).pass_at == {}
    fewer = [*samples, score("r")]
    assert summary(fewer).pass_at == {}


def test_every_statistic_lies_in_its_interval() -> None:
    samples = [score(f"p{n}", n % 3 == 0, sample=s, waits=n % 2) for n in range(20) for s in range(2)]
    found = summary(samples)
    assert set(found.intervals) == set(figures_of(samples))
    for name, figure in figures_of(samples).items():
        low, high = found.intervals[name]
        assert low <= figure.value <= high, name


def test_a_summary_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_empty_responses() -> None:
    found = summary([score("p", False, tokens=0, markers={"Wait": 0})])
    assert (found.mean_tokens, found.markers_per_1000_tokens) == (0, 0)


def test_as_dict_survives_json() -> None:
    found = summary([score("p"), score("q", False)])
    assert EvaluationSummary(**json.loads(json.dumps(found.as_dict()))) == found


def test_numbers_are_finite_statistics_for_loggers() -> None:
    found = summary([score("p", sample=n, waits=n) for n in range(2)]).numbers()
    assert found["accuracy"] == found["pass_at/2"] == 1.0
    assert found["marker_rates/Wait"] == 5.0
    assert not {"confidence", "intervals", "accuracy_stderr"} & set(found)
    assert all(isinstance(value, float) for value in found.values())
