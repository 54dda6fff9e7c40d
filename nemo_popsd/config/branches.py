"""Checks of the views, the thinking and the weights of the frozen branches. Imports no torch."""

from __future__ import annotations

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings
from nemo_popsd.data.sources import check_source
from nemo_popsd.data.views import NONE, OTHER, Views
from nemo_popsd.distillation.target_families import FAMILIES, build_target
from nemo_popsd.errors import UserError


def check_branches(config: PopsdConfig) -> None:
    """Refuse thinking, views and weights of the frozen branches that do not fit the target.

    Raises:
        UserError: names the settings.
    """
    data, name = config.data, config.distillation.target.family
    family = FAMILIES[name]
    for role in ("privileged", "reference_only"):
        teacher = getattr(data, role)
        if family.same_prefix and teacher.enable_thinking not in (None, data.enable_thinking):
            raise UserError(
                "configuration",
                got=f"data.{role}.enable_thinking={str(teacher.enable_thinking).lower()} with data.enable_thinking="
                f"{str(data.enable_thinking).lower()} and distillation.target.family={name}",
                need="the same thinking in all contexts: this target adds the difference of the teachers to the "
                "student's context token by token, and a thought that only one of the prompts closes would count as an "
                "effect of the question",
                fix=f"set data.{role}.enable_thinking=null, or another family",
            )
        if family.view is not None and teacher.view not in (None, family.view):
            raise UserError(
                "configuration",
                got=f"data.{role}.view={teacher.view} with distillation.target.family={name}",
                need=f"the view {family.view}, which the family determines",
                fix=f"set data.{role}.view=null, or another family",
            )
    _check_weights_of_branches(config)
    views = Views.of(data_settings(config))
    if family.borrowed == "reference" and views.privileged == views.reference and views.reference in (NONE, OTHER):
        raise UserError(
            "configuration",
            got=f"data.privileged.view={views.privileged} and data.reference_only.view={views.reference} with "
            f"distillation.target.family={name}",
            need="teachers that differ: with one prompt for both, their difference is 0 at every token",
            fix="set data.privileged.view or data.reference_only.view",
        )


def _check_weights_of_branches(config: PopsdConfig) -> None:
    """Refuse weights that need two output matrices, or an output matrix that changes between the updates of a step.

    The loss uses one output matrix for the frozen branches. LoRA keeps it frozen, so any combination shares it.
    """
    teacher, anchor, target = config.distillation.teacher, config.distillation.anchor, config.distillation.target
    if config.student.adaptation == "lora":
        return
    if build_target(target).base and teacher != anchor:
        raise UserError(
            "configuration",
            got=f"distillation.teacher.weights={teacher.weights} and distillation.anchor.weights={anchor.weights} with "
            f"student.adaptation=full and distillation.target.family={target.family}",
            need="the same weights for teachers and anchor, because they share one output matrix; LoRA keeps it frozen",
            fix="set distillation.anchor equal to distillation.teacher, or student.adaptation=lora",
        )
    if teacher.weights == "live" and config.training.updates_per_step > 1:
        raise UserError(
            "configuration",
            got=f"distillation.teacher.weights=live with student.adaptation=full and training.updates_per_step="
            f"{config.training.updates_per_step}",
            need="one update per step: the teachers' states are computed before the first update, which changes the "
            "output matrix",
            fix="set training.updates_per_step=1, distillation.teacher.weights=snapshot or student.adaptation=lora",
        )


def check_training_source(config: PopsdConfig) -> None:
    """Refuse training rows without a column that a teacher's view or the token weights need.

    Raises:
        UserError: names the setting.
    """
    views = Views.of(data_settings(config))
    check_source(
        config.data.train,
        setting="data.train",
        need_reference=views.need_reference,
        need_answer=views.need_answer or config.distillation.tokens.by_answer,
    )
