"""Errors that end a command with one line: those that the user fixes, and those that a new start may fix."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from functools import partial
from typing import Any


class UserError(ValueError):
    """Bad input, configuration, data or checkpoint, reported in the form "got X, need Y, set Z".

    Raised before expensive work starts. The command line prints it without a traceback and exits with status 2.

    Args:
        what: what was being done or read, e.g. ``"configuration conf/tiny.yaml"`` or
            ``"data/train.jsonl:17"``.
        got: what was found.
        need: what would be accepted.
        fix: which setting or file to change.
        advice: further lines to print below the message.
    """

    def __init__(self, what: str, *, got: object, need: str, fix: str, advice: Sequence[str] = ()) -> None:
        self.what = what
        self.got = got
        self.need = need
        self.fix = fix
        self.advice = tuple(advice)
        super().__init__(f"{what}: got {got}; need {need}; {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the error for other processes, with `got` as text."""
        rebuild = partial(UserError, self.what, got=str(self.got), need=self.need, fix=self.fix, advice=self.advice)
        return rebuild, ()


class TransientError(RuntimeError):
    """A fault that no setting causes and that a new start may fix: a process of the run died or hung, a server died, a
    file system failed for a moment.

    The command line prints it without a traceback and exits with status 1. On this status, batch scripts start the
    command again, up to their limit of restarts.

    Args:
        what: what was being done, e.g. ``"checkpoint runs/a/checkpoints/step-000050"``.
        got: what happened.
        fix: what to do about it.
        advice: further lines to print below the message.
    """

    def __init__(self, what: str, *, got: object, fix: str, advice: Sequence[str] = ()) -> None:
        self.what = what
        self.got = got
        self.fix = fix
        self.advice = tuple(advice)
        super().__init__(f"{what}: {got}; {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the error for other processes, with `got` as text."""
        return partial(TransientError, self.what, got=str(self.got), fix=self.fix, advice=self.advice), ()


START_AGAIN = "start the same command again; a training run resumes from its newest checkpoint"
"""The usual fix of a `TransientError`."""

_USER_ERRNOS = frozenset(
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
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def system_error(what: str, error: OSError, *, need: str, fix: str, where: str = "") -> UserError | TransientError:
    """The error to raise when the operating system refused an operation.

    A full disk, a missing permission or file, and similar errors remain until the user changes something: a
    `UserError`. All others (EIO, ESTALE, ETIMEDOUT, a broken connection, ...) may not occur at the next start: a
    `TransientError`.

    Args:
        what: what was being done or read.
        error: the system's error. Without an errno it becomes a `UserError`: libraries raise such errors for bad files.
        need: what would be accepted, for a `UserError`.
        fix: which setting or file to change, for a `UserError`.
        where: text to append to the system's message, e.g. the rank.
    """
    got = (describe_error(error) + f" {where}").rstrip()
    if is_transient(error):
        return TransientError(what, got=got, fix=START_AGAIN)
    return UserError(what, got=got, need=need, fix=fix)


def user_or_transient(error: UserError) -> UserError | TransientError:
    """`error`, or a `TransientError` in its place if a transient fault of the system caused it.

    A function that reads a file reports it as damaged when it cannot be read, whatever the reason. The reason is the
    cause or context of the exception, which this function inspects for all of them.
    """
    cause: BaseException | None = error
    while cause is not None:
        cause = cause.__cause__ or cause.__context__
        if cause is not None and is_transient(cause):
            return TransientError(error.what, got=error.got, fix=f"{START_AGAIN}; if it happens again, {error.fix}")
    return error


def is_transient(error: BaseException) -> bool:
    """Whether `error` is a fault of the system that may be absent at the next start, with nothing changed."""
    code = _errno(error)
    return code is not None and code not in _USER_ERRNOS


def describe_error(error: BaseException) -> str:
    """An error in one phrase: the system's message and file for an `OSError`, type and text for others."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _errno(error: BaseException) -> int | None:
    """The errno of `error`; libraries in Rust give it in the text of the message only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _OS_ERROR.search(str(error))
    if match:
        return int(match[1])
    return errno.ETIMEDOUT if isinstance(error, TimeoutError | ConnectionError) else None


class StopRequested(Exception):  # noqa: N818 not an error
    """A signal requested that the run save and stop. Raised on all ranks at the same point, where the weights are
    those of the last completed step.
    """


SAVED_AND_STOPPED = 85
"""Exit status of a run that a signal stopped, that has saved, and that the same command continues."""
