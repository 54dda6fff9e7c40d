"""The one error that users see for what they can cause, and mend, themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any


class UserError(ValueError):
    """Bad input, configuration, data or checkpoint, told in the form "got X, need Y, set Z".

    Raised before expensive work starts. The command line prints it without a traceback and exits
    with status 2; everything else that escapes is a defect of ours and keeps its traceback.

    Args:
        what: what was being done or read, e.g. ``"configuration conf/tiny.yaml"`` or
            ``"data/train.jsonl:17"``.
        got: what was found.
        need: what would be accepted.
        mend: which setting or file to change.
        advice: lines to print below the message, where one line cannot hold what helps.
    """

    def __init__(self, what: str, *, got: object, need: str, mend: str, advice: Sequence[str] = ()) -> None:
        self.what = what
        self.got = got
        self.need = need
        self.mend = mend
        self.advice = tuple(advice)
        super().__init__(f"{what}: got {got}; need {need}; {mend}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes, which learn `got` in words."""
        rebuild = partial(UserError, self.what, got=str(self.got), need=self.need, mend=self.mend, advice=self.advice)
        return rebuild, ()


class StopRequested(Exception):  # noqa: N818 nothing went wrong
    """The run was asked to save and stop by a signal. Raised on all ranks at the same point, at which the
    weights are those of the last completed step.
    """


SAVED_AND_STOPPED = 85
"""Exit status of a run that was asked to stop, has saved, and wants to be started again."""
