"""The supported sets of library versions, each named after the NGC NeMo container that has it.

`pyproject.toml` declares the union of the ranges. Versions of different stacks do not work together: Megatron-Bridge
imports names of its megatron-core. Imports only `packaging`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Stack:
    """Versions that are tested together.

    Attributes:
        container: tag of ``nvcr.io/nvidia/nemo`` with these versions.
        ranges: distribution to version specifiers.
    """

    container: str
    ranges: Mapping[str, str]

    def outside(self, versions: Mapping[str, str]) -> list[str]:
        """Distributions whose version is outside the range of this stack; those that `versions` lacks are ignored."""
        from packaging.specifiers import SpecifierSet

        return [
            name
            for name, specifiers in self.ranges.items()
            if name in versions and not SpecifierSet(specifiers).contains(versions[name], prereleases=True)
        ]


STACKS = (
    Stack(
        "26.02.01",
        MappingProxyType(
            {
                "python": ">=3.11,<3.13",
                "torch": ">=2.9",
                "megatron-core": ">=0.16,<0.17",
                "megatron-bridge": ">=0.3.1,<0.4",
                "transformers": ">=4.57,<5",
                "nemo-toolkit": ">=2.6,<3.1",
                "transformer-engine": ">=2.9,<2.14",
            }
        ),
    ),
    Stack(
        "26.08",
        MappingProxyType(
            {
                "python": ">=3.12,<3.14",
                "torch": ">=2.12",
                "megatron-core": ">=0.19,<0.20",
                "megatron-bridge": ">=0.6,<0.7",
                "transformers": ">=5.8,<5.13",
                "nemo-toolkit": ">=3.0,<3.1",
                "transformer-engine": ">=2.16,<3",
            }
        ),
    ),
)
"""Oldest first. The ranges are the versions that `make test` and `make container-check` cover, those of the
container, and those between."""


def closest(versions: Mapping[str, str]) -> Stack:
    """The stack with the fewest distributions of `versions` outside its ranges; the newer one of two that are equal."""
    return min(reversed(STACKS), key=lambda stack: len(stack.outside(versions)))
