"""A number or an expression with its context: a currency, a unit, a per-cent sign, a short sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_popsd.evaluation.algebra.expressions import FUNCTIONS, Expression, number, operation, parse_expression
from nemo_popsd.evaluation.algebra.lexer import Token, UnreadableError, names
from nemo_popsd.evaluation.algebra.units import CURRENCIES, NO_UNITS, SCALES, Unit, is_known, unit_of

_PERCENT = ("percent", "percentage", "pct")
_VERBS = names(
    "is are was were be equals makes made earns earned has have had gets got needs needed costs cost pays paid takes "
    "took sells sold spends spent saves saved buys bought reads eats uses used gives gave leaves weighs receives "
    "received runs walks drives travels"
)
"""Words that may precede the number of a sentence; others, such as "than", change its meaning."""
_NEGATIONS = names("not never no nor if unless without")
_POWERS = ("squared", "cubed")
_SHORTEST_WORD = 3
_LETTERS = frozenset("mgshLl")
"""Units with one letter."""
_ORDINALS = frozenset(("th", "st", "nd", "rd"))
_SCALES_OF_HEAT = {"C": "celsius", "F": "fahrenheit"}


@dataclass(frozen=True)
class Quantity:
    """An expression with its unit."""

    expression: Expression
    unit: Unit | None = None
    percent: bool = False
    digits: Expression | None = None
    """For a number in another base: the value of its digits read as decimal digits."""
    base: int | None = None
    """The other base."""


def without_sentence(tokens: Sequence[Token]) -> list[Token]:
    """`tokens` without the words of a sentence that ends with a number and its unit: "Janet makes 18 dollars"."""
    first = next((place for place, token in enumerate(tokens) if token.kind != "word"), len(tokens))
    words = [token.text.lower() for token in tokens[:first]]
    if len(words) < 2 or words[-1] not in _VERBS or any(w in _NEGATIONS or w.endswith("n't") for w in words):
        return list(tokens)
    return list(tokens[first:])


def parse_quantity(tokens: Sequence[Token], *, letter_units: bool) -> Quantity:
    """The quantity that consists of all `tokens`.

    Args:
        tokens: of one answer.
        letter_units: whether a letter directly after a number may be a unit, as in 540m, and not a variable.

    Raises:
        UnreadableError: they are not a quantity.
    """
    tokens = list(tokens)
    before: list[str] = []
    sign = [tokens.pop(0)] if len(tokens) > 1 and tokens[0].is_symbol("-") and _is_currency(tokens[1]) else []
    while tokens and _is_currency(tokens[0]):
        before.append(tokens.pop(0).text)
    tokens = sign + tokens
    if not tokens:
        raise UnreadableError("no number")
    end = _end_of_value(tokens, letter_units)
    behind = tokens[end:]
    percent = [token for token in behind if token.is_symbol("%") or token.is_word(*_PERCENT)]
    if len(percent) > 1 or (percent and (before or not (percent[0] is behind[0] or percent[0] is behind[-1]))):
        raise UnreadableError("a misplaced per-cent sign")
    behind = [token for token in behind if token not in percent]
    expression = parse_expression(tokens[:end])
    while behind and behind[0].is_word(*SCALES):
        expression = operation("*", expression, number(SCALES[behind.pop(0).text.lower()]))
    words = before + _phrase(behind)
    powers = [word for word in words if word in _POWERS]
    units = [word for word in words if word not in _POWERS]
    if any(word in NO_UNITS for word in units) or (powers and not (units and all(map(is_known, units)))):
        raise UnreadableError("words that are not a unit")
    digits = base = None
    if end == 1 and tokens[0].base is not None:
        base = tokens[0].base
        digits = number(int(tokens[0].text)) if tokens[0].text.isdigit() else None
    return Quantity(expression, unit_of(words) if words else None, bool(percent), digits, base)


def _is_currency(token: Token) -> bool:
    return token.is_symbol(*CURRENCIES) or token.is_word("usd", "eur", "gbp")


def _end_of_value(tokens: Sequence[Token], letter_units: bool) -> int:
    """Index at which the unit of a value starts: the longest end of `tokens` that can be a unit."""
    end = place = len(tokens)
    while place > 1:
        token = tokens[place - 1]
        if _is_power(tokens, place):
            place -= 2
            continue
        degree = _length_of_degree(tokens, place)
        if degree:
            end = place - degree
            break
        if token.is_symbol("%", *CURRENCIES):
            place -= 1
            end = place
            continue
        if token.is_symbol("/") and place < len(tokens) and tokens[place].kind == "word":
            place -= 1
            continue
        if token.kind != "word" or not _may_be_unit(tokens, place - 1, letter_units):
            break
        place -= 1
        end = place
    if end < len(tokens) and tokens[end - 1].is_symbol("/"):  # 10/hour
        return end - 1 if end > 1 and tokens[end - 2].kind == "number" and len(tokens[end].text) > 1 else len(tokens)
    return end


def _is_power(tokens: Sequence[Token], place: int) -> bool:
    """Whether "^2" or "^3" ends at `place`, after a word."""
    if place < 3 or not tokens[place - 2].is_symbol("^") or tokens[place - 3].kind != "word":
        return False
    return tokens[place - 1].text in ("2", "3") and is_known(tokens[place - 3].text)


def _length_of_degree(tokens: Sequence[Token], place: int) -> int:
    """Number of tokens of the degree sign that ends at `place`; 0 if there is none, or if it belongs to an angle in a
    function.
    """
    if any(token.text.lstrip("\\") in FUNCTIONS for token in tokens[:place]):
        return 0
    if place > 2 and tokens[place - 1].is_command(r"\circ") and tokens[place - 2].is_symbol("^"):
        return 2
    if place > 4 and tokens[place - 1].is_symbol("}") and tokens[place - 2].is_command(r"\circ"):
        return 4 if tokens[place - 4].is_symbol("^") else 0
    return 0


def _may_be_unit(tokens: Sequence[Token], place: int, letter_units: bool) -> bool:
    token, before = tokens[place], tokens[place - 1]
    word = token.text.rstrip(".")
    if word in _SCALES_OF_HEAT and (before.is_command(r"\circ") or _length_of_degree(tokens, place)):
        return True
    if word in FUNCTIONS or word in ("pi", "infinity", "inf"):
        return False
    if token.quoted or (word in _ORDINALS and before.kind == "number"):
        return True
    if is_known(word):
        if len(word) > 1:
            return True
        if before.is_symbol("/") and place > 1 and tokens[place - 2].kind == "word":
            return word in _LETTERS
        if not letter_units and not token.spaced:
            return False
        return word in _LETTERS and (before.kind == "number" or before.is_symbol("}"))
    if token.is_word(*_PERCENT, *SCALES):
        return True
    return (token.spaced and len(word) >= _SHORTEST_WORD) or _in_phrase(tokens, place)


def _in_phrase(tokens: Sequence[Token], place: int) -> bool:
    """Whether a short word is between longer ones, as "of" and "a" are."""
    token = tokens[place]
    behind = tokens[place + 1] if place + 1 < len(tokens) else None
    return token.spaced and behind is not None and behind.kind == "word" and len(behind.text) >= _SHORTEST_WORD


def _phrase(tokens: Sequence[Token]) -> list[str]:
    words: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token.is_symbol("^") and place + 1 < len(tokens):
            following = tokens[place + 1]
            if following.is_command(r"\circ") or following.is_symbol("{"):
                words.append("degree")
                place += 2 if following.is_command(r"\circ") else 4
            else:
                words.append("^" + following.text)
                place += 2
            continue
        if token.kind == "word" and words == ["degree"] and token.text in _SCALES_OF_HEAT:
            words.append(_SCALES_OF_HEAT[token.text])
        elif token.kind == "word":
            words += token.text.rstrip(".").lower().replace("-", " ").split() if len(token.text) > 1 else [token.text]
        elif token.is_symbol("/", *CURRENCIES):
            words.append(token.text)
        else:
            raise UnreadableError(f"{token.text!r} in a unit")
        place += 1
    return words
