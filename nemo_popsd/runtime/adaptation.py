"""One change to a library, with the line that needs it, and how changes are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Adaptation:
    """One thing that a library does which this machine, or these layers, cannot.

    Attributes:
        name: what is adapted.
        needed_by: file and line of the library, and what stands there.
        apply: makes the change; raises RuntimeError when the library no longer has that line.
    """

    name: str
    needed_by: str
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
                raise  # it is not installed, which the command line says
            raise RuntimeError(f"{adaptation.name}: {error}; revise {listed_in}") from error
