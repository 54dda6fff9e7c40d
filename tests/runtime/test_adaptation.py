"""The errors for adaptations whose target is missing."""

from __future__ import annotations

import pytest

from nemo_popsd.runtime.adaptation import MEGATRON_CORE, Adaptation, apply_all


def adaptation(error: Exception) -> Adaptation:
    def apply() -> None:
        raise error

    return Adaptation("the name", ("a.b",), "a reason", MEGATRON_CORE, apply)


@pytest.mark.parametrize("name", ["megatron.bridge", "something_that_is_not_installed.inside"])
def test_a_package_that_is_not_installed_is_reported_as_that(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        apply_all([adaptation(ModuleNotFoundError("none", name=name))], listed_in="file.py")


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("none", name="yaml.absent"), ImportError("no name"), AttributeError("no field")]
)
def test_a_library_that_has_changed_is_a_defect_of_the_adaptation(error: Exception) -> None:
    with pytest.raises(RuntimeError, match=r"the name: .*; revise file\.py"):
        apply_all([adaptation(error)], listed_in="file.py")
