r"""Arithmetic expressions: a recursive-descent parser that uses every token or raises.

    sum      term (+ | - | \pm | \mp) term ...
    term     factor (\cdot | \times | * | / | \div | nothing) factor ...
    factor   atom, then any of !, ^ and degree signs
    atom     number, mixed number, variable, constant, \frac, \sqrt, \binom, function, (...), {...}, |...|

Two adjacent numbers are not a product: "3 4" is refused, "1 1/4" and "1\frac14" are mixed numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from nemo_popsd.evaluation.algebra.lexer import Token, UnreadableError, names

_DEEPEST = 40
_LONGEST_PRODUCT = 4
"""Maximum number of letters of a word that may be a product of variables."""
FUNCTIONS = names("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt")
_GREEK = names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi "
    "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell"
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Expression:
    """A node: an operation on arguments, or a leaf.

    Operations: `number` (with `value`), `variable` and `constant` (with `name`), `+`, `-`, `*`, `/`, `^`, `negative`,
    `root` (of degree, value), `!`, `binom`, `abs`, `floor`, `ceiling`, `degrees`, `call` (with `name`), and `+-`, `-+`.
    """

    operation: str
    arguments: tuple[Expression, ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)

    def variables(self) -> frozenset[str]:
        """Names of the variables in the expression."""
        if self.operation == "variable":
            return frozenset((self.name,))
        return frozenset[str]().union(*(argument.variables() for argument in self.arguments))

    def is_of_variables_alone(self) -> bool:
        """Whether the expression consists only of variables and the four operations, such as m + n."""
        if self.operation == "variable":
            return True
        return self.operation in ("+", "-", "*", "/") and all(a.is_of_variables_alone() for a in self.arguments)

    def has_two_signs(self) -> bool:
        r"""Whether it contains `\pm` or `\mp`."""
        return self.operation in ("+-", "-+") or any(argument.has_two_signs() for argument in self.arguments)

    def with_sign(self, plus: bool) -> Expression:
        r"""The expression with every `\pm` replaced by + (or -), and every `\mp` by the opposite sign."""
        arguments = tuple(argument.with_sign(plus) for argument in self.arguments)
        if self.operation in ("+-", "-+"):
            sign = "+" if plus == (self.operation == "+-") else "-"
            return Expression(sign, arguments)
        return replace(self, arguments=arguments)


def number(value: Fraction | int) -> Expression:
    """A number."""
    return Expression("number", value=Fraction(value))


def variable(name: str) -> Expression:
    """A variable."""
    return Expression("variable", name=name)


def parse_expression(tokens: Sequence[Token]) -> Expression:
    """The expression that consists of all `tokens`.

    Raises:
        UnreadableError: they are not an expression.
    """
    parser = _Parser(tokens)
    found = parser.whole()
    if parser.next is not None:
        raise UnreadableError(f"{parser.next.text!r} after an expression")
    return found


def operation(kind: str, *arguments: Expression) -> Expression:
    """`kind` applied to `arguments`."""
    return Expression(kind, arguments)


class _Parser:
    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = list(tokens)
        self._place = 0
        self._depth = 0
        self._bars = 0

    @property
    def next(self) -> Token | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _take(self) -> Token:
        token = self.next
        if token is None:
            raise UnreadableError("an expression that ends early")
        self._place += 1
        return token

    def _at(self, *texts: str) -> bool:
        return self.next is not None and self.next.is_symbol(*texts)

    def _at_command(self, *names: str) -> bool:
        return self.next is not None and self.next.is_command(*("\\" + name for name in names))

    def _expect(self, text: str) -> None:
        if not self._take().is_symbol(text):
            raise UnreadableError(f"a missing {text!r}")

    def whole(self) -> Expression:
        r"""A sum, or two sums joined by \over or \choose, which apply to everything on both sides."""
        inner = self.sum()
        if self._at_command("over", "choose"):
            kind = "/" if self._take().text == r"\over" else "binom"
            return operation(kind, inner, self.sum())
        return inner

    def sum(self) -> Expression:
        """Terms joined by signs."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise UnreadableError("nested too deeply")
        found: Expression | None = None
        while found is None or self._at("+", "-") or self._at_command("pm", "mp"):
            sign = self._take().text if self._at("+", "-") or self._at_command("pm", "mp") else "+"
            sign = {r"\pm": "+-", r"\mp": "-+"}.get(sign, sign)
            term = self._term()
            if found is None:
                signed = {"+": term, "-": operation("negative", term)}
                found = signed.get(sign) or operation(sign, number(0), term)
            else:
                found = operation(sign, found, term)
        self._depth -= 1
        return found

    def _term(self) -> Expression:
        found = self._signed_factor()
        while self.next is not None:
            if self._at("*") or self._at_command("cdot", "times"):
                self._take()
                found = operation("*", found, self._signed_factor())
            elif self._at("/") or self._at_command("div"):
                self._take()
                found = operation("/", found, self._signed_factor())
            elif self._begins_factor():
                found = operation("*", found, self._factor())
            else:
                break
        return found

    def _signed_factor(self) -> Expression:
        if self._at("-"):
            self._take()
            return operation("negative", self._factor())
        if self._at("+"):
            self._take()
        return self._factor()

    def _begins_factor(self) -> bool:
        token = self.next
        assert token is not None
        if token.kind == "number":
            before = self._tokens[self._place - 1]
            if before.kind == "command" or before.is_symbol(")", "}"):
                return True
            raise UnreadableError(f"{token.text!r} next to {before.text!r}")
        if token.is_symbol("|"):
            return self._bars == 0
        if token.kind == "command":
            return token.text[1:] in FUNCTIONS | _GREEK | {
                "frac", "binom", "pi", "infty", "lfloor", "lceil"
            }  # fmt: skip
        return token.kind == "word" or token.is_symbol("(", "{")

    def _factor(self) -> Expression:
        found = self._atom()
        while self.next is not None:
            if self._at("!"):
                self._take()
                found = operation("!", found)
            elif self._at("^"):
                self._take()
                if self._at_command("circ") or self._is_braced_degree():
                    self._place += 1 if self._at_command("circ") else 3
                    found = operation("degrees", found)
                else:
                    found = operation("^", found, self._exponent())
            else:
                break
        return found

    def _is_braced_degree(self) -> bool:
        ahead = self._tokens[self._place : self._place + 3]
        return len(ahead) == 3 and ahead[0].is_symbol("{") and ahead[1].is_command(r"\circ")

    def _exponent(self) -> Expression:
        if self._at("-", "+"):
            sign = self._take().text
            inner = self._atom()
            return operation("negative", inner) if sign == "-" else inner
        inner = self._atom()
        if self._at("^"):  # 2^3^4 is 2^(3^4)
            self._take()
            return operation("^", inner, self._exponent())
        return inner

    def _atom(self) -> Expression:
        token = self._take()
        if token.kind == "number":
            return self._number(token)
        if token.kind == "word":
            return self._word(token)
        if token.is_symbol(*_CLOSING):
            return self._group(_CLOSING[token.text])
        if token.is_symbol("|"):
            self._bars += 1
            inner = self.sum()
            self._bars -= 1
            self._expect("|")
            return operation("abs", inner)
        if token.kind == "command":
            return self._command(token.text[1:])
        raise UnreadableError(f"{token.text!r} in an expression")

    def _group(self, closing: str) -> Expression:
        bars, self._bars = self._bars, 0
        inner = self.whole()
        self._bars = bars
        self._expect(closing)
        return inner

    def _number(self, token: Token) -> Expression:
        assert token.value is not None
        found = number(token.value)
        fraction = self._fraction_of_mixed(token)
        if fraction is None:
            return found
        return operation("+", found, number(fraction))

    def _fraction_of_mixed(self, whole: Token) -> Fraction | None:
        r"""Consumes and returns the fraction of a mixed number: "1/4" after a space, or \frac{1}{4}, below one."""
        assert whole.value is not None
        if whole.value.denominator != 1 or whole.base is not None or "." in whole.text:
            return None
        ahead = self._tokens[self._place :]
        if len(ahead) >= 3 and ahead[0].kind == "number" and ahead[0].spaced and ahead[1].is_symbol("/"):
            top, bottom, length = ahead[0], ahead[2], 3
        elif len(ahead) >= 2 and ahead[0].is_command(r"\frac"):
            place = self._place
            self._take()
            try:
                parts = self._fraction_arguments()
            except UnreadableError:
                self._place = place
                return None
            values = [part.value for part in parts if part.operation == "number"]
            if len(values) == 2 and all(v.denominator == 1 for v in values) and values[0] < values[1]:
                return values[0] / values[1]
            self._place = place
            return None
        else:
            return None
        if top.value is None or bottom.value is None or top.value.denominator != 1 or bottom.value.denominator != 1:
            return None
        if not top.value < bottom.value:
            return None
        self._place += length
        return top.value / bottom.value

    def _fraction_arguments(self) -> tuple[Expression, Expression]:
        return self._argument(digit=True), self._argument(digit=True)

    def _argument(self, *, digit: bool = False) -> Expression:
        r"""The argument of a command: a group, or one atom; with `digit`, one digit of a number as in \frac12."""
        token = self.next
        if digit and token is not None and token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            digits = (token.text[0], token.text[1:])
            parts = [Token("number", text, False, Fraction(text)) for text in digits]
            self._tokens[self._place : self._place + 1] = parts
            self._place += 1
            return number(int(token.text[0]))
        if self._at("-"):
            self._take()
            return operation("negative", self._atom())
        return self._atom()

    def _command(self, name: str) -> Expression:
        if name == "frac":
            return operation("/", *self._fraction_arguments())
        if name == "binom":
            return operation("binom", *self._fraction_arguments())
        if name == "sqrt":
            return self._root()
        if name in ("pi", "infty"):
            return Expression("constant", name=name)
        if name in FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return variable(name + self._subscript())
        for kind, opening, closing in (("floor", "lfloor", "rfloor"), ("ceiling", "lceil", "rceil")):
            if name == opening:
                inner = self.sum()
                if not self._take().is_command("\\" + closing):
                    raise UnreadableError(f"no \\{closing}")
                return operation(kind, inner)
        raise UnreadableError(f"\\{name} in an expression")

    def _root(self) -> Expression:
        degree = number(2)
        if self._at("["):
            self._take()
            degree = self._group("]")
        return operation("root", degree, self._argument())

    def _function(self, name: str) -> Expression:
        if name == "sqrt":
            return self._root()
        base: Expression | None = None
        power: Expression | None = None
        while self._at("^", "_"):
            if self._take().text == "^":
                power = self._exponent()
            else:
                base = self._argument(digit=True)
        if power is not None and power.operation == "negative":
            if name not in ("sin", "cos", "tan") or power.arguments != (number(1),):
                raise UnreadableError("a negative power of a function")
            name, power = f"arc{name}", None
        inner = self._function_argument()
        found = Expression("call", (inner,), name)
        if base is not None:
            if name != "log":
                raise UnreadableError(f"a base of {name}")
            found = operation("/", found, Expression("call", (base,), name))
        return found if power is None else operation("^", found, power)

    def _function_argument(self) -> Expression:
        if self._at("(", "{"):
            return self._factor()
        found = self._signed_factor()
        while self.next is not None and not self._at("(", "{", "|") and self._begins_factor():
            if self.next.kind == "command" and self.next.text[1:] in FUNCTIONS:
                break
            found = operation("*", found, self._factor())
        return found

    def _word(self, token: Token) -> Expression:
        word = token.text
        if token.quoted:
            raise UnreadableError(f"the word {word!r} in an expression")
        if word in FUNCTIONS:
            return self._function(word)
        if word == "pi":
            return Expression("constant", name="pi")
        if word.lower() in ("infinity", "inf", "oo"):
            return Expression("constant", name="infty")
        if len(word) > 1:
            if len(word) > _LONGEST_PRODUCT or not word.isalpha():
                raise UnreadableError(f"the word {word!r} in an expression")
            self._tokens[self._place - 1 : self._place] = [Token("word", letter) for letter in word]
            return self._word(self._tokens[self._place - 1])
        if word in ("e", "i") and not self._at("_"):
            return Expression("constant", name=word)
        return variable(word + self._subscript())

    def _subscript(self) -> str:
        if not self._at("_"):
            return ""
        self._take()
        token = self._take()
        if not token.is_symbol("{"):
            return "_" + token.text
        written = ""
        while not self._at("}"):
            written += self._take().text
        self._take()
        return "_" + written
