"""Errors that end a command with one line: those that the user must fix, and those that a restart may fix."""

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
    """A fault that no setting causes and that a restart may fix: a process of the run died or hung, a server died, or a
    file system failed temporarily.

    The command line prints it without a traceback and exits with status 1. Batch scripts restart the command on this
    status, up to their restart limit.

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
    """The error to raise for a failed system call.

    A full disk, a missing permission or file, and similar errors persist until the user changes something; they become
    a `UserError`. All others (EIO, ESTALE, ETIMEDOUT, a broken connection, ...) may not recur after a restart; they
    become a `TransientError`.

    Args:
        what: what was being done or read.
        error: the error. Without an errno it becomes a `UserError`: libraries raise such errors for invalid files.
        need: what would be accepted, for a `UserError`.
        fix: which setting or file to change, for a `UserError`.
        where: text to append to the system's message, e.g. the rank.
    """
    got = (describe_error(error) + f" {where}").rstrip()
    if is_transient(error):
        return TransientError(what, got=got, fix=START_AGAIN)
    return UserError(what, got=got, need=need, fix=fix)


def user_or_transient(error: UserError) -> UserError | TransientError:
    """`error`, or a `TransientError` that replaces it if a transient system fault caused it.

    A function that cannot read a file reports it as damaged, whatever the reason. This function inspects the chain of
    causes and contexts of the exception to find the reason.
    """
    cause: BaseException | None = error
    while cause is not None:
        cause = cause.__cause__ or cause.__context__
        if cause is not None and is_transient(cause):
            return TransientError(error.what, got=error.got, fix=f"{START_AGAIN}; if it happens again, {error.fix}")
    return error


def is_transient(error: BaseException) -> bool:
    """Whether `error` is a system fault that may not recur after a restart, without any change by the user."""
    code = _errno(error)
    return code is not None and code not in _USER_ERRNOS


def describe_error(error: BaseException) -> str:
    """Describes an error in one phrase: system message and file for an `OSError`, type and text for others."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _errno(error: BaseException) -> int | None:
    """The errno of `error`; Rust libraries report it only in the text of the message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _OS_ERROR.search(str(error))
    if match:
        return int(match[1])
    return errno.ETIMEDOUT if isinstance(error, TimeoutError | ConnectionError) else None


class StopRequested(Exception):  # noqa: N818 not an error
    """A signal requested that the run save and stop. Raised on all ranks at the same point, with the weights of the
    last completed step.
    """


SAVED_AND_STOPPED = 85
"""Exit status of a run that saved and stopped after a signal; the same command resumes it."""
