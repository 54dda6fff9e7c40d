"""Views, thinking and weights of the frozen branches that do not fit the target are refused."""

from __future__ import annotations

import pytest

from nemo_popsd.config.contradictions import check_sections
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.distillation.config import WeightsConfig
from nemo_popsd.errors import UserError


@pytest.mark.parametrize("role", ["privileged", "reference_only"])
def test_thinking_by_role_is_for_families_that_do_not_compare_contexts_token_by_token(role: str) -> None:
    config = PopsdConfig()
    for family in ("purified", "student_pmi", "opsd", "beta_opsd", "wrong_reference", "reference_free"):
        config.distillation.target.family = family
        teacher = getattr(config.data, role)
        teacher.enable_thinking = True
        check_sections(config)
        teacher.enable_thinking = False
        if family not in ("purified", "student_pmi"):
            check_sections(config)
            continue
        with pytest.raises(
            UserError,
            match=rf"data\.{role}\.enable_thinking=false with data\.enable_thinking=true .*family={family}; need the "
            "same thinking in all contexts: .*effect of the question",
        ):
            check_sections(config)


def test_views_that_a_family_has_no_use_for_are_refused() -> None:
    config = PopsdConfig()
    config.distillation.target.family = "reference_free"
    config.data.privileged.view = "none"
    check_sections(config)
    config.data.reference_only.view = "answer"
    with pytest.raises(UserError, match=r"data\.reference_only\.view=answer .*the view none, which the family"):
        check_sections(config)


def test_moving_weights_that_need_two_output_matrices_are_refused() -> None:
    config = PopsdConfig()
    config.distillation.teacher = WeightsConfig(weights="ema")
    assert config.student.adaptation == "lora"
    check_sections(config)
    config.student.adaptation = "full"
    with pytest.raises(
        UserError, match=r"teacher\.weights=ema and distillation\.anchor\.weights=frozen .*LoRA keeps it"
    ):
        check_sections(config)
    config.distillation.anchor = WeightsConfig(weights="ema")
    check_sections(config)
    config.distillation.anchor = WeightsConfig()
    config.distillation.target.family = "opsd"  # has no anchor
    check_sections(config)
    config.distillation.teacher.weights, config.training.updates_per_step = "live", 2
    with pytest.raises(UserError, match=r"teacher\.weights=live .*updates_per_step=2; need one update per step"):
        check_sections(config)


@pytest.mark.parametrize("view", ["none", "other"])
def test_views_that_make_both_teachers_equal_are_refused(view: str) -> None:
    config = PopsdConfig()
    config.data.privileged.view = view
    check_sections(config)  # the question makes the difference
    config.distillation.target.family = "wrong_reference"
    with pytest.raises(UserError, match=f"data.privileged.view={view} and .*need teachers that differ: .* is 0 at"):
        check_sections(config)
    config.data.reference_only.view = "answer"
    check_sections(config)
