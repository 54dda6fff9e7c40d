"""Weights of response tokens by settings, and their shares in the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_popsd.distillation.config import TokensConfig
from nemo_popsd.errors import UserError
from tests.harness import run_ranks


def weights_of(settings: TokensConfig, length: int = 4, *, truncated: bool = False, right: bool | None = None):
    from nemo_popsd.training.weights import response_weights
    from tests.training.runs import trajectory

    given = trajectory(0, length)
    given = replace(given, right=right, rollout=replace(given.rollout, truncated=truncated))
    return response_weights(given, settings, lambda response: [n % 2 == 1 for n in range(len(response))])


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, [1, 1, 1, 1]),
        ({"markers": 0.25}, [1, 0.25, 1, 0.25]),
        ({"horizon": 3}, [1, 1, 1, 0]),
        ({"half_life": 2}, [1, 0.5**0.5, 0.5, 0.5**1.5]),
        ({"markers": 0.0, "horizon": 3, "half_life": 1}, [1, 0, 0.25, 0]),
    ],
)
def test_weights_of_tokens_multiply(settings: dict[str, float], tokens: list[float]) -> None:
    made = weights_of(TokensConfig(**settings))  # type: ignore[arg-type]
    assert made.tokens.tolist() == pytest.approx(tokens)
    assert made.response == 1


def test_weights_of_responses_multiply() -> None:
    settings = TokensConfig(truncated=0.5, right=3.0, wrong=0.25)
    assert weights_of(settings, right=True).response == 3
    assert weights_of(settings, right=False).response == 0.25
    assert weights_of(settings, right=False, truncated=True).response == 0.125
    assert weights_of(TokensConfig(truncated=0.5), truncated=True).response == 0.5
    assert weights_of(TokensConfig(), length=0).tokens.shape == (0,)


def _shares(rank: int, world_size: int) -> dict[str, list[list[float]]]:
    """Shares of three responses, the second one empty, and of one with weight 0; on one or two ranks."""
    import torch.distributed as dist

    from nemo_popsd.training.weights import ResponseWeights, shares

    responses = [
        ResponseWeights(1.0, torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)),
        ResponseWeights(5.0, torch.zeros(0, dtype=torch.float64)),
        ResponseWeights(3.0, torch.tensor([0.0, 2.0], dtype=torch.float64)),
        ResponseWeights(7.0, torch.zeros(2, dtype=torch.float64)),
    ]
    mine = responses if world_size == 1 else responses[rank * 3 : rank * 3 + 3]
    group, cpu = dist.group.WORLD, torch.device("cpu")
    assert group is not None
    made = {mean: [x.tolist() for x in shares(mine, mean, group, cpu)] for mean in ("sequence", "token")}
    made["none"] = [x.tolist() for x in shares(responses[3:], "sequence", group, cpu)]
    return made


def test_shares_are_a_weighted_mean_over_all_ranks() -> None:
    sequence = [[1 / 8, 1 / 16, 1 / 16], [], [0, 3 / 4], [0, 0]]  # 1 and 3 of 4, divided over the tokens of a response
    token = [[1 / 8, 1 / 16, 1 / 16], [], [0, 6 / 8], [0, 0]]  # 2 and 6 of 8
    for size in (1, 2):
        ranks = run_ranks(_shares, size)
        for mean, expected in (("sequence", sequence), ("token", token)):
            assert [x for rank in ranks for x in rank[mean]] == expected
            assert sum(map(sum, (x for rank in ranks for x in rank[mean]))) == 1
        assert all(rank["none"] == [[0, 0]] for rank in ranks)


def test_equal_weights_have_no_effect() -> None:
    """Only ratios count: the mean is divided by the sum of the weights."""
    from nemo_popsd.training.weights import ResponseWeights

    plain = [ResponseWeights(1.0, torch.ones(n, dtype=torch.float64)) for n in (3, 1)]
    scaled = [ResponseWeights(0.5, 0.25 * x.tokens) for x in plain]
    seen = run_ranks(_both, 1, plain, scaled)[0]
    assert seen[0] == seen[1] == [[1 / 6] * 3, [1 / 2]]


def _both(rank: int, world_size: int, *weights: object) -> list[list[list[float]]]:
    import torch.distributed as dist

    from nemo_popsd.training.weights import shares

    return [[x.tolist() for x in shares(w, "sequence", dist.group.WORLD, torch.device("cpu"))] for w in weights]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"right": 0.0, "wrong": 0.0}, r"tokens\.wrong=0\.0; need more than 0 if distillation\.tokens\.right is 0"),
        ({"min_target_entropy": 2.0, "max_target_entropy": 1.0}, r"max_target_entropy=1\.0; need at least .*=2\.0"),
        ({"min_student_entropy": 2.0, "max_student_entropy": 1.0}, r"max_student_entropy=1\.0"),
        ({"max_student_probability": 0.0}, r"max_student_probability=0\.0"),
        ({"half_life": -1.0}, "half_life"),
        ({"markers": float("nan")}, "markers"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokensConfig(**settings)  # type: ignore[arg-type]
