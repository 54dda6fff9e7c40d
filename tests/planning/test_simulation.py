"""Simulated steps and failures: compared with formulas where they exist, and with expected trends."""

from __future__ import annotations

import importlib.util

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.planning.command import plan_text
from nemo_popsd.planning.config import PlanConfig, SimulationConfig, WorkloadConfig
from nemo_popsd.planning.plan import estimate
from tests.planning.cases import _RECIPE, case

pytest.importorskip("simpy")

from nemo_popsd.planning.failures import Rates, daly, expected_goodput, intervals, replay, simulated_goodput, young
from nemo_popsd.planning.simulation import SimulatedStep, simulate


def simulated(*settings: str, nodes: int = 2, per_node: int = 32, **simulation: float) -> SimulatedStep:
    work = WorkloadConfig(response_tokens=512, prompts_per_node=per_node)
    plan = PlanConfig(workload=work, simulation=SimulationConfig(**{"steps": 3, **simulation}))  # type: ignore[arg-type]
    return simulate(estimate(case("Qwen3-8B", *settings, nodes=nodes, plan=plan)))


def test_without_spread_a_step_takes_what_is_planned() -> None:
    work = WorkloadConfig(response_tokens=512)
    run = case("Qwen3-8B", nodes=2, plan=PlanConfig(workload=work, simulation=SimulationConfig(length_spread=0)))
    planned, step = estimate(run), simulate(estimate(run))
    assert (step.tail, step.stragglers, step.hidden) == (0, 0, 0)
    assert step.total == pytest.approx(planned.seconds.total, rel=1e-3)
    assert step.decoding == pytest.approx(planned.seconds.rollout.total)


def test_the_longest_response_makes_a_tail() -> None:
    none, some = simulated(length_spread=0), simulated(length_spread=0.5)
    assert none.tail == 0 < some.tail
    assert some.total == pytest.approx(sum(vars(some).values()))


def test_a_slow_node_slows_all() -> None:
    alike, slow = simulated(), simulated(slow_nodes=1, slowdown=2.0)
    assert alike.stragglers == 0
    assert slow.stragglers == pytest.approx(alike.computing / 2, rel=1e-6), "half of the replicas take twice as long"
    assert slow.total > alike.total + slow.stragglers


def test_overlap_hides_the_shorter_of_rollouts_and_training() -> None:
    apart = simulated(length_spread=0)
    work = WorkloadConfig(response_tokens=512, prompts_per_node=32)
    plan = PlanConfig(workload=work, simulation=SimulationConfig(length_spread=0, steps=40))
    run = case("Qwen3-8B", nodes=2, plan=plan).replace({"rollout.overlap": True, "rollout.vllm.launcher": ["ssh"]})
    together = simulate(estimate(run))
    shorter = min(apart.decoding, apart.computing + apart.reduction)
    assert -together.hidden == pytest.approx(shorter, rel=0.05), "all but the first step's"


RATES = Rates(step=20.0, save=60.0, requeue=300.0, between_failures=20_000.0)


def test_goodput_is_that_of_the_formula() -> None:
    for steps in (10, 50, 200):
        expected = expected_goodput(RATES, steps)
        assert simulated_goodput(RATES, steps, seed=3) == pytest.approx(expected, abs=0.03)
    assert expected_goodput(RATES, 1) < 20 / 80
    assert simulated_goodput(Rates(20.0, 60.0, 300.0, 1e12), 50, seed=3) is None


@pytest.mark.parametrize(
    ("waits", "lasting", "repeated"),
    [
        ([75.0], 0, 3),  # in the fourth step
        ([155.0], 0, 5),  # while the checkpoint is written
        ([165.0], 5, 0),  # in the first step after it
        ([75.0, 299.0, 299.0], 0, 3),  # and twice before training continues
        ([75.0, 300.0 + 160.0 + 45.0], 5, 3 + 2),
    ],
)
def test_a_failed_job_repeats_the_steps_since_its_last_complete_checkpoint(
    waits: list[float], lasting: int, repeated: int
) -> None:
    job = replay(RATES, 5, waits)
    assert (job.lasting, job.repeated, job.seconds) == (lasting, repeated, sum(waits))


def test_the_best_interval_is_dalys() -> None:
    best = max(range(1, 400), key=lambda steps: expected_goodput(RATES, steps))
    assert best == pytest.approx(daly(RATES) / RATES.step, rel=0.03)
    assert daly(RATES) < young(RATES) < 1.1 * daly(RATES)
    assert daly(Rates(1.0, 100.0, 0.0, 50.0)) == 50.0


def test_intervals_have_that_of_the_run() -> None:
    found = intervals(estimate(case("Qwen3-8B", "training.checkpoint_every=7", nodes=4)))
    assert 7 in [interval.steps for interval in found]
    assert [interval.steps for interval in found] == sorted({interval.steps for interval in found})


def test_both_tables_are_printed() -> None:
    words = ["student.source=Qwen3-8B", "nodes=1,4", "workload.prompts_per_node=32", "workload.response_tokens=512"]
    text = plan_text(_RECIPE, words, simulated=True)
    assert "| 4 | DP32 distributed | 128 |" in text
    assert "linear to 90% on" in text
    assert "| rollout.overlap=true, dedicated servers |" in text
    text = plan_text(_RECIPE, [*words, "simulation.node_mtbf_hours=100"], failures=True)
    assert "4 nodes: a failure every 25.0 h" in text
    assert "training.checkpoint_every=" in text


def test_without_simpy_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nemo_popsd\[simulate\]"):
        plan_text(_RECIPE, ["student.source=Qwen3-8B"], failures=True)
