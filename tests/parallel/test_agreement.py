from __future__ import annotations

from typing import Any

from nemo_popsd.errors import START_AGAIN, TransientError, UserError
from tests.harness import run_ranks


def _fail(rank: int, world_size: int) -> list[Any]:
    from nemo_popsd.parallel.agreement import raise_on_all_ranks

    def full() -> None:
        if rank == 1:
            raise OSError(28, "No space left on device", "/x")

    def defect() -> None:
        if rank == 1:
            raise KeyError("a")

    def damaged() -> None:
        if rank == 1:
            raise UserError(
                "model m", got="half a file", need="a complete one", fix="fetch it again", advice=["its log:", "..."]
            )

    def stale() -> None:
        if rank == 1:
            raise OSError(116, "Stale file handle", "/x")

    def gone() -> None:
        raise TransientError("server", got="it died", fix="start again", advice=["its log:", "..."])

    def one_of_each() -> None:
        stale()
        raise OSError(28, "No space left on device")

    raised: list[Any] = []
    for action in (full, defect, damaged, stale, gone, one_of_each, lambda: None):
        try:
            raise_on_all_ranks("saving", action, need="space", fix="free some")
            raised.append(None)
        except (UserError, RuntimeError) as error:
            raised.append((type(error).__name__, str(error), getattr(error, "advice", ())))
    return raised


def test_all_ranks_raise_what_one_raised() -> None:
    for raised in run_ranks(_fail, 2):
        assert raised == [
            ("UserError", "saving: got No space left on device: /x (rank 1); need space; free some", ()),
            ("RuntimeError", "saving: KeyError: 'a' (rank 1)", ()),
            ("UserError", "model m: got half a file; need a complete one; fetch it again", ("its log:", "...")),
            ("TransientError", f"saving: Stale file handle: /x (rank 1); {START_AGAIN}", ()),
            ("TransientError", "server: it died; start again", ("its log:", "...")),
            ("UserError", "saving: got No space left on device (rank 0); need space; free some", ()),
            None,
        ]
