"""The errors that end a command with one line: what the user must change, and what starting again may fix."""

from __future__ import annotations

import errno
import re
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
        fix: which setting or file to change.
        advice: lines to print below the message, where one line cannot hold what helps.
    """

    def __init__(self, what: str, *, got: object, need: str, fix: str, advice: Sequence[str] = ()) -> None:
        self.what = what
        self.got = got
        self.need = need
        self.fix = fix
        self.advice = tuple(advice)
        super().__init__(f"{what}: got {got}; need {need}; {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes, which learn `got` in words."""
        rebuild = partial(UserError, self.what, got=str(self.got), need=self.need, fix=self.fix, advice=self.advice)
        return rebuild, ()


class TransientError(RuntimeError):
    """A fault that no setting is to blame for and that starting again may fix: a process of the run died or hung, a
    server died, a file system failed for a moment.

    The command line prints it without a traceback and exits with status 1, which batch scripts answer with another
    start, within their bound.

    Args:
        what: what was being done, e.g. ``"checkpoint runs/a/checkpoints/step-000050"``.
        got: what happened.
        fix: what to do about it.
        advice: lines to print below the message, where one line cannot hold what helps.
    """

    def __init__(self, what: str, *, got: object, fix: str, advice: Sequence[str] = ()) -> None:
        self.what = what
        self.got = got
        self.fix = fix
        self.advice = tuple(advice)
        super().__init__(f"{what}: {got}; {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes, which learn `got` in words."""
        return partial(TransientError, self.what, got=str(self.got), fix=self.fix, advice=self.advice), ()


START_AGAIN = "start the same command again; a training run resumes from its newest checkpoint"
"""The usual fix of a `TransientError`."""

_FOR_THE_USER = frozenset(
    (
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMFILE,
        errno.EINVAL,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EROFS,
        errno.ETXTBSY,
        errno.EXDEV,
    )
)
_STATUS_IN_WORDS = re.compile(r"\(os error (\d+)\)")


def system_error(what: str, error: OSError, *, need: str, fix: str, where: str = "") -> UserError | TransientError:
    """What to raise where the operating system refused something.

    No room, no permission, no such file and their like stay until the user changes something. Everything else (EIO,
    ESTALE, ETIMEDOUT, a connection that broke, ...) may be gone at the next start.

    Args:
        what: what was being done or read.
        error: what the system said. Without a number it counts as the user's: libraries raise such for bad files.
        need: what would be accepted, if it is the user's.
        fix: which setting or file to change, if it is the user's.
        where: added to what the system said, e.g. the rank.
    """
    got = (describe_error(error) + f" {where}").rstrip()
    if is_transient(error):
        return TransientError(what, got=got, fix=START_AGAIN)
    return UserError(what, got=got, need=need, fix=fix)


def user_or_transient(error: UserError) -> UserError | TransientError:
    """`error`, or a `TransientError` in its place if it was made of a fault of the system that may pass.

    Whoever reads a file calls it damaged when it cannot be read, whatever the reason; the reason is the context of the
    exception, and stands here in one place for all of them.
    """
    behind: BaseException | None = error
    while behind is not None:
        behind = behind.__cause__ or behind.__context__
        if behind is not None and is_transient(behind):
            return TransientError(error.what, got=error.got, fix=f"{START_AGAIN}; if it stays, {error.fix}")
    return error


def is_transient(error: BaseException) -> bool:
    """Whether it is a fault of the system that nobody needs to change anything for."""
    number = _status(error)
    return number is not None and number not in _FOR_THE_USER


def describe_error(error: BaseException) -> str:
    """An error in one phrase: of the system's what it said of which file, of others type and text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _status(error: BaseException) -> int | None:
    """The system's number for an error; libraries in Rust tell it in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _STATUS_IN_WORDS.search(str(error))
    if found:
        return int(found[1])
    return errno.ETIMEDOUT if isinstance(error, TimeoutError | ConnectionError) else None


class StopRequested(Exception):  # noqa: N818 nothing went wrong
    """The run was asked to save and stop by a signal. Raised on all ranks at the same point, at which the
    weights are those of the last completed step.
    """


SAVED_AND_STOPPED = 85
"""Exit status of a run that was asked to stop, has saved, and wants to be started again."""
