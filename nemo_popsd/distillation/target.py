"""What the student is drawn towards: the target distribution P, a log-linear family by coefficients.

    log P = a_S·sg[log π_θ] + a_0·log π_0 + a_T·log π_T + a_R·log π_ref − log Z

π_θ is the live student, π_0 the frozen base, π_T the privileged teacher, π_ref the second context; sg[·] stops the
gradient. With a `cap` c, the pair (π_T, π_ref) enters centred and soft-clipped (Purified OPSD, arXiv 2607.02234):

    Δ  = log π_T − log π_ref                      (eq. 13)
    Δ̄  = Δ − mean of Δ over the true vocabulary   (eq. 14)
    Δ̃  = c·tanh(Δ̄ / c)                            (eq. 15)
    P  = softmax(log π_0 + Δ̃ / β)                 (eq. 16, 17): a_0 = 1, a_T = 1/β, a_R = −1/β

The equations are the paper's; the family, and its form in two hidden vectors (`hidden_pair`), are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_popsd.errors import UserError


class Target(Protocol):
    """What the losses need to know of a target; `PurifiedTarget` and `LogLinearTarget` provide it."""

    @property
    def student(self) -> float:
        """a_S, the weight of the live student's (constant) log-probabilities."""

    @property
    def base(self) -> float:
        """a_0, the weight of the frozen base's log-probabilities."""

    @property
    def privileged(self) -> float:
        """a_T, the weight of the privileged teacher's log-probabilities."""

    @property
    def reference(self) -> float:
        """a_R, the weight of the second context's log-probabilities."""

    @property
    def cap(self) -> float | None:
        """The c of eq. 15; None leaves centring and tanh out."""

    @property
    def temperature(self) -> float:
        """Divides the logits of all four distributions before the softmax."""


def _refuse(name: str, value: object, need: str) -> UserError:
    return UserError("distillation target", got=f"{name}={value!r}", need=need, fix=f"set {name}")


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise _refuse(name, value, "a finite number above 0")


@dataclass(frozen=True)
class PurifiedTarget:
    """The paper's target, eq. 13-17: P = softmax(log π_0 + Δ̃/β).

    Raises:
        UserError: a value is not a finite positive number.
    """

    beta: float = 1.0
    """Strength of the pull back to the base: a larger beta moves P less. Divides after the tanh."""

    cap: float | None = 10.0
    """c of eq. 15. None leaves centring and tanh out (centring alone changes nothing: it is constant in each row)."""

    temperature: float = 1.0
    """Softmax temperature of the loss, for all distributions; not the sampling temperature of the rollouts."""

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta)
        _require_positive("temperature", self.temperature)
        if self.cap is not None:
            _require_positive("cap", self.cap)

    @property
    def student(self) -> float:
        """a_S = 0."""
        return 0.0

    @property
    def base(self) -> float:
        """a_0 = 1."""
        return 1.0

    @property
    def privileged(self) -> float:
        """a_T = 1/β."""
        return 1.0 / self.beta

    @property
    def reference(self) -> float:
        """a_R = −1/β."""
        return -1.0 / self.beta


@dataclass(frozen=True, kw_only=True)
class LogLinearTarget:
    """Any member of the family (*ours*); the class methods are the published members.

    Raises:
        UserError: a value is not finite, nothing but the student has a coefficient, or a cap comes with
            reference ≠ −privileged (the tanh applies to the difference of the two).
    """

    student: float = 0.0
    base: float = 0.0
    privileged: float = 0.0
    reference: float = 0.0
    cap: float | None = None
    temperature: float = 1.0

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
                raise _refuse(
                    "reference", self.reference, f"reference=-privileged={-self.privileged!r} where cap is set"
                )

    @classmethod
    def purified(cls, beta: float = 1.0, cap: float | None = 10.0, temperature: float = 1.0) -> LogLinearTarget:
        """Purified OPSD (2607.02234) as a member of the family; equals `PurifiedTarget` with the same arguments."""
        _require_positive("beta", beta)
        return cls(base=1.0, privileged=1.0 / beta, reference=-1.0 / beta, cap=cap, temperature=temperature)

    @classmethod
    def opsd(cls, temperature: float = 1.0) -> LogLinearTarget:
        """OPSD (2601.18734): P = π_T. Also OP²SD (2608.09228), whose second context is a matter of the data alone."""
        return cls(privileged=1.0, temperature=temperature)

    @classmethod
    def beta_opsd(cls, weight: float, anchor: str = "base", temperature: float = 1.0) -> LogLinearTarget:
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
    def contrast(cls, alpha: float, temperature: float = 1.0) -> LogLinearTarget:
        """Wrong-reference contrast (RLCSD/ECTR): P ∝ π_T^(1+α) · π_wrong^(−α)."""
        return cls(privileged=1.0 + alpha, reference=-alpha, temperature=temperature)

    @classmethod
    def live_student_pmi(cls, beta: float = 1.0, cap: float | None = 10.0, temperature: float = 1.0) -> LogLinearTarget:
        """The ablation of Purified OPSD whose anchor is the moving student instead of the frozen base."""
        _require_positive("beta", beta)
        return cls(student=1.0, privileged=1.0 / beta, reference=-1.0 / beta, cap=cap, temperature=temperature)


def uses_shift(target: Target) -> bool:
    """Whether the target needs the shift vector d = h_T − h_ref: only the tanh keeps it from joining the anchor."""
    return target.cap is not None and target.privileged != 0


def uses_anchor(target: Target) -> bool:
    """Whether the target needs an anchor vector; the live-student ablation with a cap needs none."""
    return target.base != 0 or (not uses_shift(target) and (target.privileged != 0 or target.reference != 0))


class HiddenPair(NamedTuple):
    """The two vectors of size H that determine a target token (*ours*); see `hidden_pair`."""

    anchor: Tensor | None
    """[N, H], or None where the target has no linear part."""

    shift: Tensor | None
    """h_T less h_ref, [N, H] in fp32 (float64 for float64), or None where the target has no cap."""


class SeparateStates(NamedTuple):
    """The frozen branches' final hidden states as they are, for a model whose logits are not linear in them."""

    base: Tensor | None
    """h_0 [N, H], or None where its coefficient is 0, as are the two below."""

    privileged: Tensor | None
    """h_T [N, H]."""

    reference: Tensor | None
    """h_ref [N, H]."""


FrozenStates = HiddenPair | SeparateStates
"""What determines the target of each token."""


def frozen_states(
    target: Target,
    base_hidden: Tensor | None,
    privileged_hidden: Tensor | None,
    reference_hidden: Tensor | None,
    *,
    soft_cap: float | None = None,
) -> FrozenStates:
    """What the loss needs of the frozen branches: `hidden_pair`, or with a `soft_cap` on the logits all of them.

    Raises:
        ValueError: a hidden state that the target needs is missing.
    """
    if soft_cap is None:
        return hidden_pair(target, base_hidden, privileged_hidden, reference_hidden)
    needed = _needed(target, base_hidden, privileged_hidden, reference_hidden)
    kept = [None if coefficient == 0 or h is None else h.detach() for coefficient, h in needed]
    return SeparateStates(*kept)


def _needed(target: Target, *hidden: Tensor | None) -> list[tuple[float, Tensor | None]]:
    """Coefficients with the states of base, privileged and reference, none of them missing."""
    coefficients = (target.base, target.privileged, target.reference)
    for name, coefficient, h in zip(("base", "privileged", "reference"), coefficients, hidden, strict=True):
        if coefficient != 0 and h is None:
            raise ValueError(f"the target {target} needs {name}_hidden; got None")
    return list(zip(coefficients, hidden, strict=True))


def hidden_pair(
    target: Target,
    base_hidden: Tensor | None,
    privileged_hidden: Tensor | None,
    reference_hidden: Tensor | None,
) -> HiddenPair:
    """Reduce the frozen branches' final hidden states to the vectors that the loss needs (*ours*).

    With logits W·h and one frozen W in all frozen branches, log-partition terms are constant in each row, so

        with a cap:  log P = W·(a_0·h_0) + a_T·c·tanh((W·d − w̄·d)/c) + const,  d = h_T − h_ref
        without:     log P = W·(a_0·h_0 + a_T·h_T + a_R·h_ref) + const;  for Purified h_0 + d/β: one vector

    (a_S·log π_θ is added by the loss.) Sums are formed in fp32, float64 for float64 inputs: to round the sum once is
    more exact than to subtract rounded logits. No collective; a vector with coefficient 1 is passed through uncopied.

    Args:
        target: the family member.
        base_hidden: h_0 [N, H], final hidden state after the last norm; may be None where base is 0.
        privileged_hidden: h_T [N, H]; may be None where privileged is 0.
        reference_hidden: h_ref [N, H]; may be None where reference is 0.

    Returns:
        Anchor and shift, detached.

    Raises:
        ValueError: a hidden state that the target needs is missing.
    """
    needed = _needed(target, base_hidden, privileged_hidden, reference_hidden)
    terms = [(coefficient, h.detach()) for coefficient, h in needed if coefficient != 0 and h is not None]
    if target.privileged == 0 or target.reference != -target.privileged:
        return HiddenPair(_combine(terms), None)
    # Formed first, also where it joins the anchor: equal teachers then leave the base exactly as it is.
    shift = _combine([(1.0, terms[-2][1]), (-1.0, terms[-1][1])])
    assert shift is not None
    if uses_shift(target):
        return HiddenPair(_combine(terms[:-2]), shift)
    return HiddenPair(_combine([*terms[:-2], (target.privileged, shift)]), None)


def _combine(terms: list[tuple[float, Tensor]]) -> Tensor | None:
    if not terms:
        return None
    coefficient, first = terms[0]
    if len(terms) == 1 and coefficient == 1:
        return first
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = first.to(dtype) * coefficient if coefficient != 1 else first.to(dtype, copy=True)
    for coefficient, hidden in terms[1:]:
        total.add_(hidden.to(dtype), alpha=coefficient)
    return total
