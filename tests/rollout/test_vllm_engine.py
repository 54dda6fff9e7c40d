"""A real vLLM against the Megatron engine: same weights, same tokens, even if the server is lost."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.errors import StopRequested
from nemo_popsd.rollout.engine import Request, Rollout, SamplingParams
from tests.harness import run_ranks
from tests.rollout.vllm_location import PYTHON
from tests.rollout.vllm_servers import engine, gone, needs_vllm, settings
from tests.tiny_models import build_student, save_tiny_model, whole_logits
from tests.training.layouts import randomize_adapters

pytestmark = [pytest.mark.slow(seconds=8), needs_vllm]

LIMIT = 160
KILLED_AFTER = 0.5
LORA = ["student.adaptation=lora", "student.lora.rank=4", "student.lora.alpha=6"]
CASES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "one": (1, {}, []),
    # Merged adapters and gathered tensors, through the older interface, in many buckets, over the connection that is
    # used for another machine.
    "tp2 sp merged": (
        2,
        {"tensor": 2, "sequence": "true"},
        [
            *LORA,
            "rollout.vllm.lora=merged",
            "rollout.vllm.interface=worker-extension",
            "rollout.vllm.bucket_bytes=200000",
            f"rollout.vllm.python={PYTHON}",  # itself: its servers import vLLM
            "rollout.vllm.launcher=[nice, -n, '{replica}']",
            "rollout.vllm.address=127.0.0.1",
        ],
    ),
    "pp2 adapter": (2, {"pipeline": 2}, LORA),
}
INTERFACES = {"one": "weight-transfer", "tp2 sp merged": "worker-extension", "pp2 adapter": "adapter"}


def prompts(rows: int) -> list[list[int]]:
    """Prompts of the embedded validation set."""
    from nemo_popsd.data.dataset import build_evaluation_prompts
    from nemo_popsd.data.tokenizer import load_tokenizer
    from nemo_popsd.embedded.names import asset

    config = settings(Path("unused"))
    tokenizer = load_tokenizer(asset("nemo_popsd:tiny_reasoner"), setting="student.source")
    evaluation_prompts, _ = build_evaluation_prompts(config.data, config.data.validation, tokenizer)
    return [list(prompt.prompt) for prompt in evaluation_prompts[:rows]]


def disturb(student: Any, share: float) -> None:
    """Moves all weights by a share of their spread, as an optimizer step would, the same in any layout."""
    with torch.no_grad():
        for chunk in student.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1 + share)


def observe(rank: int, world_size: int, output: Path, parallel: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Everything that the tests check, from one start of a server and one restart."""
    from nemo_popsd.data.tokenizer import load_tokenizer, read_generation_config, stop_token_ids
    from nemo_popsd.embedded.names import asset
    from nemo_popsd.rollout.vllm import supervisor

    model = asset("nemo_popsd:tiny_reasoner")
    config = settings(output, *words)
    student = build_student(model, parallel=parallel, adaptation=config.student.adaptation, lora=config.student.lora)
    version = [0]
    vllm = engine(config, student, version=lambda: version[0])
    config.rollout.engine = "megatron"
    megatron = engine(config, student, version=lambda: version[0])
    requests = [Request(prompt, seed=2**62 + number) for number, prompt in enumerate(prompts(24))]
    stops = frozenset(stop_token_ids(load_tokenizer(model, setting="student.source"), read_generation_config(model)))
    greedy = SamplingParams(0.0, 1.0, 0, LIMIT, stops)
    random = SamplingParams(1.3, 0.9, 12, LIMIT, stops)
    endless = replace(greedy, max_response_tokens=300, stop_token_ids=frozenset())
    seen: dict[str, Any] = {}

    def both(name: str, sampling: SamplingParams) -> None:
        seen[name] = (megatron.generate(requests, sampling), vllm.generate(requests, sampling))

    both("before", greedy)
    if student.adapters is not None:
        randomize_adapters(student)
    else:
        disturb(student, 0.05)
    version[0] = 7
    both("after", greedy)
    seen["random"] = vllm.generate(requests, random)
    seen["random, other batches"] = vllm.generate(requests[::-1][:10], random)[::-1]
    siblings = [replace(requests[0], seed=5 + number) for number in range(4)]
    seen["siblings"] = vllm.generate(siblings, random)
    seen["siblings, separately"] = vllm.generate(siblings[::-1], random)[::-1]
    seen["siblings, greedy"] = vllm.generate(siblings[:2], greedy)
    seen["most likely of one"] = vllm.generate(requests, replace(random, top_k=1))
    seen["none"] = vllm.generate([], random)
    pairs = zip(requests, seen["random"], strict=True)
    if "pipeline" not in parallel:
        seen["log-probabilities"] = [log_probs_of(student, request, rollout) for request, rollout in pairs]
    seen["expected endless"] = megatron.generate(requests, endless)
    first = None if vllm.server is None else vllm.server.pid
    if first is not None:
        seen["update"], seen["interface"] = vllm.last_update, vllm.server.interface
    # Killed in the middle of a request.
    ask = supervisor.VllmServer.ask

    def kill_meanwhile(self: Any, request: dict[str, Any], *args: Any, **named: Any) -> Any:
        if request["request"] == "generate" and self.pid == first:
            threading.Timer(KILLED_AFTER, os.kill, (first, signal.SIGKILL)).start()
        return ask(self, request, *args, **named)

    supervisor.VllmServer.ask = kill_meanwhile  # type: ignore[method-assign]
    printed: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_popsd.rollout.vllm.engine").addHandler(handler)
    seen["endless"] = vllm.generate(requests, endless)
    seen["printed"] = printed
    seen["first is gone"] = first is None or gone(first)
    seen["another"] = vllm.server is None or vllm.server.pid != first
    # A stop is requested while the server is busy.
    checks = [0]

    def stop() -> bool:
        checks[0] += 1
        return checks[0] > 8

    vllm._stop_requested = stop
    second = None if vllm.server is None else vllm.server.pid
    with pytest.raises(StopRequested):
        vllm.generate(requests * 8, endless)
    seen["second is gone"] = second is None or gone(second)
    return seen


def log_probs_of(student: Any, request: Request, rollout: Rollout) -> list[float]:
    """Log-probabilities of a response by the training forward: temperature 1, nothing filtered."""
    ids = torch.tensor([[*request.prompt, *rollout.response]])
    wanted, length = ids, ids.shape[1]
    if length % 2:  # sequence parallelism splits it
        ids = torch.cat([ids, ids[:, -1:]], dim=1)
    logits = whole_logits(student.gpt, ids, student.vocab_size)[0, :length].float().log_softmax(-1)
    start = len(request.prompt)
    return [float(logits[at - 1, wanted[0, at]]) for at in range(start, length)]


@pytest.fixture(scope="module", params=CASES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    size, parallel, words = CASES[request.param]
    seen = run_ranks(observe, size, tmp_path_factory.mktemp("run"), parallel, words, timeout=400)
    assert seen[0]["interface"] == INTERFACES[request.param]
    return seen


def same(actual: Sequence[Rollout], expected: Sequence[Rollout], version: int) -> None:
    assert len(actual) == len(expected)
    for rollout, other in zip(actual, expected, strict=True):
        assert rollout.response == other.response
        assert rollout.log_probs == pytest.approx(other.log_probs, abs=5e-5)
        assert (rollout.truncated, rollout.weights_version) == (other.truncated, version)


def test_greedy_tokens_are_those_of_the_megatron_engine(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        for name, version in (("before", 0), ("after", 7)):
            megatron, vllm = seen[name]
            same(vllm, megatron, version)
        before, after = ([r.response for r in seen[name][0]] for name in ("before", "after"))
        assert before != after, "the update changed nothing"
        assert any(r.truncated for r in seen["before"][1])
        assert any(not r.truncated for r in seen["before"][1])


def test_seeds_determine_the_samples_and_filters_apply(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        sampled = [r.response for r in seen["random"]]
        assert [r.response for r in seen["random, other batches"]] == sampled[-10:]
        assert sampled != [r.response for r in seen["after"][1]]
        # One request with four samples, and four requests: the server derives the same seeds.
        several = [r.response for r in seen["siblings"]]
        assert several == [r.response for r in seen["siblings, separately"]]
        assert len(set(map(tuple, several))) > 1
        assert [r.response for r in seen["siblings, greedy"]] == [seen["after"][1][0].response] * 2
        same(seen["most likely of one"], seen["after"][1], 7)
        assert seen["none"] == []


@pytest.mark.parametrize("ranks", ["one", "tp2 sp merged"], indirect=True)
def test_log_probabilities_are_the_models_own(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        for rollout, expected in zip(seen["random"], seen["log-probabilities"], strict=True):
            assert rollout.log_probs == pytest.approx(expected, abs=1e-4)
        assert min(min(r.log_probs) for r in seen["random"]) < -1.0


def test_a_killed_server_changes_no_response(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert any("lost the vLLM server: generate" in line for line in seen["printed"]), seen["printed"]
        same(seen["endless"], seen["expected endless"], 7)
        assert seen["first is gone"]
        assert seen["another"]


def test_a_stop_does_not_wait_for_the_server(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["second is gone"] for seen in ranks)


def test_every_rank_has_the_same_responses_and_one_has_a_server(ranks: list[dict[str, Any]]) -> None:
    assert [("update" in seen) for seen in ranks] == [True] + [False] * (len(ranks) - 1)
    assert all(seen["random"] == ranks[0]["random"] for seen in ranks)
    update = ranks[0]["update"]
    assert update.version == 7
    assert update.buckets > 10 if ranks[0]["interface"] == "worker-extension" else update.buckets == 1


def generate_with_experts(rank: int, world_size: int, model: Path, output: Path) -> dict[str, Any]:
    """Each replica has a server, and gathers weights with the other replica, which also holds experts."""
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.model.engines import build_engine

    student = build_student(model, parallel={"expert": world_size})
    config = settings(output, f"student.source={model}")
    version = [0]

    def build() -> Any:
        arguments: dict[str, Any] = {"longest": lambda: 64, "stop_requested": lambda: False}
        return build_engine(config, student, HuggingFaceModel(model), weights_version=lambda: version[0], **arguments)

    vllm = build()
    config.rollout.engine = "megatron"
    megatron = build()
    requests = [Request([3 + rank, 50 + number, 7], number) for number in range(5)]
    greedy = SamplingParams(0.0, 1.0, 0, 12, frozenset())
    seen: dict[str, Any] = {"pids": []}
    for number in range(3):
        version[0] = number
        seen[number] = (megatron.generate(requests, greedy), vllm.generate(requests, greedy))
        seen["pids"].append(vllm.server.pid)
        disturb(student, 0.02 * (number + 1))
        if number == 1 and rank == 1:
            os.kill(vllm.server.pid, signal.SIGKILL)
    return seen


def test_replicas_that_share_experts_restart_a_server_together(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    model = save_tiny_model(tmp_path / "model", "qwen3_moe", **sizes)
    for rank, seen in enumerate(run_ranks(generate_with_experts, 2, model, tmp_path / "run", timeout=400)):
        for number in range(3):
            megatron, vllm = seen[number]
            same(vllm, megatron, number)
        first, second, third = seen["pids"]
        assert first == second
        assert (second == third) == (rank == 0), "only the killed server is restarted"


def generate_until_killed(rank: int, world_size: int, output: Path) -> None:
    """Is killed while its server is busy."""
    from nemo_popsd.embedded.names import asset

    vllm = engine(settings(output), build_student(asset("nemo_popsd:tiny_reasoner")))
    endless = SamplingParams(0.0, 1.0, 0, 300, frozenset())
    vllm.generate([Request([1, 2, 3], 1)], replace(endless, max_response_tokens=2))
    (output / "pid").write_text(str(vllm.server.pid))
    threading.Timer(KILLED_AFTER, os.kill, (os.getpid(), signal.SIGKILL)).start()
    vllm.generate([Request([1, 2, number], 1) for number in range(200)], endless)


def test_a_server_does_not_outlive_its_trainer(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the process died with exit code -9"):
        run_ranks(generate_until_killed, 1, tmp_path, timeout=200)
    assert gone(int((tmp_path / "pid").read_text()))
