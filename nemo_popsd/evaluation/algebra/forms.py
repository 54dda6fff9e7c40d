r"""Forms of complete answers: a quantity, words, several answers, an interval, an equation, a matrix, a time.

An answer is split at its commas, semicolons and the words "and" and "or" outside brackets; each part is read as a
relation, a bracket, a union, a matrix, a time or ratio with colons, a quantity with a unit, or words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile

from nemo_popsd.evaluation.algebra.expressions import (
    Expression,
    number,
    operation,
    parse_expression,
    variable,
)
from nemo_popsd.evaluation.algebra.lexer import Token, UnreadableError
from nemo_popsd.evaluation.algebra.quantities import Quantity, parse_quantity, without_sentence

_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_RELATIONS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", "=": "=", r"\approx": "="}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_MOST_PARTS = 60


@dataclass(frozen=True)
class Words:
    """An answer in words, such as a name or the letter of a choice."""

    words: tuple[str, ...]
    expression: Expression | None = None
    """The words as a variable or a product of variables, if they can be read so."""


@dataclass(frozen=True)
class Dots:
    """An ellipsis among several answers."""


@dataclass(frozen=True)
class Several:
    r"""Several answers. `kind`: `list` (without brackets), `set` (braces), `union`, or the pair of its brackets."""

    kind: str
    parts: tuple[Form, ...]


@dataclass(frozen=True)
class Named:
    """A value with a name, as in x = 5 or f(x) = x^2."""

    name: str
    value: Form
    left: Expression | None = None
    """The name as an expression, if it is one: a variable, or an unknown such as m + n."""


@dataclass(frozen=True)
class Relation:
    """An equation, an inequality, or a chain of inequalities: sides and the signs between them."""

    sides: tuple[Expression, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """A matrix by rows."""

    rows: tuple[tuple[Form, ...], ...]


@dataclass(frozen=True)
class Parted:
    """Numbers separated by colons: a time or a ratio. `half` is am or pm, or empty."""

    parts: tuple[Form, ...]
    half: str = ""


Form = Quantity | Words | Dots | Several | Named | Relation | Matrix | Parted


def parse_answer(tokens: Sequence[Token], *, letter_units: bool) -> Form:
    """The form of an answer.

    Args:
        tokens: tokens of the complete answer.
        letter_units: whether a letter directly after a number may be a unit, as in 540m, and not a variable.

    Raises:
        UnreadableError: the answer has no known form.
    """
    return _Reader(letter_units).answer(list(tokens))


def in_direction(relation: Relation) -> Relation:
    """The relation with the greater side last: 3 > x becomes x < 3."""
    if relation.signs[0] in (">", ">="):
        return Relation(relation.sides[::-1], tuple(_FLIPPED[sign] for sign in relation.signs[::-1]))
    return relation


class _Reader:
    def __init__(self, letter_units: bool) -> None:
        self._letter_units = letter_units

    def answer(self, tokens: list[Token]) -> Form:
        tokens = _without_braces(tokens)
        if tokens and tokens[-1].is_symbol(".", "!", "?") and all(t.kind == "word" for t in tokens[:-1]):
            tokens = tokens[:-1]
        if not tokens:
            raise UnreadableError("nothing")
        parts = _split(tokens, _is_separator)
        parts = [part for index, part in enumerate(parts) if part or not _after_comma(tokens, parts, index)]
        if any(not part for part in parts):
            raise UnreadableError("an empty part")
        if len(parts) > _MOST_PARTS:
            raise UnreadableError(f"{len(parts)} parts")
        if len(parts) == 1:
            return self._part(parts[0])
        read = [form for part in parts for form in _flat(self._part(part))]
        if isinstance(read[0], Named) and not any(isinstance(form, Named) for form in read[1:]):
            read = [read[0], *(Named(read[0].name, form) for form in read[1:])]
        return Several("list", tuple(read))

    def _part(self, tokens: list[Token]) -> Form:
        tokens = _without_braces(tokens)
        if len(tokens) == 1 and tokens[0].is_command(r"\ldots"):
            return Dots()
        if tokens[0].is_command(r"\approx"):
            tokens = tokens[1:]
        if _is_words(tokens):
            return _words(tokens)
        members = _split(tokens, lambda token: token.is_command(r"\in"))
        if len(members) == 2:
            return self.answer(members[1])
        if any(_relation(token) for token in _outside(tokens)):
            return self._relation(tokens)
        unions = _split(tokens, lambda token: token.is_command(r"\cup"))
        if len(unions) > 1:
            return Several("union", tuple(self._part(_refuse_empty(part)) for part in unions))
        for read in (self._matrix, self._bracket, self._parted):
            found = read(tokens)
            if found is not None:
                return found
        return self._quantity(tokens)

    def _quantity(self, tokens: list[Token]) -> Form:
        tokens = without_sentence(tokens)
        found = parse_quantity(tokens, letter_units=self._letter_units)
        if found.expression.has_two_signs():
            both = (replace(found, expression=found.expression.with_sign(plus)) for plus in (True, False))
            return Several("list", tuple(both))
        return found

    def _relation(self, tokens: list[Token]) -> Form:
        sides = [_refuse_empty(side) for side in _split(tokens, lambda token: _relation(token) != "")]
        signs = [sign for token in _outside(tokens) if (sign := _relation(token))]
        if set(signs) == {"="}:
            return self._equation(sides)
        return Relation(tuple(self._plain_expression(side) for side in sides), tuple(signs))

    def _equation(self, sides: list[list[Token]]) -> Form:
        named = _name(sides[0])
        if named is not None:
            name, expression = named
            value = self.answer(sides[-1])
            names = name.split(",")
            if len(names) > 1 and isinstance(value, Several) and value.kind == "()" and len(value.parts) == len(names):
                return Several("list", tuple(map(Named, names, value.parts)))
            return Named(name, value, expression)
        if len(sides) > 2:  # 2 + 3 = 4 + 1 = 5
            return self._part(sides[-1])
        left, right = (self._plain_expression(side) for side in sides)
        if not left.variables() and right.operation == "variable":
            return Named(right.name, self._part(sides[0]), right)
        if not left.variables() and not right.variables():
            return self._part(sides[1])
        return Relation((left, right), ("=",))

    def _plain_expression(self, tokens: list[Token]) -> Expression:
        found = parse_quantity(tokens, letter_units=False)
        if found.percent or found.expression.has_two_signs():
            raise UnreadableError("a relation of such a side")
        return found.expression

    def _matrix(self, tokens: list[Token]) -> Form | None:
        if tokens[0].kind != "matrix" or tokens[-1].kind != "matrix":
            return None
        inner = tokens[1:-1]
        if any(token.kind == "matrix" for token in inner):
            raise UnreadableError("nested matrices")
        rows = [row for row in _split(inner, lambda token: token.is_symbol("\\\\")) if row]
        read = tuple(tuple(self._part(_refuse_empty(cell)) for cell in _split(row, _is_ampersand)) for row in rows)
        if not read or len({len(row) for row in read}) > 1:
            raise UnreadableError("rows of different lengths")
        return Matrix(read)

    def _bracket(self, tokens: list[Token]) -> Form | None:
        if len(tokens) == 1 and tokens[0].is_command(r"\emptyset"):
            return Several("set", ())
        opening, closing = tokens[0], tokens[-1]
        if opening.is_command(r"\{") and closing.is_command(r"\}"):
            kind = "set"
        elif opening.is_command(r"\langle") and closing.is_command(r"\rangle"):
            kind = "()"
        elif opening.is_symbol("(", "[") and closing.is_symbol(")", "]"):
            kind = opening.text + closing.text
        else:
            return None
        if not _closes_at_end(tokens):
            return None
        inner = tokens[1:-1]
        if not inner:
            if kind == "set":
                return Several("set", ())
            raise UnreadableError("empty brackets")
        read = self.answer(inner)
        listed = read.parts if isinstance(read, Several) and read.kind == "list" else None
        if kind == "set":
            return Several("set", listed if listed is not None else (read,))
        if listed is None:  # brackets around one answer
            if len(kind) == 2 and kind in ("()", "[]"):
                return read
            raise UnreadableError("one end of an interval")
        return Several(kind, listed)

    def _parted(self, tokens: list[Token]) -> Form | None:
        half = ""
        last = tokens[-1].text.lower().replace(".", "")
        if tokens[-1].kind == "word" and last in ("am", "pm"):
            half, tokens = last, tokens[:-1]
        parts = _split(tokens, lambda token: token.is_symbol(":"))
        if len(parts) == 1 and not half:
            return None
        if len(parts) == 2 and not half and _is_words(parts[0]):  # Answer: 42
            return Named(" ".join(token.text for token in parts[0]), self.answer(_refuse_empty(parts[1])))
        read: list[Form] = [self._quantity(_refuse_empty(part)) for part in parts]
        if len(read) == 1:
            read.append(Quantity(number(0)))
        return Parted(tuple(read), half)


def _flat(form: Form) -> Sequence[Form]:
    return form.parts if isinstance(form, Several) and form.kind == "list" else [form]


def _split(tokens: Sequence[Token], separates: Callable[[Token], bool]) -> list[list[Token]]:
    """The parts of `tokens` between separators outside brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += _step(token)
        if depth == 0 and separates(token):
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _outside(tokens: Sequence[Token]) -> list[Token]:
    depth, found = 0, []
    for token in tokens:
        depth += _step(token)
        if depth == 0:
            found.append(token)
    return found


def _step(token: Token) -> int:
    if token.is_symbol(*_OPENING) or token.is_command(r"\{", r"\langle"):
        return 1
    if token.is_symbol(*_CLOSING) or token.is_command(r"\}", r"\rangle"):
        return -1
    if token.kind == "matrix":
        return 1 if token.text == "begin" else -1
    return 0


def _closes_at_end(tokens: Sequence[Token]) -> bool:
    depth = 0
    for place, token in enumerate(tokens):
        depth += _step(token)
        if depth == 0:
            return place == len(tokens) - 1
    return False


def _without_braces(tokens: list[Token]) -> list[Token]:
    while len(tokens) > 1 and tokens[0].is_symbol("{") and tokens[-1].is_symbol("}") and _closes_at_end(tokens):
        tokens = tokens[1:-1]
    return tokens


def _is_separator(token: Token) -> bool:
    return token.is_symbol(",", ";") or token.is_word("and", "or") or token.is_command(r"\and", r"\or")


def _after_comma(tokens: Sequence[Token], parts: Sequence[Sequence[Token]], index: int) -> bool:
    """Whether the empty part `index` is between a comma and a following "and"."""
    if index == 0 or index == len(parts) - 1:
        return False
    separators = [token for token in _outside(tokens) if _is_separator(token)]
    return separators[index - 1].kind == "symbol" and separators[index].kind != "symbol"


def _is_ampersand(token: Token) -> bool:
    return token.is_symbol("&")


def _relation(token: Token) -> str:
    return _RELATIONS.get(token.text, "") if token.kind in ("symbol", "command") else ""


def _refuse_empty(tokens: list[Token]) -> list[Token]:
    if not tokens:
        raise UnreadableError("an empty part")
    return tokens


def _is_words(tokens: Sequence[Token]) -> bool:
    inner = [token for token in tokens if not token.is_symbol("(", ")", "{", "}", "'", '"', "-", "/", "*")]
    if not inner or not all(token.kind == "word" for token in inner):
        return False
    if len(inner) == 1 and inner[0].text.lower() in ("pi", "infinity", "inf", "oo"):
        return False
    if any(token.is_symbol("-", "/", "*") for token in tokens):
        return all(len(token.text) > 2 for token in inner)  # north-west, but neither -x nor a/b
    return len(inner) in (1, len(tokens)) or any(len(token.text) > 1 for token in inner)  # (C), but not f(x)


def _words(tokens: Sequence[Token]) -> Words:
    words = tuple(token.text.rstrip(".") for token in tokens if token.kind == "word")
    expression = None
    if len(words) == 1 or all(len(word) == 1 for word in words):
        try:
            expression = parse_expression([t for t in tokens if t.kind == "word" and not t.quoted])
        except UnreadableError:
            expression = None
    return Words(words, expression)


def _name(tokens: Sequence[Token]) -> tuple[str, Expression | None] | None:
    """A left side as a name: a variable, an unknown such as m + n, f(x), (a, b), or words; None for others."""
    tokens = list(tokens)
    if tokens and tokens[0].is_symbol("(") and tokens[-1].is_symbol(")") and _closes_at_end(tokens):
        names = [_name(part) for part in _split(tokens[1:-1], _is_separator)]
        return (",".join(found[0] for found in names if found), None) if len(names) > 1 and all(names) else None
    written = " ".join(token.text for token in tokens)
    if len(tokens) > 1 and tokens[0].kind == "word" and len(tokens[0].text) == 1:
        rest = list(dropwhile(lambda token: token.is_symbol("'"), tokens[1:]))
        if not rest or (rest[0].is_symbol("(") and _closes_at_end(rest) and any(t.kind == "word" for t in rest)):
            return written, None
    try:
        found = parse_expression(tokens)
    except UnreadableError:
        return (written, None) if tokens and all(token.kind == "word" for token in tokens) else None
    if found.operation == "variable":
        return found.name, found
    return (written, found) if found.variables() and found.is_of_variables_alone() else None


def difference(relation: Relation) -> Expression:
    """The first side minus the second."""
    return operation("-", relation.sides[0], relation.sides[1])


def as_relation(form: Form) -> Relation | None:
    """An equation, or a named value as an equation; None for other forms."""
    if isinstance(form, Relation):
        return form
    if isinstance(form, Named) and isinstance(form.value, (Quantity, Words)) and form.value.expression is not None:
        return Relation((form.left or variable(form.name), form.value.expression), ("=",))
    return None
