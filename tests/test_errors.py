import errno
import pickle

import pytest

from nemo_popsd.errors import START_AGAIN, TransientError, UserError, system_error, user_or_transient


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), UserError, "No space left on device: /x"),
        (PermissionError(errno.EACCES, "Permission denied"), UserError, "Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), UserError, "Read-only file system"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), UserError, "Disk quota exceeded"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), UserError, "No such file or directory"),
        (OSError("no number"), UserError, "OSError: no number"),
        (OSError("a.safetensors: No space left on device (os error 28)"), UserError, "os error 28"),
        (OSError("a.safetensors: Input/output error (os error 5)"), TransientError, "os error 5"),
        (OSError(errno.EIO, "Input/output error"), TransientError, "Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), TransientError, "Stale file handle"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), TransientError, "Connection timed out"),
        (TimeoutError("no answer"), TransientError, "no answer"),
        (ConnectionResetError("closed"), TransientError, "closed"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), TransientError, "not connected"),
    ],
)
def test_a_system_error_is_for_the_user_or_transient(error: OSError, kind: type, words: str) -> None:
    raised = system_error("saving", error, need="space", fix="free some", where="(rank 1)")
    assert type(raised) is kind
    assert words in str(raised)
    assert "(rank 1)" in str(raised)
    assert ("free some" in str(raised)) == (kind is UserError)


def fail_to_read(error: Exception) -> UserError:
    """Returns the error of a reader that reports a file as damaged, whatever the reason."""
    try:
        try:
            raise error
        except Exception:
            raise UserError("checkpoint c", got="a file that cannot be read", need="one", fix="copy it") from None
    except UserError as raised:
        return raised


def test_a_temporarily_unreadable_file_is_not_reported_as_damaged() -> None:
    stale = user_or_transient(fail_to_read(OSError(errno.ESTALE, "Stale file handle")))
    assert type(stale) is TransientError
    assert str(stale) == f"checkpoint c: a file that cannot be read; {START_AGAIN}; if it happens again, copy it"
    for error in (ValueError("no JSON"), FileNotFoundError(errno.ENOENT, "No such file"), OSError("no number")):
        raised = fail_to_read(error)
        assert user_or_transient(raised) is raised


def test_errors_survive_pickling() -> None:
    for error in (
        UserError("a", got=ValueError("b"), need="c", fix="d", advice=["e"]),
        TransientError("a", got=ValueError("b"), fix="c", advice=["e"]),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.advice) == (type(error), str(error), ("e",))
