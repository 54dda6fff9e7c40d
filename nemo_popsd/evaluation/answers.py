r"""Final answers: finding one in a response. The first rule that applies:

1. with a pattern: the group of its last match;
2. else the last `\boxed{...}` whose braces balance and which is not empty. `\{` and `\}` are text and do not
   count as braces. A box that the length limit cut open is passed over, and so is an empty one, as when the
   response quotes its instructions;
3. else, only when asked for (`last_number=True`), the last number in the text.

The thinking is searched like the rest: a response that was cut before it closed its thinking may have answered there.
How answers are compared is the matter of `algebra` and `equivalence`.
"""

from __future__ import annotations

import re

# What matters for balancing: the opening of a box, an escaped character, a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER_IN_TEXT = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?!\w)")


def extract_answer(text: str, pattern: str | None = None, *, last_number: bool = False) -> str | None:
    r"""The final answer in a response, stripped; None when there is none. Rules: see the module.

    Args:
        text: decoded response.
        pattern: regular expression with one group, in place of the last `\boxed{...}`.
        last_number: fall back on the last number in the text.
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
    """Content of the box that opens last among those that close and are not blank. One pass over `text`."""
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
