"""From configuration to target and divergence."""

from __future__ import annotations

from nemo_popsd.distillation.config import DivergenceConfig, TargetConfig
from nemo_popsd.distillation.divergence import Divergence
from nemo_popsd.distillation.target import LogLinearTarget, PurifiedTarget, Target


def build_target(config: TargetConfig) -> Target:
    """The family member that `config` names."""
    if config.family == "purified":
        return PurifiedTarget(beta=config.beta, cap=config.cap, temperature=config.temperature)
    if config.family == "student_pmi":
        return LogLinearTarget.live_student_pmi(config.beta, config.cap, config.temperature)
    if config.family == "beta_opsd":
        return LogLinearTarget.beta_opsd(config.weight, temperature=config.temperature)
    if config.family == "wrong_reference":
        return LogLinearTarget.contrast(config.alpha, config.temperature)
    return LogLinearTarget.opsd(config.temperature)


def build_divergence(config: DivergenceConfig) -> Divergence:
    """The divergence that `config` names."""
    return Divergence(kind=config.kind, weight=config.weight)
