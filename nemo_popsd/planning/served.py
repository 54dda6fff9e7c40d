"""Memory of vLLM servers."""

from __future__ import annotations

from nemo_popsd.planning.parameters import total_parameters
from nemo_popsd.planning.workload import Case


def served_cache_tokens(case: Case) -> float:
    """Tokens that fit into the key-value cache of a vLLM server; negative if its weights do not fit."""
    vllm, sizes = case.config.rollout.vllm, case.sizes
    weights = total_parameters(sizes) * case.element / vllm.tensor
    cache = vllm.cache_bytes or vllm.memory_share * case.plan.hardware.memory_gib * 2**30 - weights
    return cache / (2 * sizes.key_width / vllm.tensor * sizes.layers * case.element)


def server_bytes(case: Case) -> float:
    """Bytes of a vLLM server on a GPU shared with the training; 0 without a server, or if it has its own GPUs."""
    rollout = case.config.rollout
    if rollout.engine != "vllm" or rollout.vllm.launcher:
        return 0.0
    if rollout.vllm.cache_bytes:
        return total_parameters(case.sizes) * case.element / rollout.vllm.tensor + rollout.vllm.cache_bytes
    return rollout.vllm.memory_share * case.plan.hardware.memory_gib * 2**30
