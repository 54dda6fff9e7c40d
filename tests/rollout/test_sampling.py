"""Sampling on one shard against a reference that filters token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_popsd.parallel.vocabulary import VocabShard
from nemo_popsd.rollout.engine import SamplingParams
from nemo_popsd.rollout.sampling import sample_tokens, uniforms


def one_shard(logits: torch.Tensor) -> VocabShard:
    return VocabShard(logits.shape[-1], logits.shape[-1])


def sample(logits: torch.Tensor, sampling: SamplingParams, uniform: torch.Tensor) -> torch.Tensor:
    return sample_tokens(logits, sampling, uniform, one_shard(logits))[0]


def params(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_response_tokens=1, stop_token_ids=frozenset())


def reference_distribution(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The filtered distribution over token ids, in the order temperature, top-k, top-p, token by token."""
    p = torch.softmax(logits.double() / sampling.temperature, -1)
    order = sorted(range(len(p)), key=lambda token: -float(p[token]))
    if sampling.top_k:
        order = order[: sampling.top_k]
    kept, mass, total = [], 0.0, float(sum(p[token] for token in order))
    for token in order:
        if kept and sampling.top_p < 1 and mass / total >= sampling.top_p:
            break
        kept.append(token)
        mass += float(p[token])
    filtered = torch.zeros_like(p)
    filtered[kept] = p[kept] / mass
    return filtered


def sampled_distribution(logits: torch.Tensor, sampling: SamplingParams, samples: int = 20_000) -> torch.Tensor:
    """Shares of the tokens over an even grid of uniforms: the distribution to within one grid step at each border."""
    grid = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    tokens = sample(logits.expand(samples, -1), sampling, grid)
    return torch.bincount(tokens, minlength=len(logits)).double() / samples


SETTINGS = [
    params(),
    params(temperature=1.1, top_p=0.95, top_k=20),  # the default settings
    params(temperature=0.5),
    params(temperature=2.0, top_k=5),
    params(top_p=0.7),
    params(top_k=3, top_p=0.6),
    params(top_p=1e-9),
    params(top_k=1),
    params(top_k=1000, top_p=0.9),  # more than the vocabulary has
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"T{s.temperature}-p{s.top_p}-k{s.top_k}")
def test_tokens_follow_the_filtered_distribution(sampling: SamplingParams) -> None:
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    expected, sampled = reference_distribution(logits, sampling), sampled_distribution(logits, sampling)
    assert (sampled[expected == 0] == 0).all()
    torch.testing.assert_close(sampled, expected, atol=2e-4, rtol=0)


def test_seeded_tokens_pass_a_chi_square_test() -> None:
    samples, logits = 20_000, torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    numbers = uniforms(list(range(samples)), 1).squeeze(1)
    counts = torch.bincount(sample(logits.expand(samples, -1), params(), numbers), minlength=5)
    expected = samples * torch.softmax(logits.double(), -1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 18.5  # 4 degrees of freedom: exceeded once in a thousand


def test_ties_share_their_mass() -> None:
    sampled = sampled_distribution(torch.tensor([1.0, 1.0, 1.0, 1.0]), params())
    torch.testing.assert_close(sampled, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-3, rtol=0)
    # Top-k keeps two of the three equal tokens; which two is not specified.
    sampled = sampled_distribution(torch.tensor([1.0, 1.0, 1.0, -5.0]), params(top_k=2))
    assert sorted(sampled.tolist()) == pytest.approx([0, 0, 0.5, 0.5], abs=1e-3)


def test_top_p_stops_at_the_token_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert (sampled_distribution(logits, params(top_p=0.5)) > 0).tolist() == [True, False, False, False]
    assert (sampled_distribution(logits, params(top_p=0.51)) > 0).tolist() == [True, True, False, False]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    tokens = sample(logits, params(temperature=0.0, top_p=0.5, top_k=2), torch.tensor([0.99, 0.99]).double())
    assert tokens.tolist() == [1, 0]


def test_entries_without_probability_are_not_sampled() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0]])
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for number in (torch.zeros(1, dtype=torch.float64), largest):
        assert int(sample(logits, params(), number)) in (1, 3)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 40),
    spread=st.floats(0.01, 30),
    temperature=st.floats(0.05, 3),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 50),
    number=st.floats(0, 1, exclude_max=True),
)
def test_every_token_is_in_the_filtered_support(
    seed: int, size: int, spread: float, temperature: float, top_p: float, top_k: int, number: float
) -> None:
    logits = spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    sampling = params(temperature, top_p, top_k)
    token = int(sample(logits[None], sampling, torch.tensor([number], dtype=torch.float64)))
    # A slightly wider filter: sums in another order may move the border by one token.
    wider = reference_distribution(logits, params(temperature, min(1.0, top_p + 1e-6), top_k))
    assert wider[token] > 0
    alone = sample(logits[None], sampling, torch.tensor([number], dtype=torch.float64))
    among = sample(
        torch.stack([logits, -logits, logits]), sampling, torch.tensor([0.3, 0.9, number], dtype=torch.float64)
    )
    assert int(among[2]) == int(alone)


def test_random_numbers_depend_only_on_the_seed() -> None:
    several = uniforms([3, 7, 2**62 + 1], 5)
    assert several.dtype == torch.float64
    assert ((several >= 0) & (several < 1)).all()
    assert torch.equal(uniforms([7], 5)[0], several[1])
    assert torch.equal(uniforms([7, 3], 5), several[[1, 0]])
    assert torch.equal(uniforms([7], 3)[0], several[1, :3])
    assert len(several.unique()) == several.numel()
    state = torch.random.get_rng_state()
    uniforms([1], 5)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_model_itself(dtype: torch.dtype) -> None:
    logits = 5 * torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    logits = logits.to(dtype)
    for sampling in SETTINGS:
        tokens, log_probs = sample_tokens(logits, sampling, torch.linspace(0, 0.99, 6).double(), one_shard(logits))
        expected = torch.log_softmax(logits.double(), -1)[torch.arange(6), tokens]
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.double(), expected, atol=2e-6, rtol=1e-6)
