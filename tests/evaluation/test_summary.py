import json
import math
import statistics

import pytest

from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.summary import EvaluationSummary, SampleOutcome, comparison_table, score_response


def outcome(
    problem: str, correct: bool = True, *, answered: bool = True, cut: bool = False, tokens: int = 100, waits: int = 0
) -> SampleOutcome:
    return SampleOutcome(problem, correct, answered, cut, tokens, {"Wait": waits, "Check": 1})


def test_accuracy_is_a_mean_over_problems() -> None:
    # p: 1 of 1, q: 1 of 3; over samples it would be 2 of 4.
    samples = [outcome("p"), outcome("q"), outcome("q", False), outcome("q", False)]
    summary = EvaluationSummary.from_outcomes(samples)
    assert summary.accuracy == pytest.approx((1 + 1 / 3) / 2)
    assert summary.accuracy_stderr == pytest.approx(statistics.stdev([1, 1 / 3]) / math.sqrt(2))
    assert (summary.problems, summary.samples) == (2, 4)
    assert EvaluationSummary.from_outcomes(samples[::-1]) == summary


def test_standard_error_of_single_samples_is_the_binomial_one() -> None:
    summary = EvaluationSummary.from_outcomes([outcome(str(n), n < 30) for n in range(100)])
    assert summary.accuracy == pytest.approx(0.3)
    assert summary.accuracy_stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_one_problem_has_no_standard_error() -> None:
    assert EvaluationSummary.from_outcomes([outcome("p"), outcome("p", False)]).accuracy_stderr is None


def test_marker_rate_is_over_all_tokens() -> None:
    summary = EvaluationSummary.from_outcomes([outcome("p", tokens=100, waits=10), outcome("q", tokens=900)])
    assert summary.marker_rates == {"Wait": 10.0, "Check": 2.0}
    assert summary.markers_per_1000_tokens == 12.0
    assert summary.mean_tokens == 500


def test_shares() -> None:
    summary = EvaluationSummary.from_outcomes(
        [outcome("p", cut=True), outcome("q", False, answered=False), outcome("r"), outcome("s")]
    )
    assert summary.cut_share == 0.25
    assert summary.unanswered_share == 0.25


def test_nothing_to_summarise() -> None:
    with pytest.raises(ValueError, match="no outcomes"):
        EvaluationSummary.from_outcomes([])


def test_empty_responses() -> None:
    summary = EvaluationSummary.from_outcomes([SampleOutcome("p", False, False, False, 0, {"Wait": 0})])
    assert (summary.mean_tokens, summary.markers_per_1000_tokens) == (0, 0)


def test_as_dict_is_json() -> None:
    summary = EvaluationSummary.from_outcomes([outcome("p")])
    assert json.loads(json.dumps(summary.as_dict()))["accuracy"] == 1.0


def test_score_response() -> None:
    config = EvaluationConfig(markers=["Wait"])
    scored = score_response("p", r"Wait, no. \boxed{0.5}", "1/2", tokens=9, cut=False, config=config)
    assert scored == SampleOutcome("p", True, True, False, 9, {"Wait": 1})
    lost = score_response("p", r"\boxed{", "1/2", tokens=2, cut=True, config=config)
    assert (lost.correct, lost.answered, lost.cut) == (False, False, True)
    patterned = EvaluationConfig(answer_pattern=r"answer (\d+)")
    assert score_response("p", "so answer 2", "2", tokens=3, cut=False, config=patterned).correct


def test_comparison_table() -> None:
    before = EvaluationSummary.from_outcomes([outcome("p"), outcome("q", False, tokens=1300)])
    after = EvaluationSummary.from_outcomes([outcome("p", waits=2), outcome("q")])
    lines = comparison_table({"before": before, "after": after}).splitlines()
    assert lines[0].split() == ["before", "after", "change"]
    table = {line[:24].strip(): line[24:].split() for line in lines[2:]}
    assert table["accuracy"] == ["50.0", "%", "100.0", "%", "+50.0"]
    assert table["standard error"] == ["±", "50.0", "%", "±", "0.0", "%"]
    assert table["Wait"] == ["0.00", "10.00", "+10.00"]
    assert table["mean response tokens"] == ["700.0", "100.0", "-600.0"]
    assert table["samples"] == ["2", "2"]
    assert len({len(line) for line in lines if line.split()[-1] not in ("2", "%")}) == 1, "columns are aligned"


def test_table_of_one_and_of_three() -> None:
    one = EvaluationSummary.from_outcomes([outcome("p")])
    other = EvaluationSummary.from_outcomes([SampleOutcome("p", False, True, False, 10, {"Hmm": 1})])
    assert "change" not in comparison_table({"only": one})
    three = comparison_table({"a": one, "b": other, "c": one})
    assert "change" not in three
    row = next(line for line in three.splitlines() if line.startswith("  Hmm"))
    assert row.split() == ["Hmm", "-", "100.00", "-"]
