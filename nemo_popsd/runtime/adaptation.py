"""A change to a library, with the line of the library that needs it, and how changes are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Adaptation:
    """A change to a library for something that does not work on this machine or with local layers.

    Attributes:
        name: what is adapted.
        needed_by: file and line of the library, and the code there.
        apply: makes the change; raises RuntimeError if the library no longer has that code.
    """

    name: str
    needed_by: str
    apply: Callable[[], None]


def apply_all(adaptations: Iterable[Adaptation], *, listed_in: str) -> None:
    """Applies each adaptation, in order.

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
                raise  # it is not installed; the command line reports that
            raise RuntimeError(f"{adaptation.name}: {error}; revise {listed_in}") from error
