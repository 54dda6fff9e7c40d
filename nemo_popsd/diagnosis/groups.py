"""Means and quartiles of per-token statistics: over all tokens, by position, by entropy, by membership in a marker."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from nemo_popsd.diagnosis.schema import Groups, Spread
from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS

MEASURES = {
    **{statistic.name: f"{statistic.symbol} over the full vocabulary" for statistic in SIGNAL_STATISTICS},
    "delta_total": "Δ_total of the response's token, nats",
    "delta_reference": "Δ_ref of the response's token, nats",
    "delta_question": "Δ_it of the response's token, nats",
    "delta_target": "log P minus log π_θ of the response's token, nats",
    **{statistic.name: f"{statistic.symbol}, {statistic.unit}" for statistic in TOKEN_STATISTICS},
}
"""Meaning of the per-token statistics by name: the declared statistics, and Δ of the token itself."""


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """The properties of one response token that grouping needs."""

    position: int
    """Position in the response, from 0."""
    marked: bool
    """Whether it belongs to a marker."""
    values: Mapping[str, float]
    """Statistics by the names of `MEASURES`; NaN if undefined."""


def group_figures(tokens: Sequence[TokenFigures], *, position_bins: int, entropy_edges: Sequence[float]) -> Groups:
    """Statistics of all groups, as JSON values.

    Position bins have equal lengths up to the longest response; an entropy bin has lower edge ≤ H < upper edge.

    Returns:
        "all", "markers" and "others" with one group each; "position" and "entropy" with lists of groups, which
        also have "from" and "to" ("to" is null for the last entropy bin). A group has "tokens" and, for each measure,
        "mean", "q25", "median" and "q75" over the tokens on which it is defined, or null if there are none.
    """
    longest = max((token.position for token in tokens), default=0) + 1
    step = math.ceil(longest / position_bins)
    bins = [(begin, min(begin + step, longest)) for begin in range(0, longest, step)]
    edges = [0.0, *entropy_edges]
    by_position = _split(tokens, len(bins), lambda token: token.position // step)
    by_entropy = _split(
        tokens, len(edges), lambda token: bisect_right(edges, max(token.values["student_entropy"], 0)) - 1
    )
    return {
        "all": _figures(tokens),
        "markers": _figures([token for token in tokens if token.marked]),
        "others": _figures([token for token in tokens if not token.marked]),
        "position": [
            {"from": begin, "to": end, **_figures(part)} for (begin, end), part in zip(bins, by_position, strict=True)
        ],
        "entropy": [
            {"from": low, "to": high, **_figures(part)}
            for low, high, part in zip(edges, [*entropy_edges, None], by_entropy, strict=True)
        ],
    }


def _split(
    tokens: Sequence[TokenFigures], count: int, which: Callable[[TokenFigures], int]
) -> list[list[TokenFigures]]:
    parts: list[list[TokenFigures]] = [[] for _ in range(count)]
    for token in tokens:
        parts[which(token)].append(token)
    return parts


def _figures(tokens: Sequence[TokenFigures]) -> dict[str, int | Spread | None]:
    return {"tokens": len(tokens), **{name: _spread([token.values[name] for token in tokens]) for name in MEASURES}}


def _spread(values: Sequence[float]) -> Spread | None:
    defined = sorted(value for value in values if math.isfinite(value))
    if not defined:
        return None
    q25, median, q75 = (_quantile(defined, share) for share in (0.25, 0.5, 0.75))
    return {"mean": fmean(defined), "q25": q25, "median": median, "q75": q75}


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Interpolated linearly between the neighbours, as numpy does by default."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
