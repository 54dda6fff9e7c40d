"""Comparison of two answers; docs/evaluation.md documents the decisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from nemo_popsd.evaluation.algebra.expressions import Expression, number, operation
from nemo_popsd.evaluation.algebra.forms import (
    Dots,
    Form,
    Matrix,
    Named,
    Parted,
    Relation,
    Several,
    Words,
    as_relation,
    difference,
    in_direction,
    parse_answer,
)
from nemo_popsd.evaluation.algebra.lexer import (
    Token,
    UnknownCommandError,
    UnreadableError,
    cleaned,
    has_groups,
    tokens_of,
)
from nemo_popsd.evaluation.algebra.numeric import proportional, same_everywhere
from nemo_popsd.evaluation.algebra.quantities import Quantity
from nemo_popsd.evaluation.algebra.units import conversion

_INFINITY = Expression("constant", name="infty")

_CHOICES = frozenset("ABCDEFGHIJ")


def same_answer(predicted: str, expected: str) -> bool | None:
    r"""Whether `predicted` is the answer `expected`; None if a LaTeX command is not covered by the rules.

    Texts that the grammar cannot parse are the same if they differ only in spaces and case.
    """
    ours, theirs = cleaned(predicted), cleaned(expected)
    if not ours or not theirs:
        return False
    if _as_text(ours) == _as_text(theirs):
        return True
    one, other = _Answer(theirs, letter_units=False), _Answer(ours, letter_units=True)
    if any(same_form(expected, predicted) for expected in one.forms for predicted in other.forms):
        return True
    if one.written and (one.written == other.written or _chosen(other.written) == one.written):
        return True
    return None if one.beyond or other.beyond else False


def compared_as(answer: str) -> str:
    """How an expected answer is compared: by `value` if the grammar parses it, by `math-verify` if it has a LaTeX
    command that the rules do not cover, otherwise as `text`.
    """
    read = _Answer(cleaned(answer), letter_units=False)
    return "value" if read.forms else "math-verify" if read.beyond else "text"


class _Answer:
    """The interpretations of one answer: several if "1,234" may be one number or two, none if it cannot be parsed."""

    def __init__(self, text: str, *, letter_units: bool) -> None:
        self.forms: list[Form] = []
        self.written: list[str] = []
        """The tokens of the answer, with words in lower case."""
        self.beyond = False
        """Whether math-verify can parse it."""
        for grouped in (True, False) if has_groups(text) else (True,):
            try:
                tokens = tokens_of(text, grouped=grouped)
                self.written = self.written or _written(tokens)
                self.forms.append(parse_answer(tokens, letter_units=letter_units))
            except UnknownCommandError:
                self.beyond = True
            except UnreadableError:
                continue


def _written(tokens: Sequence[Token]) -> list[str]:
    folded = (token.text.casefold() if token.kind == "word" and len(token.text) > 1 else token.text for token in tokens)
    return [text if token.base is None else f"{text}_{token.base}" for text, token in zip(folded, tokens, strict=True)]


def _chosen(written: Sequence[str]) -> list[str]:
    """The letter of a choice that is followed by its text, as in "(C) 12"; empty otherwise."""
    choice = len(written) > 3 and written[0] == "(" and written[2] == ")" and written[1] in _CHOICES
    return [written[1]] if choice else []


def _as_text(text: str) -> str:
    """`text` without insignificant spaces; case matters only for single letters, which are variables or choices."""
    words = text.split()
    folded = [word.casefold() if len(word) > 1 and word.isalpha() else word for word in words]
    kept: list[str] = []
    for word in folded:
        alike = kept and kept[-1][-1].isalnum() and word[0].isalnum()
        kept.append(f" {word}" if alike else word)
    return "".join(kept)


def same_form(expected: Form, predicted: Form) -> bool:
    """Whether `predicted` is the answer `expected`."""
    if isinstance(expected, Named) or isinstance(predicted, Named):
        return _same_named(expected, predicted)
    if isinstance(expected, Several) or isinstance(predicted, Several):
        return _same_several(expected, predicted)
    if isinstance(expected, Relation) and isinstance(predicted, Relation):
        return _same_relation(expected, predicted)
    if isinstance(expected, Words) and isinstance(predicted, Words):
        return _same_words(expected.words, predicted.words)
    if isinstance(expected, Parted) and isinstance(predicted, Parted):
        halves = {expected.half, predicted.half}
        return (len(halves) == 1 or "" in halves) and _pairwise(expected.parts, predicted.parts)
    if isinstance(expected, Matrix) and isinstance(predicted, Matrix):
        return len(expected.rows) == len(predicted.rows) and all(map(_pairwise, expected.rows, predicted.rows))
    one, other = _as_quantity(expected), _as_quantity(predicted)
    return one is not None and other is not None and _same_quantity(one, other)


def _same_words(one: Sequence[str], other: Sequence[str]) -> bool:
    if len(one) == len(other) == 1 and 1 in (len(one[0]), len(other[0])):
        return one[0] == other[0]  # a variable or a choice
    return [word.casefold() for word in one] == [word.casefold() for word in other]


def _as_quantity(form: Form) -> Quantity | None:
    if isinstance(form, Quantity):
        return form
    if isinstance(form, Words) and form.expression is not None:
        return Quantity(form.expression)
    return None


def _same_quantity(expected: Quantity, predicted: Quantity) -> bool:
    factor = Fraction(1)
    if expected.unit is not None and predicted.unit is not None:
        converted = conversion(predicted.unit, expected.unit)
        if converted is None:
            return False
        factor = converted
    for one in _values(expected, predicted):
        for other in _values(predicted, expected):
            scaled = other if factor == 1 else operation("*", other, number(factor))
            if same_everywhere(one, scaled):
                return True
    return False


def _values(own: Quantity, other: Quantity) -> Iterator[Expression]:
    """The possible meanings of `own` compared with `other`: a per-cent sign or a base may be missing on one side."""
    yield own.expression
    if own.percent and not other.percent:
        yield operation("/", own.expression, number(100))
    if own.digits is not None and other.base is None:
        yield own.digits


def _same_named(expected: Form, predicted: Form) -> bool:
    if isinstance(expected, Named) and isinstance(predicted, Named):
        if expected.name == predicted.name:
            return same_form(expected.value, predicted.value)
    elif isinstance(expected, Named) and not isinstance(predicted, Relation):
        return same_form(expected.value, predicted)
    elif isinstance(predicted, Named) and not isinstance(expected, Relation):
        return same_form(expected, predicted.value)
    one, other = as_relation(expected), as_relation(predicted)
    return one is not None and other is not None and _same_relation(one, other)


def _same_relation(expected: Relation, predicted: Relation) -> bool:
    one, other = in_direction(expected), in_direction(predicted)
    if one.signs != other.signs:
        return False
    if len(one.sides) == 2:
        return proportional(difference(one), difference(other), positive=one.signs[0] not in ("=", "!="))
    return all(map(same_everywhere, one.sides, other.sides))


def _interval(form: Form) -> Form:
    """An inequality in one variable as an interval; other forms unchanged."""
    if not isinstance(form, Relation):
        return form
    relation = in_direction(form)
    sides, signs = relation.sides, relation.signs
    if not set(signs) <= {"<", "<="}:
        return form
    opening = "(" if signs[0] == "<" else "["
    closing = ")" if signs[-1] == "<" else "]"
    ends = tuple(Quantity(side) for side in sides)
    if len(sides) == 3 and sides[1].operation == "variable":
        return Several(opening + closing, (ends[0], ends[2]))
    if len(sides) == 2 and sides[0].operation == "variable":
        return Several("(" + closing, (Quantity(operation("negative", _INFINITY)), ends[1]))
    if len(sides) == 2 and sides[1].operation == "variable":
        return Several(opening + ")", (ends[0], Quantity(_INFINITY)))
    return form


def _same_several(expected: Form, predicted: Form) -> bool:
    one, other = _as_several(expected), _as_several(predicted)
    if one is None or other is None:
        sets = [form for form in (one, other) if form is not None and form.kind == "set" and len(form.parts) == 1]
        single = next((form for form in (expected, predicted) if not isinstance(form, Several)), None)
        return bool(sets) and single is not None and same_form(sets[0].parts[0], single)
    kinds = {one.kind, other.kind}
    if "union" in kinds:
        inner = [[_interval(part) for part in form.parts] for form in (one, other)]
        return kinds <= {"union", "list"} and _in_any_order(*inner)
    if kinds <= {"list", "set"} and not _is_ordered(one, other):
        parts = [_distinct(form.parts) if "set" in kinds else form.parts for form in (one, other)]
        return _in_any_order(*parts)
    return (len(kinds) == 1 or kinds <= {"list", "set"} or kinds == {"list", "()"}) and _pairwise(
        one.parts, other.parts
    )


def _is_ordered(one: Several, other: Several) -> bool:
    """Whether the order of two lists matters: with an ellipsis, or if only one of them names its values."""
    if any(isinstance(part, Dots) for part in (*one.parts, *other.parts)):
        return True
    names = [[part.name for part in form.parts if isinstance(part, Named)] for form in (one, other)]
    return sorted(map(bool, names)) == [False, True] and all(len(set(of)) == len(of) for of in names)


def _distinct(parts: Sequence[Form]) -> list[Form]:
    kept: list[Form] = []
    for part in parts:
        if not any(same_form(part, other) for other in kept):
            kept.append(part)
    return kept


def _in_any_order(one: Sequence[Form], other: Sequence[Form]) -> bool:
    left = list(other)
    for part in one:
        place = next((index for index, candidate in enumerate(left) if same_form(part, candidate)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _as_several(form: Form) -> Several | None:
    form = _interval(form)
    if isinstance(form, Several):
        return form
    if isinstance(form, Matrix) and 1 in (len(form.rows), len(form.rows[0])):
        return Several("()", tuple(cell for row in form.rows for cell in row))
    return None


def _pairwise(one: Sequence[Form], other: Sequence[Form]) -> bool:
    return len(one) == len(other) and all(map(same_form, one, other))
