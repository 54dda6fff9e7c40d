"""Combines values of several sections for lower packages. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import DataConfig
from nemo_popsd.diagnosis.config import DiagnosisSettings
from nemo_popsd.distillation.target_families import FAMILIES


def data_settings(config: PopsdConfig) -> DataConfig:
    """Return the section `data`, with the view that the target family fixes, if any."""
    view = FAMILIES[config.distillation.target.family].view
    if view is None:
        return config.data
    teachers = (replace(teacher, view=view) for teacher in (config.data.privileged, config.data.reference_only))
    privileged, reference_only = teachers
    return replace(config.data, privileged=privileged, reference_only=reference_only)


def with_view(config: PopsdConfig, view: str) -> PopsdConfig:
    """Return `config` with this view for the privileged teacher, and for the reference-only one if it has no view."""
    return replace(config, data=replace(config.data, privileged=replace(config.data.privileged, view=view)))


def diagnosis_settings(config: PopsdConfig) -> DiagnosisSettings:
    """Return the values of `config` that a diagnosis needs."""
    return DiagnosisSettings(
        diagnosis=config.diagnosis,
        target=config.distillation.target,
        rollout=config.rollout,
        seed=config.seed,
        markers=config.evaluation.markers,
        frozen_tokens=config.training.frozen_tokens,
        packing=config.training.packing,
        expert_parallel=config.parallel.expert > 1,
        data_path=config.data.train.path,
        student_source=config.student.source,
    )


def shares_prefixes(config: PopsdConfig) -> bool:
    """Whether the frozen branches compute each distinct prefix once, if the layout allows (`training.share_prefixes`).

    `auto` enables sharing if the sequences of a row have most of their tokens in common. Otherwise sharing would save
    little and change the rounding.
    """
    setting = config.training.share_prefixes
    if setting != "auto":
        return setting == "true"
    return config.rollout.per_prompt > 1 or config.data.templates.order == "reference_first"
