"""Alarms for collapse: time, direction, false alarms, and behaviour after a restart."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.training.config import DRIFT_ACTIONS, DRIFT_QUANTITIES, DriftConfig
from nemo_popsd.training.drift import QUANTITIES, Alarm, DriftWatch
from nemo_popsd.training.repetition import repeated_tokens

RECORDED = json.loads((Path(__file__).parent / "recorded_runs.json").read_text())
"""Metrics of runs of the testbed (experiments/conf.yaml), by name and by quantity, one value per step."""


def alarms(run: dict[str, list[float]], settings: DriftConfig | None = None) -> dict[str, Alarm]:
    watch = DriftWatch(settings or DriftConfig())
    found = {}
    for index in range(len(next(iter(run.values())))):
        metrics = {QUANTITIES[name].metric: values[index] for name, values in run.items()}
        found.update({alarm.name: alarm for alarm in watch.update(index + 1, metrics)})
    return found


def test_the_quantities_are_those_of_the_settings() -> None:
    assert tuple(QUANTITIES) == DRIFT_QUANTITIES
    assert {DriftConfig().action(name) for name in QUANTITIES} <= set(DRIFT_ACTIONS)
    with pytest.raises(UserError, match=r"guard\.drift\.marker_rate='loud'; need one of off, warn, keep, stop"):
        DriftConfig(marker_rate="loud")


def recorded(method: str, rate: str) -> list[dict[str, list[float]]]:
    return [run for name, run in RECORDED.items() if name.startswith(f"{method}, {rate}, ")]


QUIET = [run for rate in ("1e-5", "3e-5", "1e-4", "3e-4") for run in recorded("Purified", rate)]
QUIET += recorded("OPSD", "3e-6") + recorded("OPSD", "1e-5")
"""Runs that change little: Purified up to its highest useful rate, and OPSD at rates that cost at most 1.5 points."""


def first_alarms(runs: list[dict[str, list[float]]], settings: DriftConfig | None = None) -> list[int | None]:
    return [min((alarm.step for alarm in alarms(run, settings).values()), default=None) for run in runs]


def test_runs_that_change_little_are_quiet() -> None:
    assert len(QUIET) >= 24
    assert set(first_alarms(QUIET)) == {None}
    assert set(first_alarms(recorded("Purified", "1e-3"))) == {None}


def test_the_delays_are_those_of_the_documents() -> None:
    """docs/guards.md has these figures."""
    assert first_alarms(recorded("OPSD", "1e-4")) == [None, 24, None]
    assert first_alarms(recorded("OPSD", "3e-4")) == [15, 15, 17]
    assert first_alarms(recorded("OPSD", "1e-3")) == [14, 13, 14]
    assert first_alarms(recorded("live PMI", "1e-3")) == [10, 9, 10]


def test_a_lower_threshold_detects_small_changes() -> None:
    """It also raises false alarms in long runs; see docs/guards.md."""
    sensitive = DriftConfig(threshold=5)
    assert set(first_alarms(QUIET, sensitive)) == {None}
    assert None not in first_alarms(recorded("OPSD", "1e-4"), sensitive)[1:]


def test_an_accuracy_is_compared_with_the_first_evaluation_by_its_standard_error() -> None:
    def found(*values: float, error: float = 0.02) -> list[Alarm]:
        watch = DriftWatch(DriftConfig())
        steps = [{"validation/accuracy": value, "validation/accuracy_stderr": error} for value in values]
        return [alarm for step, metrics in enumerate(steps) for alarm in watch.update(50 * step, metrics)]

    (alarm,) = found(0.6, 0.3, 0.3)
    assert (alarm.step, alarm.rose, alarm.onset) == (50, False, 0)
    assert found(0.6, 0.3, error=0.2) == [], "few problems"
    assert found(0.6, *[0.6 + change for change in (-0.04, 0.04, -0.05, 0.05)] * 20) == []
    assert found(0.6, *[0.48] * 10)[0].step < 500, "a smaller change is detected because it persists"


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("OPSD, 3e-4")])
def test_opsd_at_the_rate_of_purified_shortens_and_is_detected(name: str) -> None:
    found = alarms(RECORDED[name])
    assert not found["response_tokens"].rose
    assert not found["marker_rate"].rose
    assert found["response_tokens"].step <= 24
    assert found["response_tokens"].onset < found["response_tokens"].step


def test_a_run_that_keeps_growing_is_detected_at_its_beginning() -> None:
    """PMI on the live student at ten times its rate: from step 10 on responses are truncated."""
    found = alarms(RECORDED["live PMI, 1e-3, seed 1"])
    assert found["response_tokens"].rose
    assert found["cut_share"].rose
    assert found["student_entropy"].rose
    assert {found[name].step for name in ("cut_share", "student_entropy")} == {10}
    assert found["cut_share"].onset == 9


@pytest.mark.slow
def test_false_alarms_of_runs_that_do_not_change_are_rare() -> None:
    """200 steps with the noise of the testbed: 6 % of the response length and 4 % of the marker rate."""
    draw = random.Random(0)
    count, spread = 400, {"response_tokens": (100.0, 6.0), "marker_rate": (51.0, 2.0), "student_entropy": (0.11, 0.006)}
    wrong = 0
    for _ in range(count):
        run = {name: [draw.gauss(mean, sigma) for _ in range(200)] for name, (mean, sigma) in spread.items()}
        wrong += bool(alarms(run))
    assert wrong / count < 0.02


def test_the_delay_is_short_for_large_changes() -> None:
    draw = random.Random(1)
    for factor, most in ((0.5, 4), (0.7, 8), (1.5, 4)):
        delays = []
        for _ in range(50):
            run = [draw.gauss(100, 6) for _ in range(20)] + [draw.gauss(100 * factor, 6) for _ in range(40)]
            found = alarms({"response_tokens": run})["response_tokens"]
            assert found.rose == (factor > 1)
            delays.append(found.step - 20)
        assert sorted(delays)[len(delays) // 2] <= most, factor


def test_a_lasting_change_within_the_slack_raises_no_alarm() -> None:
    run = [100.0, 101.0] * 5 + [104.0] * 500
    assert alarms({"response_tokens": run}) == {}
    assert alarms({"response_tokens": run}, DriftConfig(slack=0.01))["response_tokens"].rose


def test_non_finite_and_absent_values_are_ignored() -> None:
    run = {"response_tokens": [100.0, math.nan] * 10 + [50.0] * 10}
    assert alarms(run)["response_tokens"].baseline == 100
    watch = DriftWatch(DriftConfig())
    assert watch.update(1, {}) == []


def test_a_resumed_run_continues_its_sums_and_does_not_repeat_an_alarm() -> None:
    values = RECORDED["live PMI, 1e-3, seed 1"]["response_tokens"]
    expected = alarms({"response_tokens": values})["response_tokens"]
    for cut in (4, 10, expected.step):
        watch = DriftWatch(DriftConfig())
        before = [{"train/response_tokens": value} for value in values[:cut]]
        if cut == expected.step:
            before[-1] |= expected.entry
        for step, metrics in enumerate(before, start=1):
            watch.update(step, metrics)
        later = [
            alarm
            for step, value in enumerate(values[cut:], start=cut + 1)
            for alarm in watch.update(step, {"train/response_tokens": value})
        ]
        assert later == ([] if cut == expected.step else [expected])


def test_a_change_is_suspected_before_its_alarm_and_not_before_it_begins() -> None:
    watch = DriftWatch(DriftConfig())
    suspected = []
    for step, value in enumerate([99.0, 101.0] * 5 + [92.0] * 3, start=1):
        assert watch.update(step, {"train/response_tokens": value}) == []
        suspected.append(watch.suspected("response_tokens"))
    assert suspected == [[]] * 10 + [[10]] * 3


def test_off_watches_nothing() -> None:
    assert alarms({"response_tokens": [100.0] * 10 + [1.0] * 50}, DriftConfig(response_tokens="off")) == {}


def test_repeated_tokens() -> None:
    assert repeated_tokens(list(range(100))) == 0
    assert repeated_tokens([1, 2, 3] * 20) == 60 - 8 + 1 - 3, "all but the first three passages"
    passage = list(range(10))
    assert repeated_tokens([*passage, 77, *passage]) == 3
    assert repeated_tokens([]) == 0
