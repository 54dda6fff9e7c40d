"""Measures tokens per second of the rollout engines on equal model and prompts, weight updates, and phases of a step.

    python -m benchmarks.rollout                     # the tables of RESULTS-rollout.md: about half an hour
    python -m benchmarks.rollout --quick             # a few minutes, only prints
    python -m benchmarks.rollout --before CHECKOUT   # also the engine of another checkout of this repository
    POPSD_VLLM_PYTHON=.vllm-venv/bin/python python -m benchmarks.rollout     # also vLLM, in its environment

Each engine runs in a separate process with one thread (`benchmarks/rollout_worker.py`), and requests alternate between
them; seconds are the minimum of the repetitions. All sample at temperature 1 without filters, with different seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.tables import table
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.embedded.names import asset

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("RESULTS-rollout.md")
MODEL = asset("nemo_popsd:tiny_reasoner")
MEGATRON, BEFORE, THEIRS, VLLM = "Megatron engine", "Megatron engine before", "transformers.generate", "vLLM"


class Worker:
    """An engine in its process."""

    def __init__(self, engine: str, *, python: str = sys.executable, checkout: Path | None = ROOT) -> None:
        """`checkout` is the one whose `nemo_popsd` the worker imports."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        if checkout is not None:
            environment["PYTHONPATH"] = str(checkout)
        script = str(Path(__file__).with_name("rollout_worker.py"))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            [python, script, engine, str(MODEL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"a worker ended:\n{self._log.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Workload:
    """The lengths of the responses."""

    name: str
    limit: int
    stops: tuple[int, ...]
    batches: int
    """Number of batches per request."""


def workloads(quick: bool) -> list[Workload]:
    """Short and long responses, of equal and of mixed lengths."""
    tokenizer = load_tokenizer(MODEL, setting="student.source")
    end = int(tokenizer.eos_token_id)
    # Without its stop token the model continues with further turns; using one of about 270 tokens as stop token
    # produces lengths that cover the range.
    (rare,) = tokenizer.encode("Then", add_special_tokens=False)
    every = [
        Workload("short: 32 tokens", 32, (), 1),
        Workload("the model's own stops, at most 256", 256, (end,), 1),
        Workload("the same, 4 batches", 256, (end,), 4),
        Workload("long: 512 tokens", 512, (), 1),
        Workload("long, mixed: at most 768, 4 batches", 768, (rare,), 4),
    ]
    return every[:2] if quick else every


def prompts(count: int) -> list[list[int]]:
    """Prompts of the embedded training rows, as a run renders them, repeated."""
    tokenizer = load_tokenizer(MODEL, setting="student.source")
    rows = [json.loads(line) for line in asset("nemo_popsd:tiny_train").read_text().splitlines()]
    made = []
    for number in range(count):
        question = rows[number % len(rows)]["question"]
        turn = f"{question}\nThink step by step and put the answer in \\boxed{{}}."
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        made.append(tokenizer.encode(str(text), add_special_tokens=False))
    return made


def speeds(workers: dict[str, Worker], quick: bool) -> list[list[str]]:
    """Rows: lengths, batch, mean length, and for each engine tokens/s and the ratio to transformers."""
    rows = []
    for workload in workloads(quick):
        for batch in (1, 8, 64):
            best: dict[str, tuple[float, float]] = {}
            repetitions = 1 if quick or workload.limit * workload.batches > 512 else 2
            requested = prompts(batch * workload.batches)
            for _ in range(repetitions):
                for name, worker in workers.items():
                    answer = worker.ask(
                        prompts=requested, batch=batch, limit=workload.limit, stops=list(workload.stops)
                    )
                    tokens = sum(answer["lengths"])
                    speed = tokens / answer["seconds"]
                    best[name] = max(best.get(name, (0.0, 0.0)), (speed, tokens / len(requested)))
            length = f"{best[MEGATRON][1]:.0f}"
            cells = [
                f"{best[name][0]:,.0f} ({best[name][0] / best[THEIRS][0]:.2f})" if name in best else "not run"
                for name in (MEGATRON, BEFORE, THEIRS, VLLM)
            ]
            rows.append([workload.name, str(batch), length, *cells])
            print(" | ".join(rows[-1]), flush=True)
    return rows


def updates(workers: dict[str, Worker]) -> list[list[str]]:
    """Rows: engine, transfer of new weights, bytes, seconds."""
    rows = [[MEGATRON, "uses the trained tensors", "0", "0"]]
    with tempfile.TemporaryDirectory() as folder:
        exported = workers[MEGATRON].ask(export=folder)
        loaded = workers[THEIRS].ask(load=folder)
        seconds = exported["seconds"] + loaded["seconds"]
        rows.append([THEIRS, "export to safetensors, load", f"{2 * exported['bytes']:,}", f"{seconds:.3f}"])
    if python := os.environ.get("POPSD_VLLM_PYTHON"):
        sent = workers[MEGATRON].ask(send=python)
        measured = [f"{sent['bytes']:,}", f"{sent['seconds']:.3f}"] if sent else ["not measured", "not measured"]
        rows.append([VLLM, "rollout.engine=vllm: buckets to the server, under a version", *measured])
    return rows


def split_of_a_step(checkout: Path, steps: int) -> dict[str, float]:
    """Median seconds of each phase over the steps of conf/tiny.yaml, without the first step."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        settings = [f"output={output}", f"training.steps={steps}", "training.export_huggingface=false"]
        settings += ["training.checkpoint_every=0", "evaluation.problems=2", "observability.progress_bar=false"]
        command = [sys.executable, "-m", "nemo_popsd", "train", str(checkout / "conf" / "tiny.yaml"), *settings]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    of_phase = {name: [line[key] for line in lines if (key := f"train/seconds_{name}") in line] for name in PHASES}
    return {name: statistics.median(values[1:]) for name, values in of_phase.items()}


PHASES = ("rollout", "frozen", "train")


def splits(before: Path | None, quick: bool) -> list[list[str]]:
    """Rows: engine, seconds of each phase, their sum, share of the rollouts."""
    rows = []
    for name, checkout in ((BEFORE, before), (MEGATRON, ROOT)):
        if checkout is not None:
            seconds = split_of_a_step(checkout, 3 if quick else 8)
            total = sum(seconds.values())
            each = [f"{seconds[phase]:.2f}" for phase in PHASES]
            rows.append([name, *each, f"{total:.2f}", f"{seconds['rollout'] / total:.0%}"])
            print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short responses; prints only")
    parser.add_argument("--before", type=Path, help="another checkout, whose engine is also measured")
    options = parser.parse_args()
    workers = {MEGATRON: Worker("megatron"), THEIRS: Worker("transformers")}
    if options.before:
        workers[BEFORE] = Worker("megatron", checkout=options.before.resolve())
    if python := os.environ.get("POPSD_VLLM_PYTHON"):
        workers[VLLM] = Worker("vllm", python=python, checkout=None)
    for worker in workers.values():
        worker.ask(prompts=prompts(2), batch=2, limit=8, stops=[])
    print(machine(), flush=True)
    parts = [
        "## Tokens per second\n\nIn brackets: ratio to transformers.generate. *length*: mean of the Megatron engine.",
        table(
            ["lengths", "batch", "length", *(name for name in (MEGATRON, BEFORE, THEIRS, VLLM))],
            speeds(workers, options.quick),
        ),
        "## New weights, after a step of the embedded model",
        table(["engine", "how", "bytes", "s"], updates(workers)),
    ]
    for worker in workers.values():
        worker.close()
    parts += [
        "## Seconds of a step of conf/tiny.yaml, one thread, median",
        table(["engine", *PHASES, "sum", "share of rollouts"], splits(options.before, options.quick)),
    ]
    text = "\n\n".join(parts)
    print(text)
    if not options.quick:
        command = shlex.join(["python", "-m", "benchmarks.rollout", *sys.argv[1:]])
        head = f"# Results of `{command}`\n\n{datetime.date.today():%d %B %Y}. {machine()}; one thread for each engine."
        old = RESULTS.read_text() if RESULTS.exists() else ""
        RESULTS.write_text(f"{head}\n\n{text}\n" + (f"\n{old}" if old else ""))


if __name__ == "__main__":
    main()
