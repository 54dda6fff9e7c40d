"""User-defined answer checkers: functions that installed packages register by name.

A package registers a checker as an entry point of the group `nemo_popsd.answer_checkers`, and `evaluation.checker`
selects it. It replaces the rules of `nemo_popsd.evaluation.equivalence`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from nemo_popsd.errors import UserError

GROUP = "nemo_popsd.answer_checkers"
"""Group of the entry points."""


class AnswerChecker(Protocol):
    """Decides whether two answers are the same.

    To count votes, it is also called with two answers of the model. It should be symmetric and deterministic. There is
    no time limit.
    """

    def __call__(self, answer: str, expected: str) -> bool:
        """Whether `answer`, extracted from a response, is the answer `expected`. Neither is empty."""
        ...


def load_checker(name: str) -> AnswerChecker:
    """The checker that is registered as `name`. Imports its package.

    Raises:
        UserError: no package registers it, several do, or it cannot be imported or called.
    """
    entry = _entry(name)
    try:
        checker = entry.load()
    except Exception as error:  # code of the user
        raise _refused(name, f"{entry.value}, which cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(checker):
        raise _refused(name, f"{entry.value}, which is not a function")
    return cast(AnswerChecker, checker)


def checker_version(name: str) -> str:
    """Distribution and version of the checker `name`, to record with the scores.

    Raises:
        UserError: as for `load_checker`.
    """
    distribution = _entry(name).dist
    return "" if distribution is None else f"{distribution.name} {distribution.version}"


def checked(checker: AnswerChecker, name: str, answer: str, expected: str) -> bool:
    """The decision of `checker`.

    Raises:
        UserError: it raises an error or does not return a bool.
    """
    try:
        same = checker(answer, expected)
    except Exception as error:  # code of the user
        got = f"{type(error).__name__}: {error}, for answer {answer[:100]!r} and expected {expected[:100]!r}"
        raise _refused(name, got) from error
    if same is not True and same is not False:
        raise _refused(name, f"the result {same!r} for answer {answer[:100]!r} and expected {expected[:100]!r}")
    return same


def _entry(name: str) -> EntryPoint:
    registered = entry_points(group=GROUP)
    found = [entry for entry in registered if entry.name == name]
    if len(found) != 1:
        names = ", ".join(sorted({entry.name for entry in registered})) or "none"
        raise _refused(name, f"{len(found)} installed checkers of this name (registered: {names})")
    return found[0]


def _refused(name: str, got: str) -> UserError:
    return UserError(
        "answer checker",
        got=f"evaluation.checker={name!r}: {got}",
        need=f"one entry point of the group {GROUP} that is a function (answer, expected) -> bool",
        fix="install or repair its package, or set evaluation.checker=''",
    )
