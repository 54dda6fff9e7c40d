"""The cost of a step by the planner's formulas at the measured lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.model.cost import StepCost, step_cost
from nemo_popsd.observability.metrics import CostMetrics
from nemo_popsd.planning import compute
from nemo_popsd.planning.config import PlanConfig, WorkloadConfig
from nemo_popsd.planning.plan import estimate
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case
from tests.report.runs_on_disk import step_metrics
from tests.training.runs import row

H100 = "NVIDIA H100 80GB HBM3"
ROWS = [row(number) for number in range(4)]


def config() -> PopsdConfig:
    found = PopsdConfig()
    found.student.source, found.training.prompts_per_step = "Qwen3-8B", 4
    return found


def case(response: int) -> Case:
    prompt = round(sum(len(one.contexts.student) for one in ROWS) / 4)
    reference = round(sum(len(one.contexts.reference) for one in ROWS) / 4)
    work = WorkloadConfig(prompt_tokens=prompt, reference_tokens=reference, response_tokens=response)
    return Case(config(), PlanConfig(gpus_per_node=1, workload=work), read_sizes("Qwen3-8B")[0], nodes=1, device="cpu")


def test_operations_and_seconds_are_those_of_the_plan_at_the_lengths_of_the_step() -> None:
    measured = replace(
        step_metrics(1),
        response_tokens=700.0,
        tokens_per_second=50.0,
        seconds_rollout=20.0,
        seconds_frozen=1.0,
        seconds_train=3.0,
        cost=CostMetrics(seconds_waiting=0.5),
    )
    cost = StepCost(config(), read_sizes("Qwen3-8B")[0], name=H100)(measured, ROWS).cost
    flops, plan = compute.step(case(700)), estimate(case(700))
    assert cost is not None
    assert cost.seconds_waiting == 0.5, "what was measured stays"
    assert cost.tokens_per_gpu == 50
    assert cost.tflops == pytest.approx((flops.frozen.needed + flops.training.needed) / 4 / 1e12)
    total = flops.rollout.needed + flops.frozen.needed + flops.training.needed
    assert cost.mfu == pytest.approx(total / 24 / 989e12)
    assert cost.seconds_predicted == pytest.approx(plan.seconds.total)
    assert cost.predicted_ratio == pytest.approx(24 / plan.seconds.total)


def test_twice_the_tokens_in_the_same_time_are_more_operations() -> None:
    cost = StepCost(config(), read_sizes("Qwen3-8B")[0], name=H100)
    short, long = (cost(replace(step_metrics(1), response_tokens=tokens), ROWS).cost for tokens in (500.0, 1000.0))
    assert short is not None
    assert long is not None
    assert 1.9 < long.tflops / short.tflops < 2.2  # type: ignore[operator]


def test_a_device_without_a_known_peak_has_operations_alone() -> None:
    cost = StepCost(config(), read_sizes("Qwen3-8B")[0], name="")(step_metrics(1), ROWS).cost
    assert cost is not None
    assert cost.tflops is not None
    assert (cost.mfu, cost.seconds_predicted, cost.predicted_ratio) == (None, None, None)
    a100 = StepCost(config(), read_sizes("Qwen3-8B")[0], name="NVIDIA A100-SXM4-80GB")(step_metrics(1), ROWS).cost
    assert a100 is not None
    assert a100.mfu is not None
    assert a100.seconds_predicted is None, "the plan's links are those of an H100"


def test_a_model_that_the_planner_does_not_know_and_a_rank_without_rows_change_nothing() -> None:
    unknown = config()
    unknown.student.source = "nowhere/at-all"
    assert step_cost(unknown)(step_metrics(1), ROWS) == step_metrics(1)
    assert StepCost(config(), read_sizes("Qwen3-8B")[0], name=H100)(step_metrics(1), []) == step_metrics(1)
