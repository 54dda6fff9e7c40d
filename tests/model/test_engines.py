"""The engine that the configuration names."""

from __future__ import annotations

import pytest

from nemo_popsd.config.schema import PopsdConfig


@pytest.mark.slow  # imports NeMo
def test_samples_name_the_precision_that_generated_them() -> None:
    from nemo_popsd.model.engines import engine_name

    config = PopsdConfig()
    assert engine_name(config) == "Megatron, bf16"
    config.fp8.rollouts = True
    assert engine_name(config) == "Megatron, FP8 blockwise"
    config.rollout.engine = "vllm"
    assert engine_name(config) == "vLLM, bf16"
    config.rollout.vllm.quantization = "fp8_per_block"
    assert engine_name(config) == "vLLM, fp8_per_block"
