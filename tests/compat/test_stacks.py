"""The stacks: their ranges lie within those of the package, and exclude each other's versions."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nemo_popsd.compat.stacks import STACKS, closest
from tests.stacks import ROOT, installed

NEWEST, OLDEST = STACKS[-1], STACKS[0]
VERSIONS = {
    "26.02.01": {"python": "3.11.7", "megatron-core": "0.16.1", "megatron-bridge": "0.3.1", "transformers": "4.57.6"},
    "26.08": {"python": "3.12.1", "megatron-core": "0.19.2", "megatron-bridge": "0.6.2", "transformers": "5.12.1"},
}


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.container)
def test_the_package_declares_the_union_of_the_ranges(stack):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["bridge"], *extras["gpu"]]
    declared = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
    declared["python"] = SpecifierSet(project["requires-python"])
    for name, version in VERSIONS[stack.container].items():
        assert version in declared[name], (name, version)
    assert stack.ranges.keys() <= declared.keys()
    for version in ("0.15.3", "0.17.0", "0.18.1", "0.20.0"):
        assert version not in declared["megatron-core"]


def test_a_mixture_is_reported_against_the_closest_stack():
    for container, versions in VERSIONS.items():
        assert closest(versions).container == container
        assert closest(versions).outside(versions) == []
    mixed = VERSIONS["26.08"] | {"megatron-bridge": "0.3.1"}
    assert closest(mixed) is NEWEST
    assert closest(mixed).outside(mixed) == ["megatron-bridge"]
    mixed = VERSIONS["26.02.01"] | {"transformers": "5.12.1"}
    assert closest(mixed) is OLDEST
    assert closest(mixed).outside(mixed) == ["transformers"]


def test_only_the_newer_stack_has_python_3_13():
    assert NEWEST.outside({"python": "3.13.0"}) == []
    assert NEWEST.outside({"python": "3.14.0"}) == OLDEST.outside({"python": "3.13.0"}) == ["python"]


def test_versions_of_a_container_and_missing_packages_are_accepted():
    assert OLDEST.outside({"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "megatron-core": "0.16.0"}) == []
    of_26_08 = {"python": "3.12.3", "megatron-core": "0.19.1", "megatron-bridge": "0.6.1", "transformers": "5.12.1"}
    assert NEWEST.outside({"torch": "2.13.0a0+5e3a2e6b1d.nv26.06", **of_26_08}) == []
    assert NEWEST.outside({"megatron-core": "0.19.0", "megatron-bridge": "0.6.0+51885cf"}) == []


def test_the_installed_versions_are_those_of_one_stack():
    assert installed() in VERSIONS
