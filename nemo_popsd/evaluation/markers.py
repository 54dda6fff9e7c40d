"""Counts of epistemic markers: the words with which a long reasoning doubts, checks and starts over.

The rules, in full:

- a marker matches as whole words: neither a letter, a digit nor an underscore may touch it, so "Check" is not
  in "Checking" or "Check_1", while "Wait," and "**Wait**" hold "Wait";
- case counts as written: the default markers open a thought ("Wait, ..."), whereas "wait" and "check" inside
  a sentence are ordinary verbs; name the lower-case form as a marker of its own to count it too;
- a space inside a marker matches any run of white space, a line break included;
- matches of one marker do not overlap; different markers are counted each on their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

PAPER_MARKERS = ("Wait", "Maybe", "Perhaps", "Check", "Let me think")
"""Those that the paper counts."""
DEFAULT_MARKERS = (*PAPER_MARKERS, "Hmm", "Alternatively")
"""The paper's, and two that open a doubt in other reasoners."""


def count_markers(text: str, markers: Sequence[str] = DEFAULT_MARKERS) -> dict[str, int]:
    """How often each of `markers` occurs in `text`, zeros included, in the order given."""
    return {marker: len(_compiled(marker).findall(text)) for marker in markers}


def marker_spans(text: str, markers: Sequence[str] = DEFAULT_MARKERS) -> list[tuple[int, int]]:
    """Where `markers` stand in `text`: begin and end of each match, in characters, in rising order."""
    return sorted(match.span() for marker in markers for match in _compiled(marker).finditer(text))


@lru_cache(maxsize=256)
def _compiled(marker: str) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in marker.split())
    return re.compile(rf"(?<!\w){words}(?!\w)")
