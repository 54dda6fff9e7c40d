"""An engine that generates with other weights or prompts than the trainer assumes is detected at its first step."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.errors import UserError
from nemo_popsd.training.config import GuardConfig
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]
WORDS = [
    "output=unused",
    "training.prompts_per_step=6",
    "training.self_check=false",
    "rollout.save=false",
    "rollout.max_response_tokens=64",
]
LORA = ["student.adaptation=lora", "student.lora.rank=8", "optimizer.lr=1e-3"]
FULL = ["student.adaptation=full", "optimizer.lr=1e-4"]
BF16 = [*FULL, "student.precision=bf16"]


def observe(rank: int, world_size: int, words: list[str], parallel: list[str]) -> dict[str, Any]:
    """Two correct steps on the embedded model, then one step with each faulty engine; returns metrics or the error."""
    from nemo_popsd.config.loading import load_config
    from nemo_popsd.data.tokenizer import load_tokenizer, read_generation_config, stop_token_ids
    from nemo_popsd.embedded.names import asset
    from nemo_popsd.model.data import read_training_data
    from nemo_popsd.model.training import build_step
    from nemo_popsd.parallel.signals import StopSignals
    from nemo_popsd.rollout.engine import SamplingParams
    from tests.training.faulty_engines import FaultyEngine, garbage, trained_weights
    from tests.training.runs import start

    model = asset("nemo_popsd:tiny_reasoner")
    config = load_config(str(ROOT / "conf" / "tiny.yaml"), [*WORDS, *words, *parallel])
    tokenizer = load_tokenizer(model, setting="student.source")
    run = start(model, config)
    data = read_training_data(
        config, config.data.train, tokenizer, vocab_size=run.student.vocab_size, completed_steps=0
    )
    stops = frozenset(stop_token_ids(tokenizer, read_generation_config(model)))
    section = config.rollout
    sampling = SamplingParams(section.temperature, section.top_p, section.top_k, section.max_response_tokens, stops)

    def one_step(engine: Any, number: int, update: Any) -> Any:
        step = build_step(
            config, run.student, engine, sampling, tokenizer, data, check_lock=lambda: None, stop=StopSignals()
        )
        try:
            return step(number, data.rows().of_step(number), run.optimizer, update).mismatch
        except UserError as error:
            return error

    honest = run.engine()
    seen: dict[str, Any] = {"first": trained_weights(run.student)}
    earlier = [trained_weights(run.student)]
    for number in (1, 2):
        seen[f"honest {number}"] = one_step(honest, number, run.update)
        earlier.append(trained_weights(run.student))
    faults: dict[str, dict[str, Any]] = {
        "first weights": {"weights": earlier[0]},
        "weights of the step before": {"weights": earlier[1]},
        "garbage": {"weights": garbage(run.student)},
        "template without the assistant's turn": {"prompt": lambda prompt: list(prompt)[:-3]},
        "template with a second first token": {"prompt": lambda prompt: [prompt[0], *prompt]},
    }
    for name, fault in faults.items():
        seen[name] = one_step(FaultyEngine(honest, run.student, **fault), 3, lambda: None)
    seen["last"] = trained_weights(run.student)
    seen["updated"] = earlier[-1]
    return seen


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "full")])
def exact(request: pytest.FixtureRequest) -> dict[str, Any]:
    (seen,) = run_ranks(observe, 1, {"lora": LORA, "full": FULL}[request.param], [])
    return seen


def test_correct_steps_agree_up_to_rounding(exact: dict[str, Any]) -> None:
    for number in (1, 2):
        measured = exact[f"honest {number}"]
        assert 0 < measured.max < 1e-4, "the two must be computed independently"
        assert measured.kl < 1e-10
        assert measured.start_kl < 1e-10
        assert measured.mean_ratio == pytest.approx(1, abs=1e-5)
        assert measured.share == 0


FAULTS = (
    "first weights",
    "weights of the step before",
    "garbage",
    "template without the assistant's turn",
    "template with a second first token",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_ends_the_run_before_the_weights_change(exact: dict[str, Any], fault: str) -> None:
    error = exact[fault]
    assert isinstance(error, UserError), error
    assert "rollouts of step 3: got tokens whose log-probability in the engine is not that of the trainer" in str(error)
    assert "guard.mismatch_stop" in str(error)
    causes = [line.split(":")[0] for line in error.advice]
    assert causes == ["1. template", "2. weights version", "3. adapters", "4. dtype", "5. temperature"]
    assert all(torch.equal(a, b) for a, b in zip(exact["last"], exact["updated"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(exact["last"], exact["first"], strict=True))


@pytest.mark.slow
def test_large_faults_are_detected_despite_bf16_rounding() -> None:
    (seen,) = run_ranks(observe, 1, BF16, [])
    for number in (1, 2):
        assert 1e-8 < seen[f"honest {number}"].kl < 1e-3
    for fault in ("garbage", "template without the assistant's turn"):
        assert isinstance(seen[fault], UserError), fault


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.context=2"], []], ids=["tp2", "cp2", "dp2"])
def test_the_measurement_covers_all_ranks_and_ends_them_together(layout: list[str]) -> None:
    ranks = run_ranks(observe, 2, LORA, layout)
    for seen in ranks:
        assert seen["honest 2"] == ranks[0]["honest 2"]
        assert seen["honest 2"].kl < 1e-10
        assert str(seen["first weights"]) == str(ranks[0]["first weights"])
        assert isinstance(seen["first weights"], UserError)


def bounded(rank: int, world_size: int, engine_log_probs: list[float], settings: dict[str, Any]) -> Any:
    """The guard on one response whose tokens all have log-probability -1 under the trainer."""
    from nemo_popsd.megatron.response_routing import UNSPLIT
    from nemo_popsd.rollout.engine import Rollout
    from nemo_popsd.training.mismatch import MismatchBounds, MismatchGuard
    from nemo_popsd.training.trajectory import Trajectory
    from tests.training.runs import row
    from tests.training.test_summary import report

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_popsd.training.mismatch").addHandler(handler)
    count = len(engine_log_probs)
    one = report(0)
    object.__setattr__(one, "log_probs", torch.full((count,), -1.0))
    trajectory = Trajectory(row(0), Rollout([1] * count, engine_log_probs, truncated=False, weights_version=0))
    guard = GuardConfig(**settings)
    watch = MismatchGuard(guard, MismatchBounds.of(guard, exact=False), UNSPLIT)
    try:
        return [watch(step, [one], [trajectory]) for step in (1, 2)][-1], lines
    except UserError as error:
        return error, lines


def test_the_metrics_match_their_definitions() -> None:
    engine = [-1.0] * 40 + [-3.0, -1.5]
    ((measured, lines),) = run_ranks(bounded, 1, engine, {"mismatch": "off"})
    terms = [0.0] * 40 + [math.exp(2) - 1 - 2, math.exp(0.5) - 1 - 0.5]
    assert measured.kl == pytest.approx(sum(terms) / 42)
    assert measured.start_kl == 0
    assert measured.mean_ratio == pytest.approx((40 + math.exp(2) + math.exp(0.5)) / 42)
    assert measured.max == pytest.approx(2)
    assert measured.share == pytest.approx(1 / 42)
    assert lines == []


def test_between_the_bounds_it_warns_once() -> None:
    ((measured, lines),) = run_ranks(bounded, 1, [-1.25] * 3, {})
    assert 0.02 < measured.kl < 0.1
    (line,) = lines
    assert line.startswith("step 1: the engine's log-probabilities")
    assert line.index("template:") < line.index("weights version:") < line.index("temperature:")


def test_nan_ends_the_run_unless_the_guard_only_warns() -> None:
    ((error, _),) = run_ranks(bounded, 1, [-1.0, math.nan], {})
    assert isinstance(error, UserError)
    ((measured, lines),) = run_ranks(bounded, 1, [-1.0, math.nan], {"mismatch": "warn"})
    assert measured.kl > 1e6
    assert len(lines) == 1


def test_a_warning_above_the_stop_is_refused() -> None:
    with pytest.raises(UserError, match=r"guard\.mismatch_warn=0\.2 with guard\.mismatch_stop=0\.1"):
        GuardConfig(mismatch_warn=0.2, mismatch_stop=0.1)
