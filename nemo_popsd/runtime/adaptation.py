"""Changes to libraries: the functions that need them, and how they are applied."""

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
"""Only the older supported version."""


@dataclass(frozen=True)
class Adaptation:
    """A change to library code that does not work on this machine or with local layers.

    Attributes:
        name: name of the adapted part.
        needed_by: dotted names of the library functions that need the change, or of modules that fail to import.
        reason: the operation in these functions that does not work.
        versions: the library with the versions that need the change; it is not applied to others.
        apply: applies the change; raises RuntimeError if the library no longer has the adapted part.
    """

    name: str
    needed_by: tuple[str, ...]
    reason: str
    versions: str
    apply: Callable[[], None]

    @property
    def needed(self) -> bool:
        """Whether the installed version is among `versions`; true if the version is unknown."""
        requirement = Requirement(self.versions)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            return True
        return requirement.specifier.contains(version, prereleases=True)


def apply_all(adaptations: Iterable[Adaptation], *, listed_in: str) -> None:
    """Apply the adaptations that the installed versions need, in order.

    Args:
        adaptations: changes to apply; each is idempotent.
        listed_in: file with the list, for error messages.

    Raises:
        RuntimeError: a library no longer has the part that an adaptation changes.
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
