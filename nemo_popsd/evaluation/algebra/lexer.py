r"""Tokens of an answer in LaTeX or plain text, without markup that has no meaning.

Numbers are recognised here, since spaces and commas matter: "1,234", "1{,}234", "12\,000" and "12 000" are one number
each, "1, 234" and "3 4" are two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST_ANSWER = 1000
"""Maximum length of an answer for the grammar; longer ones are compared as text."""
_MOST_TOKENS = 400
_LONGEST_NUMBER = 200
_LARGEST_EXPONENT = 1000
_DEEPEST_TEXT = 3


def names(text: str) -> frozenset[str]:
    """The words of `text` as a set."""
    return frozenset(text.split())


class UnreadableError(ValueError):
    """The grammar cannot parse the answer."""


class UnknownCommandError(UnreadableError):
    """The answer contains a LaTeX command that math-verify supports and the grammar does not."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer."""

    kind: str
    """`number`, `word` (a run of letters), `command` (with its backslash), `matrix`, or `symbol` (one character)."""
    text: str
    spaced: bool = False
    """Whether white space precedes it."""
    value: Fraction | None = None
    """Value of a number."""
    quoted: bool = False
    r"""A word inside `\text{...}` or the like: never a product of variables."""
    base: int | None = None
    """Base of a number if it is not ten, as in 101_2."""

    def is_symbol(self, *texts: str) -> bool:
        """Whether the token is one of these symbols."""
        return self.kind == "symbol" and self.text in texts

    def is_command(self, *texts: str) -> bool:
        """Whether the token is one of these commands."""
        return self.kind == "command" and self.text in texts

    def is_word(self, *texts: str) -> bool:
        """Whether the token is one of these words, ignoring case."""
        return self.kind == "word" and self.text.lower() in texts


_CHARACTERS = {
    "\u2212": "-",
    "\u2013": "-",
    "\u2014": "-",
    "\u2010": "-",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00f7": r"\div ",
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u221e": r"\infty ",
    "\u221a": r"\sqrt ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u00b0": r"^\circ ",
    "\u00b2": "^2 ",
    "\u00b3": "^3 ",
    "\u222a": r"\cup ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}",
    "\u2026": r"\ldots ",
    "\u2019": "'",
    "\u200b": "",
    "\u200c": "",
    "\u200d": "",
    "\u2060": "",
    "\ufeff": "",
}
_SAME_COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant", "lte"), "le"),
    **dict.fromkeys(("geq", "geqslant", "gte"), "ge"),
    **dict.fromkeys(("neq",), "ne"),
    **dict.fromkeys(("dots", "cdots", "dotsc"), "ldots"),
    **dict.fromkeys(("ast", "bullet"), "cdot"),
    **dict.fromkeys(("varnothing",), "emptyset"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "vert"),
    **dict.fromkeys(("lbrace",), "{"),
    **dict.fromkeys(("rbrace",), "}"),
    **dict.fromkeys(("land", "wedge"), "and"),
    **dict.fromkeys(("lor", "vee"), "or"),
    **dict.fromkeys(("degree", "degrees"), "circ"),
    **dict.fromkeys(("bar", "overline"), "overline"),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("infin",), "infty"),
    **dict.fromkeys(("varphi",), "phi"),
    **dict.fromkeys(("sim", "simeq"), "approx"),
}
_SYMBOL_COMMANDS = {
    "<": "<",
    ">": ">",
    "vert": "|",
    "%": "%",
    "$": "$",
    "textdollar": "$",
    "pounds": "\u00a3",
    "euro": "\u20ac",
    "yen": "\u00a5",
}
_IGNORED = names(
    "left right big Big bigl bigr Bigl Bigr bigg Bigg biggl biggr displaystyle textstyle limits boxed fbox mathit "
    "mathbf boldsymbol bm mathsf mathnormal operatorname rm bf it ensuremath"
)
_TEXT = names("text textbf textit textrm textnormal texttt textsf mbox hbox mathrm emph")
_KNOWN = names(
    "frac sqrt binom pi infty cdot times div pm mp le ge ne approx in cup circ over choose ldots emptyset { } and or "
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp lfloor rfloor lceil rceil langle rangle "
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi "
    "psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell overline"
)
_FOR_LIBRARY = names("int iint oint sum prod lim mathbb setminus cap max min gcd lcm det sup")
_SPACES = {",": " ", ";": " ", ":": " ", " ": " ", "quad": "   ", "qquad": "   ", "hspace": " ", "\n": " "}
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "array", "smallmatrix"))

_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d+)?")
_SPACED = re.compile(r"[1-9]\d{0,2}(?: \d{3})+(?! ?[\d/])(?:\.\d+)?")
_PLAIN = re.compile(rf"{_NUMBER}(?:[eE][-+]?\d{{1,4}}(?![\w^]))?")
_BASED = re.compile(r"([0-9A-Z]*\d[0-9A-Z]*|[A-Z]+)_(?:(\d)(?!\d)|\{\s*(\d{1,2})\s*\})")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_ENDLESS = re.compile(r"(\d*)\.(\d*?)(\d)\3{2,}(?:\.\.\.|\\l?dots)")
_SPELLED_TIMES = re.compile(r"(?<=\d) ?[xX] ?(?=10 ?(?:\^|\*\*))")
_RANGE = re.compile(r"(?<=\d)[\u2013\u2014](?=\d)")
_COMPARISONS = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne "}
_COMPARISON = re.compile(r"[<>]=|(?<=[a-z ])!=")
_BEGIN = re.compile(r"\\(begin|end)\s*\{([A-Za-z]+)\*?\}(?:\s*\{[clr|\s]*\})?")


def cleaned(text: str) -> str:
    """`text` with mathematical characters as LaTeX, without outer spaces and final punctuation."""
    text = _RANGE.sub(r"\\text{ to }", text)
    for character, command in _CHARACTERS.items():
        text = text.replace(character, command)
    text = _COMPARISON.sub(lambda match: _COMPARISONS[match[0]], text)
    text = text.replace("{,}", ",").replace(r"\$", "\x00").replace("\u00a0", " ").replace("\u202f", " ").strip()
    if text.count("$") % 2 == 0:  # pairs delimit mathematics; a single one is a currency
        text = text.replace("$", "")
    text = text.replace("\x00", "$")
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        text = text.replace(opening, " ").replace(closing, " ")
    text = text.replace("**", "^") if re.search(r"[\w)]\*\*[\w({-]", text) else text.replace("**", "")
    text = text.strip()
    return text if text.endswith("...") else text.rstrip(".,;: \n\t")


def tokens_of(text: str, *, grouped: bool = True) -> list[Token]:
    r"""The tokens of an answer.

    Args:
        text: result of `cleaned`.
        grouped: whether "1,234" is one number; otherwise commas always separate.

    Raises:
        UnreadableError: it is too long, or contains an unknown character.
        UnknownCommandError: it contains a LaTeX command that the grammar does not know.
    """
    if len(text) > LONGEST_ANSWER:
        raise UnreadableError(f"{len(text)} characters")
    found = _tokens(_spaces_of_latex(_SPELLED_TIMES.sub(r" \\times ", text)), grouped, 0)
    if len(found) > _MOST_TOKENS:
        raise UnreadableError(f"{len(found)} tokens")
    return found


def has_groups(text: str) -> bool:
    """Whether `text` contains an expression such as 1,234, which may be one number or two."""
    return _GROUPED.search(text) is not None


def _spaces_of_latex(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        return _SPACES.get(match[1], match[0])

    return _COMMAND.sub(replace, re.sub(r"\\!\s*", "", text)).replace("~", " ")


def _tokens(text: str, grouped: bool, depth: int) -> list[Token]:
    if depth > _DEEPEST_TEXT:
        raise UnreadableError("nested text")
    found: list[Token] = []
    place = 0
    while place < len(text):
        spaced = text[place].isspace()
        if spaced:
            place += len(text[place:]) - len(text[place:].lstrip())
        if place == len(text):
            break
        if text[place] == "\\":
            tokens, place = _command(text, place, spaced, grouped, depth)
            found += tokens
            continue
        token, place = _plain_token(text, place, spaced, grouped)
        found.append(token)
    return found


def _plain_token(text: str, place: int, spaced: bool, grouped: bool) -> tuple[Token, int]:
    character = text[place]
    if based := _BASED.match(text, place):
        token = _based(based, spaced)
        if token is not None:
            return token, based.end()
    if character.isdigit() or (character == "." and text[place + 1 : place + 2].isdigit()):
        return _number(text, place, spaced, grouped)
    if character == "." and text.startswith("...", place):
        return Token("command", r"\ldots", spaced), place + 3
    if word := re.compile(r"[^\W\d_]+(?:['\-.][^\W\d_]+)*\.?(?!\w)|[^\W\d_]+").match(text, place):
        written = word[0]
        if len(written.rstrip(".")) == 1 or "-" in written or ("." in written and not _is_half_of_day(written)):
            # x-y and a.b are not words
            written = re.match(r"[^\W\d_]+", written)[0]  # type: ignore[index]
        return Token("word", written, spaced), place + len(written)
    if not character.isprintable():
        raise UnreadableError(f"character {character!r}")
    return Token("symbol", character, spaced), place + 1


def _is_half_of_day(word: str) -> bool:
    return word.lower().replace(".", "") in ("am", "pm")


def _number(text: str, place: int, spaced: bool, grouped: bool) -> tuple[Token, int]:
    if repeating := _REPEATING.match(text, place) or _ENDLESS.match(text, place):
        whole, fixed, period = repeating[1], repeating[2], repeating[3] or repeating[4]
        _refuse_long(repeating[0])
        nines = (10 ** len(period) - 1) * 10 ** len(fixed)
        value = Fraction(int(whole or 0)) + Fraction(int(fixed or 0), 10 ** len(fixed)) + Fraction(int(period), nines)
        return Token("number", repeating[0], spaced, value), repeating.end()
    match = (_GROUPED.match(text, place) if grouped else None) or _SPACED.match(text, place)
    match = match or _PLAIN.match(text, place)
    if match is None:
        raise UnreadableError(f"number {text[place : place + 20]!r}")
    written = match[0].replace(",", "").replace(" ", "")
    _refuse_long(written)
    _, _, exponent = written.lower().partition("e")
    if exponent and abs(int(exponent)) > _LARGEST_EXPONENT:
        raise UnreadableError(f"exponent {exponent}")
    return Token("number", match[0], spaced, Fraction(written)), match.end()


def _refuse_long(written: str) -> None:
    if len(written) > _LONGEST_NUMBER:
        raise UnreadableError(f"number of {len(written)} characters")


def _based(match: re.Match[str], spaced: bool) -> Token | None:
    base = int(match[2] or match[3])
    _refuse_long(match[1])
    if not 2 <= base <= 36:
        return None
    try:
        value = int(match[1], base)
    except ValueError:
        return None
    return Token("number", match[1], spaced, Fraction(value), base=base)


def _command(text: str, place: int, spaced: bool, grouped: bool, depth: int) -> tuple[list[Token], int]:
    r"""The tokens of the command that starts at `place`, and the index of its end."""
    if environment := _BEGIN.match(text, place):
        if environment[2] not in _MATRICES:
            raise UnreadableError(f"environment {environment[2]}")
        return [Token("matrix", environment[1], spaced)], environment.end()
    match = _COMMAND.match(text, place)
    if match is None:
        raise UnreadableError("a backslash at the end")
    name, end = match[1], match.end()
    if name == "\\":
        return [Token("symbol", "\\\\", spaced)], end
    name = _SAME_COMMANDS.get(name, name)
    if name in _SYMBOL_COMMANDS:
        return [Token("symbol", _SYMBOL_COMMANDS[name], spaced)], end
    if name in _IGNORED:
        if name in ("left", "right") and text[end : end + 1] == ".":
            end += 1
        return [], end
    if name in _TEXT:
        inner, end = _braced(text, end)
        return _text_tokens(inner, name, spaced, grouped, depth), end
    if name not in _KNOWN:
        raise (UnknownCommandError if name in _FOR_LIBRARY else UnreadableError)(f"command \\{name}")
    return [Token("command", "\\" + name, spaced)], end


def _braced(text: str, place: int) -> tuple[str, int]:
    """Content of the braces that start at `place`, and the index of their end."""
    while text[place : place + 1].isspace():
        place += 1
    if text[place : place + 1] != "{":
        raise UnreadableError("text without braces")
    depth = 0
    for end in range(place, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[place + 1 : end], end + 1
    raise UnreadableError("open braces")


def _text_tokens(inner: str, command: str, spaced: bool, grouped: bool, depth: int) -> list[Token]:
    found = _tokens(inner, grouped, depth + 1)
    symbol = command == "mathrm" and len(inner.strip()) == 1  # \mathrm{e} is the number, \text{m} the unit
    made = []
    for index, token in enumerate(found):
        quoted = token.kind == "word" and not symbol
        made.append(
            Token(token.kind, token.text, token.spaced or (spaced and index == 0) or quoted, token.value, quoted,
                  token.base)
        )  # fmt: skip
    return made
