"""The text of each token, and which tokens belong to an epistemic marker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_popsd.evaluation.markers import marker_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
_BATCH = 4096


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the response, including special tokens; the concatenation is the response.

    A character whose bytes span several tokens belongs to the last one; the others have an empty text. Decodes a few
    tokens at a time, so that spaces that the tokenizer drops at the start of a text are kept.
    """
    pieces: list[str] = []
    start = read = 0
    before = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[start:end]))
        if end < len(ids) and text.endswith(_UNFINISHED):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        start, read = read, end
        before = tokenizer.decode(list(ids[start:read]))
    return pieces


def marked_tokens(pieces: Sequence[str], markers: Sequence[str]) -> list[bool]:
    """For each piece, whether it overlaps a marker that `nemo_popsd.evaluation.markers` finds in the response."""
    spans = marker_spans("".join(pieces), markers)
    marked = []
    begin = 0
    for piece in pieces:
        end = begin + len(piece)
        marked.append(any(first < end and last > begin for first, last in spans))
        begin = end
    return marked


def marker_entries(
    tokenizer: PreTrainedTokenizerBase, markers: Sequence[str], vocab_size: int
) -> Mapping[str, list[int]]:
    """By marker, the vocabulary entries that equal the marker, ignoring surrounding white space.

    A marker with several tokens has no entries, because its first token ("Let") mostly starts other text.
    """
    entries: dict[str, list[int]] = {marker: [] for marker in markers}
    size = min(vocab_size, len(tokenizer))
    for begin in range(0, size, _BATCH):
        texts = tokenizer.batch_decode([[token] for token in range(begin, min(begin + _BATCH, size))])
        for token, text in enumerate(texts, begin):
            if text.strip() in entries:
                entries[text.strip()].append(token)
    return entries
