r"""Properties of the reasoning in a response's text: reflection segments, closed thinking, repetition.

- A *sentence* ends at a full stop, question or exclamation mark before white space, at "..." or "…", or at a line
  break. A *reflection segment* is a maximal run of consecutive sentences that each contain a marker: "Wait. Maybe 7?
  No, it is 8. Hmm." has two, "Wait. Maybe 7?" and "Hmm.".
- Thinking is *closed* if the text contains the closing tag, `</think>`. The opening tag is not required: many chat
  templates put it into the prompt.
- *Words* are runs of letters and digits, single other visible characters, and single Chinese or Japanese characters.
  The *repeated share* is the share of a response's sequences of 16 words that occurred earlier in it; 0 for fewer than
  17 words. A response *ends in a loop* if its last words, at least 64, are one sequence repeated at least four times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_popsd.evaluation.markers import count_markers

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+")
_WORD = re.compile(r"[぀-ヿ一-鿿]|[^\W぀-ヿ一-鿿]+|[^\w\s]")
REPEATED_WORDS = 16
"""Length of the compared sequences in words; long enough to exclude common phrases of careful reasoning."""
LOOP_WORDS, LOOP_TURNS, _LONGEST_TURN = 64, 4, 1024


def reflection_segments(text: str, markers: Sequence[str]) -> int:
    """Number of reflection segments in `text`."""
    segments, reflecting = 0, False
    for sentence in _SENTENCE_END.split(text):
        if not sentence.strip():
            continue
        reflects = any(count_markers(sentence, markers).values())
        segments += reflects and not reflecting
        reflecting = reflects
    return segments


def closes_thinking(text: str, closing: str) -> bool:
    """Whether `text` contains the tag that closes the thinking."""
    return closing in text


def words_of(text: str) -> list[str]:
    """The words of `text`, as the module defines them."""
    return _WORD.findall(text)


def repeated_share(words: Sequence[str]) -> float:
    """Share of the sequences of `REPEATED_WORDS` words that occurred earlier, 0 to 1."""
    total = len(words) - REPEATED_WORDS + 1
    if total < 2:
        return 0.0
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word, len(numbers)) for word in words]
    return 1.0 - len({tuple(ids[start : start + REPEATED_WORDS]) for start in range(total)}) / total


def ends_in_loop(words: Sequence[str]) -> bool:
    """Whether the last words are one repeated sequence."""
    for turn in range(1, min(_LONGEST_TURN, len(words) // LOOP_TURNS) + 1):
        needed = max(LOOP_WORDS, LOOP_TURNS * turn)
        if needed > len(words):
            break
        if all(words[-back] == words[-back - turn] for back in range(1, needed - turn + 1)):
            return True
    return False
