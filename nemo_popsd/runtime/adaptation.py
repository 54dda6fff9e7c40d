"""A change to a library, the functions that need it, and how changes are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Adaptation:
    """A change to library code that does not work on this machine or with local layers.

    Attributes:
        name: what is adapted.
        needed_by: dotted names of the library's functions that need it, or of modules where importing them fails.
        reason: what these functions do that does not work.
        apply: makes the change; raises RuntimeError when the library no longer has what is changed.
    """

    name: str
    needed_by: tuple[str, ...]
    reason: str
    apply: Callable[[], None]


def apply_all(adaptations: Iterable[Adaptation], *, listed_in: str) -> None:
    """Applies each, in order.

    Args:
        adaptations: what to change; each is idempotent.
        listed_in: the file that an error names.

    Raises:
        RuntimeError: a library no longer has what an adaptation changes.
    """
    for adaptation in adaptations:
        try:
            adaptation.apply()
        except (AttributeError, ImportError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "megatron.bridge":
                raise  # It is not installed, which the command line reports.
            raise RuntimeError(f"{adaptation.name}: {error}; revise {listed_in}") from error
