"""Tokens per second of the engine in the training process, and of a bare step, eager and as a CUDA graph."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.journal import Report
from benchmarks.gpu.model import Run, random_model, settings, start
from benchmarks.measure import interleaved
from nemo_popsd.megatron.decoding import SlotDecoder
from nemo_popsd.rollout.engine import Request
from nemo_popsd.rollout.scheduler import reach_of


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    config = settings(random_model(work, rehearse=rehearse), rehearse=rehearse)
    config.rollout.max_response_tokens = 4 if rehearse else 128
    model = start(config)
    for batch in (1, 2) if rehearse else (1, 8, 64):
        _engine(report, model, batch)
        _bare_step(report, model, batch)


def _engine(report: Report, model: Run, batch: int) -> None:
    rng = random.Random(batch)
    length, vocabulary = model.config.data.max_prompt_tokens, model.student.vocab_size
    requests = [Request([rng.randrange(vocabulary) for _ in range(length)], seed=n) for n in range(batch)]
    engine = model.engine(batch)
    engine.generate(requests, model.sampling)
    start_time = time.perf_counter()
    rollouts = engine.generate(requests, model.sampling)
    seconds = time.perf_counter() - start_time
    tokens = sum(len(rollout.response) for rollout in rollouts)
    report("engine, prompts and sampling included", batch=batch, tokens=tokens, tokens_per_s=tokens / seconds)


@torch.no_grad()
def _bare_step(report: Report, model: Run, batch: int) -> None:
    """One token for each sequence after a prompt of full length: the logits, without sampling."""
    device = next(model.student.chunks[0].parameters()).device
    position = model.config.data.max_prompt_tokens
    capacity = position + model.config.rollout.max_response_tokens
    decoder = SlotDecoder(model.student.chunks, batch, capacity)
    inputs = torch.arange(batch, device=device)
    positions = torch.full_like(inputs, position)
    reach = reach_of(position + 1, capacity)

    def eager() -> Tensor:
        logits = decoder.next_logits(inputs, positions, reach)
        assert logits is not None
        return logits

    with decoder.open():
        for _ in range(3):
            expected = eager()
        actions: dict[str, Callable[[], Any]] = {"eager": eager}
        captured = "not on a CPU"
        if device.type == "cuda":
            try:
                replay, logits = _captured(eager)
                replay()
                torch.cuda.synchronize()
                actions["graph"] = replay
                captured = (
                    "yes" if torch.equal(logits, expected) else f"yes, off by {(logits - expected).abs().max():g}"
                )
            except RuntimeError as error:
                captured = f"no: {str(error).splitlines()[0]}"
        taken = interleaved(actions, 20)
    report(
        "bare step",
        batch=batch,
        reach=reach,
        eager_ms=taken["eager"] * 1e3,
        eager_tokens_per_s=batch / taken["eager"],
        captured=captured,
        graph_ms=taken["graph"] * 1e3 if "graph" in taken else None,
        graph_tokens_per_s=batch / taken["graph"] if "graph" in taken else None,
    )


def _captured(action: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A function that replays `action` as a CUDA graph, and the tensor that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = action()
    return graph.replay, written
