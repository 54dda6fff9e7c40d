r"""Extraction of the final answer from a response, by the first rule that applies:

1. with a pattern: the group of its last match;
2. otherwise the last `\boxed{...}` with balanced braces that is not empty. `\{` and `\}` are text and do not count as
   braces. Unclosed boxes of truncated responses are skipped, and so are empty boxes, which occur when a response quotes
   its instructions;
3. otherwise, only with `last_number=True`, the last number in the text.

The search includes the thinking, since a response that was truncated inside its thinking may contain an answer there.
`algebra` and `equivalence` compare answers.
"""

from __future__ import annotations

import re

# The tokens that affect the balance: the start of a box, an escaped character, a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER_IN_TEXT = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?!\w)")


def extract_answer(text: str, pattern: str | None = None, *, last_number: bool = False) -> str | None:
    r"""The final answer in a response, stripped; None if there is none. See the module for the rules.

    Args:
        text: decoded response.
        pattern: regular expression with one group, used instead of the last `\boxed{...}`.
        last_number: fall back to the last number in the text.
    """
    answer: str | None
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        answer = matches[-1].group(1) if matches else None
    else:
        answer = _last_box(text)
    if answer is not None and answer.strip():
        return answer.strip()
    if last_number:
        numbers = _NUMBER_IN_TEXT.findall(text)
        return numbers[-1] if numbers else None
    return None


def _last_box(text: str) -> str | None:
    """Content of the last closed and nonblank box, by opening position. One pass over `text`."""
    best_start, best = -1, None
    open_braces: list[tuple[int, bool]] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            if not open_braces:
                continue
            start, is_box = open_braces.pop()
            content = text[start : token.start()]
            if is_box and start > best_start and content.strip():
                best_start, best = start, content
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append((token.end(), token[0] != "{"))
    return best
