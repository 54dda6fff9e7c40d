"""The student's log-probabilities of the response tokens: exact with any sharding, and without effect on the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_popsd.distillation import Target
from tests.distillation.calls import DIVERGENCES, VOCABULARIES, diagnosed, hidden_loss
from tests.distillation.dense import log_probs, make_problem
from tests.harness import run_ranks

TARGETS = {"temperature 1": Target.purified(), "temperature 1.3": Target.purified(0.7, 2.0, 1.3)}


def largest_errors(rank: int, world_size: int) -> dict[str, float]:
    """By case: error against the dense log-probabilities. Asserts that loss and gradients remain bit-equal."""
    import torch.distributed as dist

    group = dist.group.WORLD if world_size > 1 else None
    errors = {}
    for vocab, padded in VOCABULARIES:
        whole = make_problem(vocab=vocab, padded=padded)
        problem = whole.shard(rank, world_size)
        ids = torch.arange(len(whole.student)) * 5 % vocab
        expected = log_probs(whole.student, whole.student_weight, vocab, 1.0).gather(1, ids[:, None]).squeeze(1)
        for target_name, target in TARGETS.items():
            for divergence_name, divergence in DIVERGENCES.items():
                for settings in ({}, {"diagnosed": diagnosed(problem, [1, 4])}):
                    plain = hidden_loss(problem, target, divergence, group, **settings)
                    result = hidden_loss(problem, target, divergence, group, response_ids=ids, **settings)
                    for run in (plain, result):
                        run[0].total.backward()
                    assert torch.equal(result[0].per_token, plain[0].per_token)
                    assert torch.equal(result[1].grad, plain[1].grad)
                    assert torch.equal(result[2].grad, plain[2].grad)
                    assert plain[0].log_probs is None
                    if settings:
                        assert torch.equal(result[0].decomposition.values, plain[0].decomposition.values)
                    case = f"{target_name}, {divergence_name}, {vocab}, {sorted(settings)}"
                    errors[case] = float((result[0].log_probs - expected).abs().max())
    return errors


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_they_match_the_dense_softmax_and_the_loss_stays_bit_equal(ranks: int) -> None:
    for errors in run_ranks(largest_errors, ranks):
        assert len(errors) == 12 * len(DIVERGENCES)
        assert max(errors.values()) < 1e-12, max(errors.items(), key=lambda case: case[1])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="response_ids has shape"):
        hidden_loss(make_problem(), Target.purified(), DIVERGENCES["jsd"], response_ids=torch.arange(3))


def test_no_tokens_have_no_log_probabilities() -> None:
    settings: dict[str, Any] = {"response_ids": torch.empty(0, dtype=torch.long)}
    result, _, _ = hidden_loss(make_problem(tokens=0), Target.purified(), DIVERGENCES["jsd"], **settings)
    assert result.log_probs.shape == (0,)
