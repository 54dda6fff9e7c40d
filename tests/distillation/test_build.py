"""Configuration to target: each family's coefficients, and the context that borrows a reference."""

from __future__ import annotations

import pytest

from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.distillation.build import build_target
from nemo_popsd.distillation.config import TargetConfig

MEMBERS = {
    "purified": ((0, 1, 0.5, -0.5), Borrowed.NONE),
    "opsd": ((0, 0, 1, 0), Borrowed.NONE),
    "beta_opsd": ((0, 0.75, 0.25, 0), Borrowed.NONE),
    "student_pmi": ((1, 0, 0.5, -0.5), Borrowed.NONE),
    "other_reference": ((0, 0, 1, 0), Borrowed.PRIVILEGED),
    "wrong_reference": ((0, 0, 1.5, -0.5), Borrowed.SECOND),
}


@pytest.mark.parametrize("family", MEMBERS)
def test_a_family_is_its_coefficients_and_its_contexts(family: str) -> None:
    config = TargetConfig(family=family, beta=2.0, weight=0.25, alpha=0.5, cap=7.0, temperature=1.25)
    target = build_target(config)
    coefficients, borrowed = MEMBERS[family]
    assert (target.student, target.base, target.privileged, target.reference) == coefficients
    assert target.cap == (7.0 if family in ("purified", "student_pmi") else None)
    assert target.temperature == 1.25
    assert Borrowed(config.borrowed) is borrowed
