"""Refuses weights that contain NaN or Inf before a model is exported or converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from nemo_popsd.errors import UserError


def require_finite(what: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields `tensors` unchanged. The host waits for the device once per tensor.

    Args:
        what: the operation, for the message.
        tensors: names and tensors.

    Raises:
        UserError: a tensor contains NaN or Inf; the message names it.
    """
    for name, tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise non_finite_error(what, [name])
        yield name, tensor


def non_finite_error(what: str, names: Sequence[str] = ()) -> UserError:
    """The error for weights that contain NaN or Inf.

    Args:
        what: the operation, for the message.
        names: known tensors that contain NaN or Inf.
    """
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return UserError(
        what,
        got=f"NaN or Inf in {names[0]}{more}" if names else "weights that are NaN or Inf",
        need="finite weights",
        fix="export an earlier checkpoint",
    )
