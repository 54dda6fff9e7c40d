"""Configuration of the vLLM engine, and device memory before a server starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import UserError
from nemo_popsd.rollout.engine import SamplingParams
from nemo_popsd.rollout.vllm.config import VllmConfig
from tests.model.runs import TINY


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("tensor", [1, 8], [0]),
        ("dtype", ["student", "bf16", "fp16", "fp32"], ["bfloat16", ""]),
        ("memory_share", [0.1, 1.0], [0.0, 1.2]),
        ("cache_bytes", [0, 1], [-1]),
        ("bucket_bytes", [1], [0]),
        ("start_seconds", [0.5], [0]),
        ("answer_seconds", [0.5], [0]),
        ("restarts", [0, 5], [-1]),
        ("lora", ["auto", "adapter", "merged"], ["both"]),
        ("interface", ["auto", "weight-transfer", "worker-extension"], ["http"]),
    ],
)
def test_values_are_accepted_or_refused(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(VllmConfig(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(UserError, match=rf"rollout\.vllm\.{name}="):
            VllmConfig(**{name: value})


def test_the_section_belongs_to_a_run() -> None:
    config = load_config(TINY, ["rollout.engine=vllm", "rollout.vllm.launcher=[srun, -w, node7]"])
    assert (config.rollout.engine, config.rollout.vllm.launcher) == ("vllm", ["srun", "-w", "node7"])
    assert load_config(TINY, []).rollout.engine == "megatron"
    with pytest.raises(UserError, match=r"rollout\.engine='sglang'; need one of megatron, vllm"):
        load_config(TINY, ["rollout.engine=sglang"])
    with pytest.raises(UserError, match=r"nearest is rollout\.vllm\.bucket_bytes"):
        load_config(TINY, ["rollout.vllm.bucket_size=1"])


def test_torch_releases_cached_memory_before_a_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on the trainer's GPU starts, or wakes up, in every call."""
    from nemo_popsd.rollout.vllm.engine import VllmEngine

    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("memory"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**33))

    class Ranks:
        def together(self, *_: Any, **__: Any) -> None:
            events.append("server")
            raise RuntimeError("no server here")

    engine = VllmEngine(
        Ranks(),  # type: ignore[arg-type]
        start=lambda _: pytest.fail("started"),
        weights=lambda: (),
        weights_version=lambda: 0,
        longest=lambda: 1,
        bucket_bytes=1,
        restarts=0,
        sleep=True,
    )
    with pytest.raises(RuntimeError, match="no server here"):
        engine.request([], SamplingParams(1.0, 1.0, 0, 1, frozenset()))
    assert events == ["memory", "server"]
