"""Counts of epistemic markers: words that express doubt, a check or a new start in long reasoning.

The rules:

- a marker matches only complete words, without an adjacent letter, digit or underscore: "Checking" and "Check_1" do not
  contain "Check", while "Wait," and "**Wait**" contain "Wait";
- matches are case-sensitive: the default markers start a thought ("Wait, ..."), whereas "wait" and "check" inside a
  sentence are ordinary verbs; to count a lower-case form, add it as another marker;
- a space inside a marker matches any run of white space, including line breaks;
- matches of one marker do not overlap; different markers are counted independently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

PAPER_MARKERS = ("Wait", "Maybe", "Perhaps", "Check", "Let me think")
"""The markers of the paper."""
DEFAULT_MARKERS = (*PAPER_MARKERS, "Hmm", "Alternatively")
"""The markers of the paper, and two markers that other reasoning models use."""


def count_markers(text: str, markers: Sequence[str] = DEFAULT_MARKERS) -> dict[str, int]:
    """The number of occurrences of each of `markers` in `text`, including zeros, in the order of `markers`."""
    return {marker: len(_compiled(marker).findall(text)) for marker in markers}


def marker_spans(text: str, markers: Sequence[str] = DEFAULT_MARKERS) -> list[tuple[int, int]]:
    """Start and end of each match of `markers` in `text`, as character indices, in ascending order."""
    return sorted(match.span() for marker in markers for match in _compiled(marker).finditer(text))


@lru_cache(maxsize=256)
def _compiled(marker: str) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in marker.split())
    return re.compile(rf"(?<!\w){words}(?!\w)")
