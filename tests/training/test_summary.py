from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.harness import run_ranks

LENGTHS = (5, 1, 3, 2)


def summarize(rank: int, world_size: int) -> Any:
    """Metrics of four responses, on one rank or two on each of two ranks."""
    from nemo_popsd.megatron.microbatches import TokenCount
    from nemo_popsd.observability.stopwatch import Stopwatch
    from nemo_popsd.training.siblings import SiblingSums
    from nemo_popsd.training.summary import summarize_step
    from tests.training.runs import trajectory

    mine = [0, 1, 2, 3] if world_size == 1 else [[0], [1, 2, 3]][rank]
    watch = Stopwatch()
    for phase in ("rollout", "frozen", "train"):
        with watch.phase(phase):
            pass
    return summarize_step(
        [report(number) for number in mine],
        [aged(trajectory(number, LENGTHS[number]), number) for number in mine],
        weights_version=3,
        markers=sum(number + 1 for number in mine),
        grad_norm=2.5,
        learning_rate=0.125,
        stopwatch=watch,
        seconds_waiting=1.5 - rank,
        seconds_weights=0.25 * rank,
        computed=TokenCount(30, 10) if rank == 0 else TokenCount(60, 0),
        siblings=SiblingSums(2, 1.5, 2, 1) if rank == 0 else SiblingSums(1, 0.75, 1, 0),
        frozen=TokenCount(20, 5, saved=12) if rank == 0 else TokenCount(25, 0, saved=3),
    )


def aged(trajectory: Any, number: int) -> Any:
    """Row 0 is one step old, part of row 2 two steps, the others 0; row 3 has no answer, and row 1 is right."""
    segments = ((1, 1), (2, 1), (3, 1)) if number == 2 else ()
    return replace(
        trajectory,
        right=None if number == 3 else number == 1,
        rollout=replace(trajectory.rollout, weights_version=2 if number == 0 else 3, segments=segments),
    )


def report(number: int) -> Any:
    """Report of one micro-batch; the decomposition of row 1 has no direction, that of row 2 was not measured."""
    from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS, StatisticValues
    from nemo_popsd.training.objective import LossReport

    tokens = torch.arange(LENGTHS[number]) + 10.0 * number
    signal = torch.stack([tokens + 1, tokens + 2, tokens + 3]) if number != 1 else torch.full((3, 1), torch.nan)
    decomposition = StatisticValues(SIGNAL_STATISTICS, signal)
    return LossReport(
        rows=[0],
        response_lengths=[LENGTHS[number]],
        loss=torch.tensor(0.25 * (number + 1)),
        counted=torch.tensor(min(LENGTHS[number], 2)),
        per_token=tokens,
        statistics=StatisticValues(TOKEN_STATISTICS, torch.stack([(i + 1) * tokens for i in range(4)])),
        decomposition=None if number == 2 else decomposition,
        log_probs=-tokens,
    )


def test_means_are_over_the_global_batch_on_any_number_of_ranks() -> None:
    tokens = torch.cat([torch.arange(length) + 10.0 * number for number, length in enumerate(LENGTHS)])
    diagnosed = torch.cat([torch.arange(LENGTHS[number]) + 10.0 * number for number in (0, 3)])
    for world_size, metrics in [(size, metrics) for size in (1, 2) for metrics in run_ranks(summarize, size)]:
        assert metrics.loss == pytest.approx(0.25 * 10)
        assert metrics.statistics["forward_kl"] == pytest.approx(float(tokens.mean()))
        assert metrics.statistics["reverse_kl"] == pytest.approx(2 * float(tokens.mean()))
        assert metrics.statistics["student_entropy"] == pytest.approx(3 * float(tokens.mean()))
        assert metrics.statistics["target_entropy"] == pytest.approx(4 * float(tokens.mean()))
        assert metrics.statistics["norm_ratio"] == pytest.approx(float(diagnosed.mean()) + 1)
        assert metrics.statistics["cosine_question"] == pytest.approx(float(diagnosed.mean()) + 2)
        assert metrics.statistics["cosine_reference"] == pytest.approx(float(diagnosed.mean()) + 3)
        assert metrics.response_tokens == 11 / 4
        assert metrics.cut_share == 0
        assert metrics.weighted_share == (2 + 1 + 2 + 2) / 11
        assert metrics.accuracy == 1 / 3
        assert metrics.rollout_age == pytest.approx((5 * 1 + 2 + 1) / 11)
        assert metrics.rollout_age_max == 2
        assert metrics.padding_share == pytest.approx(0.25 if world_size == 1 else 0.1)
        saved = (12, 20) if world_size == 1 else (15, 45)
        assert (metrics.frozen_tokens_saved, metrics.frozen_tokens) == saved
        assert metrics.response_diversity == 0.75
        solved = (1, 2) if world_size == 1 else (1, 3)
        assert metrics.accuracy_at_n == solved[0] / solved[1]
        assert metrics.frozen_saved_share == pytest.approx(saved[0] / sum(saved))
        assert metrics.marker_rate == pytest.approx(1000 * 10 / 11)
        assert (metrics.grad_norm, metrics.learning_rate) == (2.5, 0.125)
        assert metrics.cost.seconds_waiting == 1.5, "of the rank that waited longest"
        assert metrics.cost.seconds_weights == (None if world_size == 1 else 0.25)
        assert metrics.cost.memory_train is None, "there is no device memory to measure"
        assert all(math.isfinite(value) for value in metrics.as_dict().values())


def undirected(rank: int, world_size: int) -> Any:
    """A step whose only diagnosed token has no direction."""
    from nemo_popsd.megatron.microbatches import TokenCount
    from nemo_popsd.observability.stopwatch import Stopwatch
    from nemo_popsd.training.summary import summarize_step
    from tests.training.runs import trajectory

    watch = Stopwatch()
    for phase in ("rollout", "frozen", "train"):
        with watch.phase(phase):
            pass
    return summarize_step(
        [report(1)],
        [trajectory(1, 1)],
        weights_version=0,
        markers=0,
        grad_norm=1.0,
        learning_rate=1.0,
        stopwatch=watch,
        computed=TokenCount(30, 10) if rank == 0 else TokenCount(60, 0),
    )


def test_a_decomposition_without_any_direction_is_omitted() -> None:
    (metrics,) = run_ranks(undirected, 1)
    assert metrics.statistics["norm_ratio"] is None
    assert (metrics.response_diversity, metrics.accuracy, metrics.accuracy_at_n) == (None, None, None)
    assert "train/accuracy" not in metrics.as_dict(), "no row has an answer"
    assert not any("cosine" in name or "norm_ratio" in name for name in metrics.as_dict())
