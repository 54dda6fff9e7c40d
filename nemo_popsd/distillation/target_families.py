"""Target families: the coefficients of each target distribution and properties derived from them.

    log P = a_S·sg[log π_θ] + a_0·log π_0 + a_T·log π_T + a_R·log π_ref − log Z

π_θ is the live student, π_0 the frozen base, π_T the privileged teacher, π_ref the second context; sg[·] stops the
gradient. With a `cap` c, the pair (π_T, π_ref) enters centred and bounded (Purified OPSD, arXiv 2607.02234):

    Δ  = log π_T − log π_ref                      (eq. 13)
    Δ̄  = Δ − mean of Δ over the true vocabulary   (eq. 14)
    Δ̃  = c·tanh(Δ̄ / c)                            (eq. 15)
    P  = softmax(log π_0 + Δ̃ / β)                 (eq. 16, 17): a_0 = 1, a_T = 1/β, a_R = −1/β

The equations are the paper's; the parametrisation by coefficients is ours.

This module does not import torch. The loss, the frozen branches, the planner and the diagnosis read the coefficients of
a `Target` and the properties derived from them; none of them depends on the name of a family. A new family needs an
entry in `FAMILIES`, and a setting in `distillation/config.py` for each parameter of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nemo_popsd.errors import UserError

_FP32_BYTES = 4


def _refuse(name: str, value: object, need: str) -> UserError:
    return UserError("distillation target", got=f"{name}={value!r}", need=need, fix=f"set {name}")


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise _refuse(name, value, "a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target distribution: the coefficients of the four branches, the cap and the temperature.

    The class methods are the published targets.

    Raises:
        UserError: a value is not finite, only the student has a nonzero coefficient, or a cap is set with
            reference ≠ −privileged (the tanh applies to the difference of the two).
    """

    student: float = 0.0
    """a_S, the weight of the live student's (constant) log-probabilities."""
    base: float = 0.0
    """a_0, the weight of the frozen base's log-probabilities."""
    privileged: float = 0.0
    """a_T, the weight of the privileged teacher's log-probabilities."""
    reference: float = 0.0
    """a_R, the weight of the second context's log-probabilities."""
    cap: float | None = None
    """c of eq. 15. None omits centring and tanh (centring alone has no effect: it is constant per token)."""
    temperature: float = 1.0
    """Divides the logits of all four distributions before the softmax; not the sampling temperature of rollouts."""

    def __post_init__(self) -> None:
        for name in ("student", "base", "privileged", "reference"):
            if not math.isfinite(getattr(self, name)):
                raise _refuse(name, getattr(self, name), "a finite number")
        _require_positive("temperature", self.temperature)
        if self.base == self.privileged == self.reference == 0:
            raise _refuse("base", self.base, "a frozen distribution with a coefficient other than 0")
        if self.cap is not None:
            _require_positive("cap", self.cap)
            if self.reference != -self.privileged:
                raise _refuse("reference", self.reference, f"reference=-privileged={-self.privileged!r} if cap is set")

    @classmethod
    def purified(cls, beta: float = 1.0, cap: float | None = 10.0, temperature: float = 1.0) -> Target:
        """Purified OPSD (2607.02234): P = softmax(log π_0 + Δ̃/β). A larger beta keeps P closer to the base."""
        _require_positive("beta", beta)
        return cls(base=1.0, privileged=1.0 / beta, reference=-1.0 / beta, cap=cap, temperature=temperature)

    @classmethod
    def opsd(cls, temperature: float = 1.0) -> Target:
        """OPSD (2601.18734): P = π_T. Also OP²SD (2608.09228), whose teacher sees another row's reference."""
        return cls(privileged=1.0, temperature=temperature)

    @classmethod
    def beta_opsd(cls, weight: float, anchor: str = "base", temperature: float = 1.0) -> Target:
        """β-OPSD (2607.28582): P ∝ π_T^w · anchor^(1−w), with the frozen "base" or the live "student" as anchor."""
        if not 0 <= weight <= 1:
            raise _refuse("weight", weight, "a number in [0, 1]")
        if anchor not in ("base", "student"):
            raise _refuse("anchor", anchor, "one of base, student")
        rest = 1.0 - weight
        if anchor == "base":
            return cls(base=rest, privileged=weight, temperature=temperature)
        return cls(student=rest, privileged=weight, temperature=temperature)

    @classmethod
    def contrast(cls, alpha: float, temperature: float = 1.0) -> Target:
        """Wrong-reference contrast (RLCSD/ECTR): P ∝ π_T^(1+α) · π_wrong^(−α)."""
        return cls(privileged=1.0 + alpha, reference=-alpha, temperature=temperature)

    @classmethod
    def live_student_pmi(cls, beta: float = 1.0, cap: float | None = 10.0, temperature: float = 1.0) -> Target:
        """The ablation of Purified OPSD that anchors on the live student instead of the frozen base."""
        _require_positive("beta", beta)
        return cls(student=1.0, privileged=1.0 / beta, reference=-1.0 / beta, cap=cap, temperature=temperature)

    def frozen_branches(self, *, diagnosed: bool = False) -> tuple[str, ...]:
        """The frozen branches that the target needs, in order; diagnosed tokens need both teachers."""
        needed = {
            "base": self.base != 0,
            "privileged": self.privileged != 0 or diagnosed,
            "reference": self.reference != 0 or diagnosed,
        }
        return tuple(name for name, is_needed in needed.items() if is_needed)

    @property
    def has_difference(self) -> bool:
        """Whether T and ref enter only through their difference, which is then computed first."""
        return self.privileged != 0 and self.reference == -self.privileged

    @property
    def uses_shift(self) -> bool:
        """Whether the loss needs the shift vector d = h_T − h_ref; without a cap the shift is part of the anchor."""
        return self.cap is not None and self.privileged != 0

    @property
    def uses_anchor(self) -> bool:
        """Whether the loss needs an anchor vector; the live-student ablation with a cap needs none."""
        return bool(self._anchor_coefficients)

    @property
    def vectors(self) -> int:
        """Number of vectors of the hidden size that determine the target of a token (anchor, shift, or both)."""
        return int(self.uses_anchor) + int(self.uses_shift)

    @property
    def sums_anchor(self) -> bool:
        """Whether the anchor is a new fp32 vector rather than the states of one branch."""
        return self.uses_anchor and self._anchor_coefficients != (1.0,)

    @property
    def summed_bytes(self) -> int:
        """Bytes per hidden element and token of the target's vectors, excluding the states of the branches."""
        return _FP32_BYTES * (int(self.sums_anchor) + int(self.uses_shift))

    def vector_bytes(self, element: int) -> int:
        """Bytes per hidden element and token of the target's vectors, for a model with `element` bytes per element."""
        return self.summed_bytes + (element if self.uses_anchor and not self.sums_anchor else 0)

    @property
    def _anchor_coefficients(self) -> tuple[float, ...]:
        """Nonzero coefficients of the branches that are summed in the anchor."""
        terms = (self.base,) if self.uses_shift else (self.base, self.privileged, self.reference)
        return tuple(coefficient for coefficient in terms if coefficient != 0)


class TargetSettings(Protocol):
    """Settings of `distillation.target` that families read; see `nemo_popsd.distillation.config.TargetConfig`."""

    family: str
    beta: float
    cap: float | None
    weight: float
    alpha: float
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Family:
    """A value of `distillation.target.family`: its target as a function of the settings, and its contexts."""

    summary: str
    """Description and publication, in one line."""
    target: Callable[[TargetSettings], Target]
    """Returns the target for given settings."""
    settings: tuple[str, ...] = ()
    """Fields of `TargetSettings` that `target` reads, in addition to `temperature`."""
    borrowed: str = ""
    """The context that holds another row's reference: "privileged", "reference", or "" for none."""
    view: str | None = None
    """Value of `data.privileged.view` that the family prescribes; None if it prescribes none."""
    same_prefix: bool = False
    """Whether all contexts need the same assistant prefix, with or without thinking. The difference of the teachers is
    added to the student token by token; if only one prompt closed its thinking block, the effect of that would be
    attributed to the question."""


FAMILIES: dict[str, Family] = {
    "purified": Family(
        summary="Purified OPSD (arXiv 2607.02234)",
        target=lambda config: Target.purified(config.beta, config.cap, config.temperature),
        settings=("beta", "cap"),
        same_prefix=True,
    ),
    "opsd": Family(
        summary="OPSD (arXiv 2601.18734)",
        target=lambda config: Target.opsd(config.temperature),
    ),
    "beta_opsd": Family(
        summary="β-OPSD (arXiv 2607.28582), a geometric mean of teacher and base",
        target=lambda config: Target.beta_opsd(config.weight, temperature=config.temperature),
        settings=("weight",),
    ),
    "student_pmi": Family(
        summary="Purified OPSD whose anchor is the live student, an ablation",
        target=lambda config: Target.live_student_pmi(config.beta, config.cap, config.temperature),
        settings=("beta", "cap"),
        same_prefix=True,
    ),
    "reference_free": Family(
        summary="a teacher without a reference, the baseline of views of the reference (arXiv 2609.20612)",
        target=lambda config: Target.opsd(config.temperature),
        view="none",
    ),
    "other_reference": Family(
        summary="OP²SD (arXiv 2608.09228): OPSD whose teacher sees another row's reference",
        target=lambda config: Target.opsd(config.temperature),
        borrowed="privileged",
    ),
    "wrong_reference": Family(
        summary="contrast (RLCSD, ECTR): OPSD's teacher against one that sees another row's reference",
        target=lambda config: Target.contrast(config.alpha, config.temperature),
        settings=("alpha",),
        borrowed="reference",
    ),
}
"""Every family by its name in the configuration."""


def build_target(config: TargetSettings) -> Target:
    """The target that `config` specifies."""
    return FAMILIES[config.family].target(config)
