"""Values of several sections that are valid separately but not together are refused."""

from __future__ import annotations

import pytest

from nemo_popsd.config.contradictions import check_sections
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import FP8Config, OptimizerConfig
from nemo_popsd.rollout.config import RolloutConfig


def test_a_schedule_that_does_not_fit_the_run_is_refused() -> None:
    config = PopsdConfig()
    config.optimizer.warmup_steps = config.training.steps
    config.optimizer.min_lr = config.optimizer.lr
    check_sections(config)
    config.optimizer.warmup_steps += 1
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps=201 with training\.steps=200"):
        check_sections(config)
    config.optimizer.warmup_steps = 0
    config.optimizer.min_lr *= 2
    with pytest.raises(UserError, match=r"optimizer\.min_lr"):
        check_sections(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            r"updates_per_step=1;.*set optimizer\.",
        ),
        ({"grad_dtype": "bf16"}, r"grad_dtype=bf16 with student\.precision=fp32.*student\.precision=bf16"),
        ({"state_dtype": "bf16"}, r"state_dtype=bf16 with student\.precision=fp32"),
        ({"host_share": 0.5}, r"host_share=0\.5 with student\.precision=fp32.*optimizer\.host_share=0"),
    ],
)
def test_settings_of_the_optimizer_that_the_run_has_no_use_for_are_refused(
    settings: dict[str, object], message: str
) -> None:
    config = PopsdConfig()
    check_sections(config)
    config.student.precision = "fp32"
    config.optimizer = OptimizerConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        check_sections(config)
    config.student.precision, config.training.updates_per_step = "bf16", 2
    check_sections(config)


def test_a_token_budget_needs_rollouts_on_disk_and_one_update() -> None:
    with pytest.raises(UserError, match=r"rollout\.tokens_per_step=5 with rollout\.save=false"):
        RolloutConfig(tokens_per_step=5, save=False)
    with pytest.raises(UserError, match=r"rollout\.tokens_per_step=5 with rollout\.engine=vllm"):
        RolloutConfig(tokens_per_step=5, engine="vllm")
    config = PopsdConfig()
    with pytest.raises(UserError, match=r"rollout\.max_age=0 with rollout\.tokens_per_step=5"):
        RolloutConfig(tokens_per_step=5, max_age=0)
    config.rollout.tokens_per_step, config.training.updates_per_step = 5, 2
    with pytest.raises(UserError, match=r"rollout\.tokens_per_step=5 with training\.updates_per_step=2"):
        check_sections(config)
    config.training.updates_per_step = 1
    check_sections(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.precision": "fp32"}, r"fp8\.frozen=true with student\.precision=fp32"),
        ({"student.layers": "local"}, r"student\.layers=local; need Transformer Engine's layers"),
        ({"fp8.rollouts": True, "rollout.engine": "vllm"}, r"rollout\.engine=vllm.*set rollout\.vllm\.quantization"),
        ({"student.frozen_copy": "host"}, r"frozen_copy=host; .*fp8\.frozen=false"),
    ],
)
def test_fp8_where_it_has_no_effect_is_refused(changes: dict[str, object], message: str) -> None:
    config = PopsdConfig()
    for name, value in changes.items():
        section, _, field = name.partition(".")
        setattr(getattr(config, section), field, value)
    config.fp8.rollouts = False
    check_sections(config)
    config.fp8 = FP8Config(frozen=True, rollouts="fp8.rollouts" in changes)
    with pytest.raises(UserError, match=message):
        check_sections(config)
