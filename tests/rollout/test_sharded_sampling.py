"""Sampling from logits that are sharded over ranks: the same tokens as from one shard, by the float64 distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_popsd.parallel.vocabulary import VocabShard
from nemo_popsd.rollout.engine import SamplingParams
from nemo_popsd.rollout.sampling import sample_tokens, uniforms
from tests.harness import run_ranks
from tests.rollout.test_sampling import params, reference_distribution

pytestmark = pytest.mark.slow

SAMPLES = 5_000
SIZES = {"padded": 203, "second shard empty": 100, "full": 256}
"""Sizes of the vocabulary without padding. With two shards of 128 columns, 75, none or all of the second are not
padding."""
COLUMNS = 256
SETTINGS = {
    "greedy": params(temperature=0.0),
    "none": params(),
    "tempered": params(temperature=1.7),
    "top-k": params(temperature=1.1, top_k=20),
    "recipe": params(temperature=1.1, top_p=0.95, top_k=20),
    "top-k beyond a shard": params(temperature=2.0, top_k=140, top_p=0.9),
    "top-p": params(temperature=1.3, top_p=0.9),
    "wide top-p": params(temperature=3.0, top_p=0.999),
    "narrow top-p": params(top_p=1e-6),
}
COLLECTIVES = {"greedy": (1, 0), "none": (1, 1), "tempered": (1, 1), "top-p": (6, 1)}
"""All-gathers and all-reduces, as in the docstring of `sample_tokens`; with top-k as with greedy."""


def logits(size: int, *, ties: bool) -> torch.Tensor:
    """[COLUMNS]; the padding has by far the largest values. With ties, the values are multiples of 0.5."""
    values = 2 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(size))
    values = (values * 2).round() / 2 if ties else values
    values[size:] = 1000.0
    return values


def observe(rank: int, world_size: int) -> dict[str, Any]:
    """Tokens and log-probabilities over a grid of uniform numbers and by seeds, and the collectives of each."""
    counts = {"all_gather_into_tensor": 0, "all_reduce": 0}
    real = {name: getattr(dist, name) for name in counts}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real[name](*args, **kwargs)

        return call

    for name in counts:
        setattr(dist, name, counting(name))
    share = COLUMNS // world_size
    grid = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    seeded = uniforms(list(range(SAMPLES)), 1).squeeze(1)
    seen: dict[str, Any] = {}
    for kind, size in SIZES.items():
        shard = VocabShard(size, share, dist.group.WORLD)
        for ties in (False, True):
            own = logits(size, ties=ties)[rank * share : (rank + 1) * share].expand(SAMPLES, -1)
            for name, sampling in SETTINGS.items():
                for key in counts:
                    counts[key] = 0
                seen[kind, ties, name] = sample_tokens(own, sampling, grid, shard)
                seen["collectives", name] = tuple(counts.values())
                if not ties:
                    seen[kind, "seeded", name] = sample_tokens(own, sampling, seeded, shard)[0]
    for name, function in real.items():
        setattr(dist, name, function)
    return seen


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(observe, 1)[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(observe, 2)


def dense(size: int, sampling: SamplingParams, *, ties: bool) -> torch.Tensor:
    values = logits(size, ties=ties)[:size]
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(values.argmax(), size).double()
    return reference_distribution(values, sampling)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", SIZES)
def test_a_grid_of_uniform_numbers_gives_the_dense_distribution(
    one: dict[str, Any], two: list[dict[str, Any]], kind: str, name: str
) -> None:
    """Share of each token to within one grid step at each border of its intervals; and nothing outside its support."""
    for ties in (False, True):
        expected = dense(SIZES[kind], SETTINGS[name], ties=ties)
        for seen in (one, *two):
            tokens, _ = seen[kind, ties, name]
            sampled = torch.bincount(tokens, minlength=SIZES[kind]).double() / SAMPLES
            assert len(sampled) == SIZES[kind], "padding was sampled"
            assert (sampled[expected == 0] == 0).all()
            torch.testing.assert_close(sampled, expected, atol=2.5 / SAMPLES, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", SIZES)
def test_two_shards_sample_the_same_as_one(
    one: dict[str, Any], two: list[dict[str, Any]], kind: str, name: str
) -> None:
    for ties in (False, True):
        tokens, log_probs = one[kind, ties, name]
        for seen in two:
            other, others = seen[kind, ties, name]
            # Sums over two shards are rounded differently: a number of the grid may lie that close to a border.
            same = other == tokens
            assert int((~same).sum()) <= 1
            torch.testing.assert_close(others[same], log_probs[same], atol=2e-6, rtol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(two[0][kind, ties, name], two[1][kind, ties, name], strict=True))


@pytest.mark.parametrize("kind", SIZES)
def test_log_probabilities_are_the_models_own(two: list[dict[str, Any]], kind: str) -> None:
    for ties in (False, True):
        expected = torch.log_softmax(logits(SIZES[kind], ties=ties)[: SIZES[kind]].double(), -1)
        for name in SETTINGS:
            tokens, log_probs = two[0][kind, ties, name]
            torch.testing.assert_close(log_probs.double(), expected[tokens], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("greedy", "narrow top-p")])
def test_seeded_tokens_pass_a_chi_square_test(one: dict[str, Any], two: list[dict[str, Any]], name: str) -> None:
    for kind, size in SIZES.items():
        expected = SAMPLES * dense(size, SETTINGS[name], ties=False)
        for seen in (one, two[0]):
            counts = torch.bincount(seen[kind, "seeded", name], minlength=size).double()
            order = expected.argsort(descending=True)
            order = order[expected[order] > 0]
            often = order[expected[order] >= 5]
            rare = order[expected[order] < 5]  # together in one bin
            pairs = [(counts[often], expected[often])]
            if expected[rare].sum() >= 5:
                pairs.append((counts[rare].sum()[None], expected[rare].sum()[None]))
            statistic = sum(float(((c - e) ** 2 / e).sum()) for c, e in pairs)
            freedom = sum(len(e) for _, e in pairs) - 1
            # Wilson and Hilferty's approximation: exceeded about once in 10,000 by chance; the seeds are fixed.
            limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
            assert statistic < limit, (kind, statistic, limit)


def test_number_of_collectives_is_as_documented(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for name in SETTINGS:
        kind = "greedy" if "top-k" in name or name == "recipe" else "top-p" if "top-p" in name else name
        assert one["collectives", name] == (0, 0)
        assert all(seen["collectives", name] == COLLECTIVES[kind] for seen in two)
