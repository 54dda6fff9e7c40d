"""One engine in a separate process that answers requests from its standard input; see `benchmarks.rollout`.

    python benchmarks/rollout_worker.py ENGINE MODEL        ENGINE: megatron, transformers or vllm

It is run by its path: `nemo_popsd` is imported from PYTHONPATH, which may be another checkout; vLLM's environment has
none. Each line in is a JSON object with `prompts`, `batch`, `limit` and `stops`, or `export` or `load` with a folder,
or `send` with vLLM's Python; each line out has `seconds` and other measurements.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
SEED = 1234


def megatron(model: str) -> dict[str, Callable[..., Answer]]:
    """The engine of the training process, on one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    from nemo_popsd.checkpoint.source import open_source
    from nemo_popsd.megatron.config import StudentConfig
    from nemo_popsd.megatron.student import Student
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize
    from nemo_popsd.rollout.engine import Request, SamplingParams
    from nemo_popsd.rollout.megatron_engine import MegatronEngine

    initialize(ParallelConfig(), seed=0)
    source = open_source(model)
    config = StudentConfig(precision="fp32", adaptation="full")
    student = Student(source.architecture, config, ParallelConfig(), seed=0, load_initial=source.load)

    def generate(prompts: list[list[int]], batch: int, limit: int, stops: list[int]) -> list[int]:
        engine = MegatronEngine(
            student.chunks,
            vocab_size=student.vocab_size,
            batch_rows=batch,
            cache_tokens=1 << 30,
            weights_version=lambda: 0,
        )
        sampling = SamplingParams(1.0, 1.0, 0, limit, frozenset(stops))
        requests = [Request(prompt, seed=SEED + number) for number, prompt in enumerate(prompts)]
        return [len(rollout.response) for rollout in engine.generate(requests, sampling)]

    def export(folder: str) -> Answer:
        start = time.perf_counter()
        source.architecture.export(student.chunks, folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        return {"seconds": time.perf_counter() - start, "bytes": size}

    def send(python: str) -> Answer:
        """Seconds for new weights of the student to reach a vLLM server; empty if the package has no such engine."""
        try:
            from nemo_popsd.model.engines import build_engine  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            return {}
        from nemo_popsd.config.schema import PopsdConfig

        settings: Any = PopsdConfig()
        settings.student = config
        settings.rollout.engine, settings.rollout.vllm.python, settings.rollout.vllm.eager = "vllm", python, True
        version = [0]
        with tempfile.TemporaryDirectory() as settings.output:
            engine: Any = build_engine(
                settings,
                student,
                source.architecture,
                weights_version=lambda: version[0],
                longest=lambda: 64,
                stop_requested=lambda: False,
            )
            updates = []
            for version[0] in range(4):
                engine.generate([Request([1, 2, 3], seed=1)], SamplingParams(1.0, 1.0, 0, 2, frozenset()))
                updates.append(engine.last_update)
            engine.close()
        best = min(updates[1:], key=lambda update: float(update.seconds))
        return {"seconds": best.seconds, "bytes": best.bytes}

    return {"generate": _timed(generate), "export": export, "send": send}


def transformers(model: str) -> dict[str, Callable[..., Answer]]:
    """`generate` of transformers on batches that are padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(SEED)

    def generate(prompts: list[list[int]], batch: int, limit: int, stops: list[int]) -> list[int]:
        lengths: list[int] = []
        for begin in range(0, len(prompts), batch):
            rows = prompts[begin : begin + batch]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            sequences = module.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=limit,
                eos_token_id=stops or None,
                pad_token_id=0,
            )
            for response in sequences[:, longest:].tolist():
                ends = [place + 1 for place, token in enumerate(response) if token in stops]
                lengths.append(ends[0] if ends else len(response))
        return lengths

    def load(folder: str) -> Answer:
        from safetensors.torch import load_file

        start, size = time.perf_counter(), 0
        for file in sorted(Path(folder).glob("*.safetensors")):
            module.load_state_dict(load_file(file), strict=False)
            size += file.stat().st_size
        return {"seconds": time.perf_counter() - start, "bytes": size}

    return {"generate": _timed(generate), "load": load}


def vllm(model: str) -> dict[str, Callable[..., Answer]]:
    """The engine vLLM with its own scheduling, up to `batch` sequences."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    engines: dict[int, Any] = {}

    def generate(prompts: list[list[int]], batch: int, limit: int, stops: list[int]) -> list[int]:
        sampling = SamplingParams(
            temperature=1.0, top_p=1.0, top_k=-1, max_tokens=limit, stop_token_ids=stops, ignore_eos=True, logprobs=0
        )
        made = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [len(output.outputs[0].token_ids) for output in engines[batch].generate(made, sampling, use_tqdm=False)]

    timed = _timed(generate)

    def ready(prompts: list[list[int]], batch: int, **rest: Any) -> Answer:
        if batch not in engines:
            engines.clear()
            engines[batch] = LLM(
                model=model, skip_tokenizer_init=True, dtype="float32", max_num_seqs=batch, max_model_len=1024
            )
            generate(prompts[:1], batch, 4, [])
        return timed(prompts=prompts, batch=batch, **rest)

    return {"generate": ready}


def _timed(generate: Callable[..., list[int]]) -> Callable[..., Answer]:
    def call(**request: Any) -> Answer:
        start = time.perf_counter()
        lengths = generate(**request)
        return {"seconds": time.perf_counter() - start, "lengths": lengths}

    return call


def main() -> None:
    """Serves until its input ends."""
    # Output of libraries goes to standard error; only answers go to the parent.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    actions = {"megatron": megatron, "transformers": transformers, "vllm": vllm}[sys.argv[1]](sys.argv[2])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompts" in request:
            answer = actions["generate"](**request)
        else:
            ((name, folder),) = request.items()
            answer = actions[name](folder)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
