"""A change to a library, the functions that need it, and how changes are applied."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

MEGATRON_CORE = "megatron-core>=0.16,<0.20"
"""Both supported versions."""
MEGATRON_BRIDGE = "megatron-bridge>=0.3.1,<0.7"
"""Both supported versions."""
MEGATRON_BRIDGE_0_3 = "megatron-bridge>=0.3.1,<0.4"
"""Only the older of the supported versions."""


@dataclass(frozen=True)
class Adaptation:
    """A change to library code that does not work on this machine or with local layers.

    Attributes:
        name: what is adapted.
        needed_by: dotted names of the library's functions that need it, or of modules where importing them fails.
        reason: what these functions do that does not work.
        versions: the library and the versions of it that need the change; it is not made to others.
        apply: makes the change; raises RuntimeError when the library no longer has what is changed.
    """

    name: str
    needed_by: tuple[str, ...]
    reason: str
    versions: str
    apply: Callable[[], None]

    @property
    def needed(self) -> bool:
        """Whether the installed version is among `versions`; also if it is unknown."""
        requirement = Requirement(self.versions)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            return True
        return requirement.specifier.contains(version, prereleases=True)


def apply_all(adaptations: Iterable[Adaptation], *, listed_in: str) -> None:
    """Applies those that the installed versions need, in order.

    Args:
        adaptations: what to change; each is idempotent.
        listed_in: the file that an error names.

    Raises:
        RuntimeError: a library no longer has what an adaptation changes.
    """
    for adaptation in adaptations:
        try:
            if adaptation.needed:
                adaptation.apply()
        except (AttributeError, ImportError) as error:
            if isinstance(error, ModuleNotFoundError) and _is_not_installed(error.name or ""):
                raise  # The command line reports it.
            raise RuntimeError(f"{adaptation.name}: {error}; revise {listed_in}") from error


def _is_not_installed(module: str) -> bool:
    top = module.partition(".")[0]
    return module == "megatron.bridge" or (top not in sys.modules and importlib.util.find_spec(top) is None)
