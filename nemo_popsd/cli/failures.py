"""Detection of communication errors that are caused by the loss of another rank."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_popsd.errors import START_AGAIN, TransientError
from nemo_popsd.observability.flight_recorder import FLIGHT_PREFIX, FOLDER
from nemo_popsd.parallel.launcher import read_launch

_LIBRARIES = re.compile(r"gloo|NCCL|TCPStore|c10d|ProcessGroup|socket", re.IGNORECASE)
_TIMED_OUT = re.compile(r"time[d]?[ -]?out|timeout", re.IGNORECASE)
_DISCONNECTED = re.compile(
    r"connection (was |is )?(likely )?(closed|reset|refused|aborted)|broken pipe|remote process exited|"
    r"communicator was aborted|pair closure|failed to (recv|send)|unexpected end of|connection was closed",
    re.IGNORECASE,
)
_LONGEST_TEXT = 400


class LostPeerError(TransientError):
    """An error on this rank that a failure of another rank caused."""


def as_lost_peer(error: BaseException, *, command: str, config: object) -> LostPeerError | None:
    """Return the error to raise instead of `error` if it shows that another rank has ended or does not respond.

    Args:
        error: error raised on this rank.
        command: name of the command, e.g. `train`.
        config: configuration of the run; any object other than a `PopsdConfig` is ignored.

    Returns:
        None for any other error, which keeps its traceback.
    """
    text = " ".join(str(error).split())
    if not _is_of_communication(error, text):
        return None
    launch = read_launch()
    who = f"rank {launch.rank} of {launch.world_size}"
    advice = [f"{type(error).__name__}: {text[:_LONGEST_TEXT]}"]
    if _TIMED_OUT.search(text):
        seconds = getattr(getattr(config, "training", None), "collective_timeout", None)
        advice += _flight_recorder(text, config)
        limit = f"training.collective_timeout={seconds:g} s" if seconds and command != "evaluate" else "its time limit"
        return LostPeerError(
            f"collective on {who}",
            got=f"it waited longer than {limit} for another rank, which hangs, is stopped or needs more time",
            fix=f"check what the other ranks do; {START_AGAIN}; set training.collective_timeout higher if they only "
            "need more time",
            advice=advice,
        )
    return LostPeerError(
        f"collective on {who}",
        got="another rank has ended, or the connection to it is lost",
        fix=f"read the output of the rank that ended first; {START_AGAIN}",
        advice=advice,
    )


def _flight_recorder(text: str, config: object) -> list[str]:
    """Describe where NCCL's Flight Recorder writes the last collectives of each rank, and how to read them."""
    output = getattr(config, "output", None)
    if "NCCL" not in text or not isinstance(output, str):
        return []
    folder = Path(output) / FOLDER
    return [
        f"the last collectives of each rank are in {folder}/{FLIGHT_PREFIX}*; to find the missing rank, run: "
        f"torchfrtrace --prefix {FLIGHT_PREFIX} {folder}"
    ]


def _is_of_communication(error: BaseException, text: str) -> bool:
    """Whether a communication library raised `error` because of another rank.

    Torch has exception classes for some of these errors (DistNetworkError, ...); gloo raises plain RuntimeError.
    """
    is_dist_error = any(cls.__name__ == "DistError" for cls in type(error).__mro__)
    if not is_dist_error and not (isinstance(error, RuntimeError) and _LIBRARIES.search(text)):
        return False
    return bool(_TIMED_OUT.search(text) or _DISCONNECTED.search(text))
