"""Complete runs whose rollouts come from a real vLLM, and their exports in vLLM and in transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.peft_adapter import write_peft_adapter
from nemo_popsd.rollout.engine import Request, SamplingParams
from nemo_popsd.rollout.storage import RolloutStore
from nemo_popsd.rollout.vllm.environment import server_environment
from tests.harness import run_ranks
from tests.model import runs
from tests.rollout.test_vllm_engine import prompts
from tests.rollout.vllm_location import PYTHON
from tests.rollout.vllm_servers import SMALL, gone, needs_vllm
from tests.tiny_models import load_dense

pytestmark = [pytest.mark.slow(seconds=30), needs_vllm]

STEPS = 2
WORDS = [
    *SMALL,
    f"training.steps={STEPS}",
    "training.checkpoint_every=0",
    "training.validate_every=0",
    "training.export_huggingface=true",
    "rollout.max_response_tokens=200",
    "data.validation.path=''",
    "optimizer.lr=1e-3",
]
LIMIT = 40
CASES = {
    "full": (1, ["student.adaptation=full"]),
    "lora tp2": (2, ["student.adaptation=lora", "parallel.tensor=2", "optimizer.lr=1e-2"]),
}
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    request = json.load(sys.stdin)
    sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": p} for p in request["prompts"]]
    for model, adapter in request["models"]:
        options = {"enable_lora": True, "max_lora_rank": 64} if adapter else {}
        llm = LLM(
            model, dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 27, **options
        )
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        outputs = llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        print("TOKENS " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)
        del llm
"""


def train(rank: int, world_size: int, output: Path, words: list[str], kill: bool) -> Any:
    """`popsd train`; with `kill` its server is killed in the middle of the second step's rollouts."""
    from nemo_popsd.rollout.vllm import supervisor

    ask, pids = supervisor.VllmServer.ask, set()

    def watched(self: Any, request: dict[str, Any], *args: Any, **named: Any) -> Any:
        first = not pids
        pids.add(self.pid)
        if kill and request["request"] == "generate" and self.version == 1 and (first or len(pids) == 1):
            threading.Timer(0.02, os.kill, (self.pid, signal.SIGKILL)).start()
        return ask(self, request, *args, **named)

    supervisor.VllmServer.ask = watched  # type: ignore[method-assign]
    status, printed = runs._train(rank, world_size, output, (*WORDS, *words), None)
    return status, printed, pids


def greedy_responses(rank: int, world_size: int, checkpoint: Path) -> list[list[int]]:
    """Greedy responses of a NeMo checkpoint by the Megatron engine."""
    from nemo_popsd.checkpoint.nemo import NemoCheckpoint
    from nemo_popsd.config.loading import to_dict_config
    from nemo_popsd.data.config import SourceConfig
    from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
    from nemo_popsd.parallel.config import ParallelConfig

    config = NemoCheckpoint(checkpoint).config
    config.data.train, config.data.validation, config.parallel = SourceConfig(), SourceConfig(), ParallelConfig()
    config.rollout.engine = "megatron"
    model = PurifiedOPSDModel.restore_from(checkpoint, override_config_path=to_dict_config(config))
    requests = [Request(prompt, 1) for prompt in prompts(6)]
    greedy = SamplingParams(0.0, 1.0, 0, LIMIT, frozenset())
    return [rollout.response for rollout in model.engine.generate(requests, greedy)]


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    ranks, words = CASES[request.param]
    output = tmp_path_factory.mktemp("run") / "run"
    printed = run_ranks(train, ranks, output, words, False, timeout=400)
    assert [status for status, _, _ in printed] == [0] * ranks, printed
    return output, printed


def test_a_run_generates_with_vllm_and_leaves_no_server(run: tuple[Path, list[Any]]) -> None:
    output, printed = run
    assert [step for step, _ in runs.metrics(output, "train/loss")] == [1, 2]
    store = RolloutStore(output)
    assert [{row.rollout.weights_version for row in store.read(step)} for step in store.steps()] == [{0}, {1}]
    assert len(printed[0][2]) == 1, "more than one server was started"
    assert all(gone(pid) for pid in printed[0][2])
    assert not any(pids for _, _, pids in printed[1:]), "more than one rank has a server"
    assert "vLLM" in (output / "vllm" / "server-0.log").read_text()


def test_vllm_and_transformers_load_an_exported_model(run: tuple[Path, list[Any]]) -> None:
    output, _ = run
    (expected,) = run_ranks(greedy_responses, 1, output / "checkpoints" / "final", timeout=120)
    before = run_ranks(untrained, 1, timeout=120)[0]
    assert expected != before, "training changed no response"
    exported = output / "huggingface"
    checkpoint = NemoCheckpoint(output / "checkpoints" / "final")
    models: list[tuple[str, str | None]] = [(str(exported), None)]
    if checkpoint.config.student.adaptation == "lora":
        write_peft_adapter(checkpoint, output / "adapter")
        base = json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        models.append((base, str(output / "adapter")))
    request = {"models": models, "tokens": LIMIT, "prompts": prompts(6)}
    done = subprocess.run(
        [PYTHON, "-c", GENERATE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
        env=server_environment(os.environ, None),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert [json.loads(line.removeprefix("TOKENS ")) for line in lines] == [expected] * len(models)
    dense = load_dense(exported)
    for prompt, tokens in zip(prompts(6), expected, strict=True):
        ids = torch.tensor([prompt])
        generated = dense.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=False, eos_token_id=None
        )
        assert generated[0, len(prompt) :].tolist() == tokens


def untrained(rank: int, world_size: int) -> list[list[int]]:
    """Greedy responses of the untrained embedded model to the same prompts."""
    from nemo_popsd.embedded.names import asset
    from nemo_popsd.rollout.megatron_engine import MegatronEngine
    from tests.tiny_models import build_student

    student = build_student(asset("nemo_popsd:tiny_reasoner"))
    engine = MegatronEngine(
        student.chunks, vocab_size=student.vocab_size, batch_rows=8, cache_tokens=1 << 20, weights_version=lambda: 0
    )
    requests = [Request(prompt, 1) for prompt in prompts(6)]
    return [r.response for r in engine.generate(requests, SamplingParams(0.0, 1.0, 0, LIMIT, frozenset()))]


@pytest.mark.parametrize("run", ["full"], indirect=True)
def test_a_server_killed_in_a_step_changes_nothing(run: tuple[Path, list[Any]], tmp_path: Path) -> None:
    undisturbed, _ = run
    ((status, printed, pids),) = run_ranks(train, 1, tmp_path, CASES["full"][1], True, timeout=400)
    assert status == 0, printed
    assert "lost the vLLM server: generate" in printed
    assert len(pids) == 2, "a second server took over"
    assert runs.rollouts(tmp_path) == runs.rollouts(undisturbed)
    assert runs.metrics(tmp_path, "train/loss") == runs.metrics(undisturbed, "train/loss")
