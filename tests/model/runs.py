"""Short runs of the command on ranks of the fork server, which can be killed or signalled at a chosen moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.harness import LOCAL, run_ranks

TINY = str(Path(__file__).parents[2] / "conf" / "tiny.yaml")
SETTINGS = [
    "overwrite=false",
    "student.lora.rank=4",
    "optimizer.warmup_steps=0",
    "training.steps=4",
    "training.prompts_per_step=2",
    "training.checkpoint_every=2",
    "training.validate_every=2",
    "training.export_huggingface=false",
    "rollout.max_response_tokens=12",
    "evaluation.max_response_tokens=12",
    "evaluation.problems=2",
    "data.train.limit=8",
    "data.validation.limit=2",
    "observability.progress_bar=false",
]
LORA = "student.adaptation=lora"


def train(
    output: Path, *words: str, ranks: int = 1, plan: dict[str, Any] | None = None, layers: str = LOCAL
) -> list[Any]:
    """`popsd train` in `ranks` processes; exit status and what was printed, by rank.

    Args:
        output: of the run.
        words: overrides.
        ranks: processes.
        plan: `rank`, `step`, `signal` and `where`: that rank receives the signal in the step, after the rollouts
            (`"where": "trained"`) or while they are generated (`"where": "decoding"`).
        layers: of the model; see `tests.harness`.
    """
    return run_ranks(_train, ranks, output, words, plan, layers=layers)


def train_and_die(output: Path, *words: str, plan: dict[str, Any], layers: str = LOCAL) -> None:
    """The same with SIGKILL."""
    with contextlib.suppress(AssertionError):
        train(output, *words, plan={"rank": 0, "where": "trained", "signal": signal.SIGKILL, **plan}, layers=layers)
        raise RuntimeError("the run was not killed")


def _train(rank: int, world_size: int, output: Path, words: tuple[str, ...], plan: dict[str, Any] | None) -> Any:
    import io

    from nemo_popsd.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background of a shell
    if plan and plan["rank"] == rank:
        _send_signal(plan)
    console = io.StringIO()
    with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
        status = main(["train", TINY, f"output={output}", *SETTINGS, *words])
    return status, console.getvalue()


def _send_signal(plan: dict[str, Any]) -> None:
    """Patches the step and the decoder so that this process receives the signal of `plan`; see `train`."""
    from nemo_popsd.megatron.decoding import SlotDecoder
    from nemo_popsd.training.step import OnPolicyStep

    call, forward = OnPolicyStep.__call__, SlotDecoder.next_logits
    current = {"step": 0, "tokens": 0}

    def count(self: Any, step: int, *args: Any) -> Any:
        current.update(step=step, tokens=0)
        return call(self, step, *args)

    def accumulate(self: Any, *args: Any) -> Any:
        if plan["where"] == "trained" and current["step"] == plan["step"]:
            os.kill(os.getpid(), plan["signal"])
        return trained(self, *args)

    def decode(*args: Any) -> Any:
        current["tokens"] += 1
        if plan["where"] == "decoding" and current == {"step": plan["step"], "tokens": 3}:
            os.kill(os.getpid(), plan["signal"])
        return forward(*args)

    trained = OnPolicyStep._accumulate
    OnPolicyStep.__call__ = count  # type: ignore[method-assign]
    OnPolicyStep._accumulate = accumulate  # type: ignore[method-assign]
    SlotDecoder.next_logits = decode  # type: ignore[method-assign]


def metrics(output: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, in the order of the file."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def rollouts(output: Path) -> dict[str, bytes]:
    """Files of rollouts."""
    folder = output / "rollouts"
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.jsonl"))}


def state(checkpoint: Path) -> dict[str, Any]:
    """The bytes of the weight files, and the tensors of optimizer state and random state."""
    content: dict[str, Any] = {}
    for file in sorted((checkpoint / "training_state").glob("*.safetensors")):
        content |= {f"{file.name}/{key}": value for key, value in load_file(file).items()}
    index = json.loads((checkpoint / "training_state" / "index.json").read_text())
    content["step count"] = torch.tensor(index["step_count"])
    for file in sorted((checkpoint / "weights").glob("*.distcp")):
        content[file.name] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    return content


def differences(one: Path, other: Path) -> list[str]:
    """Names of the parts of two checkpoints that are not bit-equal; see `state`."""
    a, b = state(one), state(other)
    return sorted(a.keys() ^ b.keys()) + [
        name for name in a.keys() & b.keys() if a[name].shape != b[name].shape or not _same_bits(a[name], b[name])
    ]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
