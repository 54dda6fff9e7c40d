r"""Final answers: finding one in a response, and comparing it with the expected one.

Extraction, first rule that applies:

1. with a pattern: the group of its last match;
2. else the last `\boxed{...}` whose braces balance and which is not empty. `\{` and `\}` are text and do not
   count as braces. A box that the length limit cut open is passed over, and so is an empty one, as when the
   response quotes its instructions;
3. else, only when asked for (`last_number=True`), the last number in the text.

The thinking is searched like the rest: a response that was cut before it closed its thinking may have answered there.

Comparison: both sides are cleaned of mathematical wrapping, then compared as exact numbers if both are numbers,
else as text.

- Cleaning removes `$`, `\$`, `\(`, `\)`, `\[`, `\]`, thin and negative spaces, `\left`, `\right`, a degree or
  per-cent sign, one trailing full stop, and the wrappers `\text{}`, `\textbf{}`, `\mathrm{}`, `\mathbf{}` and
  `\boxed{}` around the whole; a Unicode minus becomes `-`, `\dfrac` and `\tfrac` become `\frac`.
- Numbers are integers, decimals, thousands with commas in the right places ("1,234" and "1{,}234"), fractions
  "a/b", and `\frac{a}{b}` or `\frac12`; compared exactly, so 0.5 = 1/2 = \frac{1}{2} = .50, but 0.333 ≠ 1/3.
- Text is compared without any white space, in its own case.

Not covered here, and so unequal unless written alike: units, "x = 5" against "5", sets and intervals in another order
or notation, roots, and every other equivalence that takes algebra; `equivalence` asks math-verify about those.
"""

from __future__ import annotations

import re
from fractions import Fraction

# What matters for balancing: the opening of a box, an escaped character, a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d*)?"
_PLAIN_NUMBER = re.compile(rf"[-+]?(?:{_GROUPED}|{_DECIMAL})")
_RATIO = re.compile(rf"({_PLAIN_NUMBER.pattern})/({_PLAIN_NUMBER.pattern})")
_LATEX_RATIO = re.compile(rf"([-+]?)\\frac(?:\{{({_PLAIN_NUMBER.pattern})\}}\{{({_PLAIN_NUMBER.pattern})\}}|(\d)(\d))")
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w.,])[-+]?(?:{_GROUPED}|{_DECIMAL})(?!\w)")
_DROPPED = re.compile(r"\\\$|\$|\\\(|\\\)|\\\[|\\\]|\\[,!;: ]|\\left\b|\\right\b|\^\\circ\b|\^\{\\circ\}|\\%|%|°")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{")
# Longer digit strings are text: converting them costs quadratic time, and Python refuses beyond 4,300 digits.
_LONGEST_NUMBER = 200
_MOST_WRAPPERS = 4


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


def answers_match(predicted: str | None, expected: str) -> bool:
    """Whether a predicted answer equals the expected one by the module's rules; None (no answer) never does."""
    if predicted is None:
        return False
    ours, theirs = cleaned_answer(predicted), cleaned_answer(expected)
    our_number, their_number = _number(ours), _number(theirs)
    if our_number is not None and their_number is not None:
        return our_number == their_number
    return bool(ours) and ours == theirs


def is_number(cleaned: str) -> bool:
    """Whether a cleaned answer is a number that is compared exactly."""
    return _number(cleaned) is not None


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


def _unwrapped(text: str) -> str:
    r"""`text` without one wrapper such as `\text{...}` around the whole of it; `text` itself if there is none."""
    wrapper = _WRAPPER.match(text)
    if wrapper is None or not text.endswith("}"):
        return text
    depth = 0
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            depth -= 1
            if depth == 0 and token.end() < len(text):
                return text
        elif token[0].endswith("{") and token[0] != "\\{":
            depth += 1
    return text[wrapper.end() : -1] if depth == 0 else text


def cleaned_answer(text: str) -> str:
    """`text` without mathematical wrapping, as the comparison sees it."""
    text = text.replace("−", "-").replace("{,}", ",")  # noqa: RUF001 (the Unicode minus is meant)
    text = _DROPPED.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = "".join(text.split()).removesuffix(".")
    for _ in range(_MOST_WRAPPERS):
        text = _unwrapped(text)
    return text


def _number(text: str) -> Fraction | None:
    if len(text) > _LONGEST_NUMBER:
        return None
    if _PLAIN_NUMBER.fullmatch(text):
        return _value(text)
    if match := _RATIO.fullmatch(text):
        numerator, denominator, sign = match[1], match[2], ""
    elif match := _LATEX_RATIO.fullmatch(text):
        sign, numerator, denominator = match[1], match[2] or match[4], match[3] or match[5]
    else:
        return None
    below = _value(denominator)
    if not below:
        return None
    return (-1 if sign == "-" else 1) * _value(numerator) / below


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
