"""Construction of the rollout engine selected by `rollout.engine`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from megatron.core import parallel_state

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.megatron.student import Student
from nemo_popsd.rollout.engine import RolloutEngine
from nemo_popsd.rollout.megatron_engine import MegatronEngine
from nemo_popsd.rollout.vllm.launch import AdapterShape, Replica, ServedModel, build_vllm_engine


def build_engine(
    settings: PopsdConfig,
    student: Student,
    architecture: HuggingFaceModel,
    *,
    weights_version: Callable[[], int],
    longest: Callable[[], int],
    stop_requested: Callable[[], bool],
) -> RolloutEngine:
    """Build the engine that generates from the student's live weights. Collective over the world; starts no server.

    Args:
        settings: configuration of the run.
        student: the model that generates.
        architecture: configuration and tokenizer files of the model.
        weights_version: returns the number of completed training steps.
        longest: returns the number of tokens of the longest expected sequence.
        stop_requested: see `StopSignals.while_decoding`.
    """
    if settings.rollout.engine == "megatron":
        return MegatronEngine(
            student.chunks,
            vocab_size=student.vocab_size,
            batch_rows=settings.rollout.batch_rows,
            cache_tokens=settings.rollout.cache_tokens,
            weights_version=weights_version,
            stop_requested=stop_requested,
            fp8=settings.fp8,
        )
    return build_vllm_engine(
        settings.rollout,
        _served(settings, student, architecture),
        Replica(
            parallel_state.get_data_parallel_rank(),
            shares_experts=parallel_state.get_expert_model_parallel_world_size() > 1,
        ),
        output=settings.output,
        timeout=timedelta(seconds=settings.training.collective_timeout),
        weights_version=weights_version,
        longest=longest,
        stop_requested=stop_requested,
    )


def engine_name(settings: PopsdConfig) -> str:
    """Return the engine's name for samples of an evaluation: a different engine or precision gives different tokens."""
    vllm, precision = settings.rollout.vllm, settings.student.precision
    if settings.rollout.engine == "megatron":
        return f"Megatron, FP8 {settings.fp8.recipe}" if settings.fp8.rollouts else f"Megatron, {precision}"
    if vllm.quantization != "none":
        return f"vLLM, {vllm.quantization}"
    return f"vLLM, {precision if vllm.dtype == 'student' else vllm.dtype}"


def _served(settings: PopsdConfig, student: Student, architecture: HuggingFaceModel) -> ServedModel:
    lora = settings.student.lora
    return ServedModel(
        source=settings.student.source,
        precision=settings.student.precision,
        lora=AdapterShape(rank=lora.rank, alpha=lora.alpha) if settings.student.adaptation == "lora" else None,
        has_experts=student.chunks[0].config.num_moe_experts is not None,
        weights=lambda: architecture.stream(student.chunks),
        adapters=lambda: architecture.stream_adapters(student.chunks),
        write_files=architecture.copy_artifacts,
        config_overrides=architecture.overrides,
    )
