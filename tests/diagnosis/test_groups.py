"""Means and quartiles by group."""

from __future__ import annotations

import math
from statistics import fmean, quantiles

import pytest

from nemo_popsd.diagnosis.config import DiagnosisConfig
from nemo_popsd.diagnosis.groups import MEASURES, TokenFigures, group_figures
from nemo_popsd.errors import UserError


def token(position: int, entropy: float, value: float, *, marked: bool = False) -> TokenFigures:
    return TokenFigures(position, marked, {**dict.fromkeys(MEASURES, value), "student_entropy": entropy})


TOKENS = [token(i, i / 10, float(i * i), marked=i % 3 == 0) for i in range(10)]


def test_each_group_has_the_right_tokens() -> None:
    found = group_figures(TOKENS, position_bins=3, entropy_edges=[0.2, 0.5])
    assert found["all"]["tokens"] == 10
    assert [found[name]["tokens"] for name in ("markers", "others")] == [4, 6]
    assert [(g["from"], g["to"], g["tokens"]) for g in found["position"]] == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert [(g["from"], g["to"], g["tokens"]) for g in found["entropy"]] == [(0, 0.2, 2), (0.2, 0.5, 3), (0.5, None, 5)]
    assert found["markers"]["norm_ratio"]["mean"] == fmean([0, 9, 36, 81])


def test_quartiles_are_interpolated_and_undefined_values_are_omitted() -> None:
    odd = [*TOKENS, token(3, 0.1, math.nan), token(4, -1e-9, math.inf)]
    spread = group_figures(odd, position_bins=1, entropy_edges=[1.0])["all"]["norm_ratio"]
    low, middle, high = quantiles([float(i * i) for i in range(10)], n=4, method="inclusive")
    assert spread == {"mean": 28.5, "q25": low, "median": middle, "q75": high}
    none = group_figures([token(0, 0.1, math.nan)], position_bins=4, entropy_edges=[1.0])
    assert none["all"]["norm_ratio"] is None
    assert none["entropy"][1] == {"from": 1.0, "to": None, "tokens": 0, **dict.fromkeys(MEASURES)}
    assert group_figures([], position_bins=4, entropy_edges=[1.0])["all"]["tokens"] == 0


@pytest.mark.parametrize("edges", [[0.5, 0.1], [0.0, 1.0], [1.0, 1.0]])
def test_edges_that_are_not_ascending_are_refused(edges: list[float]) -> None:
    with pytest.raises(UserError, match=r"diagnosis\.entropy_edges"):
        DiagnosisConfig(entropy_edges=edges)
