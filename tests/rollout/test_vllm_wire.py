"""Frames and buckets arrive unchanged, and bytes that are not a frame are refused."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_popsd.rollout.vllm.buckets import BucketSender
from nemo_popsd.rollout.vllm.serving import popsd_wire as wire
from nemo_popsd.rollout.vllm.serving.popsd_buckets import read_bucket


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_frames_arrive_complete_and_in_order(ends: tuple[socket.socket, socket.socket]) -> None:
    large = bytes(range(256)) * (1 << 14)  # more than a socket's buffer holds
    sent: list[tuple[dict[str, Any], bytes]] = [
        ({"request": "generate", "prompts": [[1, 2], [3]], "log_probs": [-0.1, -1e-30]}, b""),
        ({"path": None, "name": "Gewichte ü"}, large),
        ({}, b"x"),
    ]
    thread = threading.Thread(target=lambda: [wire.send(ends[0], *frame) for frame in sent])
    thread.start()
    received = [wire.receive(ends[1]) for _ in sent]
    thread.join()
    assert [(header, bytes(payload)) for header, payload in received] == sent


def test_a_closed_connection_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(struct.pack("!IQ", 10, 0) + b"{")
    ends[0].close()
    with pytest.raises(wire.DisconnectedError):
        wire.receive(ends[1])


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", struct.pack("!IQ", 2, 1 << 40) + b"{}", struct.pack("!IQ", 2, 0) + b"[]"],
    ids=["http", "too large", "no object"],
)
def test_bytes_that_are_not_a_frame_are_refused(ends: tuple[socket.socket, socket.socket], data: bytes) -> None:
    ends[0].sendall(data)
    with pytest.raises(ValueError, match=r"frame|header"):
        wire.receive(ends[1])


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embedding": torch.randn(40, 8, generator=generator),
        "odd": torch.randn(7, generator=generator).bfloat16(),
        "transposed": torch.randn(6, 5, generator=generator).T,
        "half": torch.randn(3, 3, 3, generator=generator).half(),
        "one": torch.randn((), generator=generator),
        "cut": torch.randn(20, 4, generator=generator)[:9],
        "last": torch.randn(11, 3, generator=generator).bfloat16(),
    }


class Receiver:
    """Replaces a server: reads buckets as vLLM's workers do."""

    def __init__(self, *, same_machine: bool) -> None:
        self.launch = SimpleNamespace(same_machine=same_machine)
        self.version: int | None = 3
        self.requests: list[str] = []
        self.sizes: list[int] = []
        self.received: dict[str, torch.Tensor] = {}

    def ask(self, request: dict[str, Any], payload: Any = b"", **named: Any) -> dict[str, Any]:
        self.requests.append(request["request"])
        if request["request"] == "bucket":
            path, folder = request["path"], None
            if path is None:
                folder = Path(f"/tmp/bucket-{id(self)}")
                folder.write_bytes(payload)
                path = str(folder)
            self.sizes.append(Path(path).stat().st_size)
            # Used later: a layer may wait for the rest of its tensors after the bucket has been removed.
            self.received |= dict(read_bucket(path, request["tensors"]))
            if folder is not None:
                folder.unlink()
        return {"version": request.get("version")}


@pytest.mark.parametrize("same_machine", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 700, 1 << 20])
def test_buckets_contain_every_tensor_once(bucket_bytes: int, same_machine: bool) -> None:
    receiver, sent = Receiver(same_machine=same_machine), tensors()
    sender = BucketSender(receiver, bucket_bytes)  # type: ignore[arg-type]
    assert receiver.version is None, "during an update the server has no version"
    for name, tensor in sent.items():
        sender.add(name, tensor)
    sender.commit(8)
    assert receiver.version == 8
    assert list(receiver.received) == list(sent)
    for name, tensor in sent.items():
        assert receiver.received[name].dtype == tensor.dtype
        assert torch.equal(receiver.received[name], tensor), name
    largest = max(t.numel() * t.element_size() for t in sent.values())
    assert max(receiver.sizes) <= max(bucket_bytes, largest)
    assert receiver.requests == ["begin", *["bucket"] * sender.buckets, "commit"]
    assert {1: 7, 1 << 20: 1}.get(bucket_bytes, sender.buckets) == sender.buckets
    assert (sender.tensors, sender.bytes) == (7, sum(t.numel() * t.element_size() for t in sent.values()))


def test_the_servers_modules_need_nothing_of_this_package() -> None:
    folder = Path(wire.__file__).parent
    known = {path.stem for path in folder.glob("*.py")} | set(sys.stdlib_module_names)
    known |= {"safetensors", "torch", "vllm"}
    from tests.test_architecture import imports

    for path in folder.glob("*.py"):
        assert {module.split(".")[0] for module in imports(path)} <= known, path.name
    needed = {module.split(".")[0] for module in imports(Path(wire.__file__))}
    assert needed <= set(sys.stdlib_module_names), "the trainer imports it too"


def test_responses_to_a_prompt_are_one_request() -> None:
    from nemo_popsd.rollout.engine import Request, sibling_seeds
    from nemo_popsd.rollout.vllm.engine import _with_siblings

    requests = [Request(prompt, seed) for prompt in ([1, 2], [3]) for seed in sibling_seeds(7, 3)]
    others = [Request([3], 10), Request([3], 10), Request([4], 11), Request([4], 9)]
    merged = [([1, 2], 7, 3), ([3], 7, 4), ([3], 10, 1), ([4], 11, 1), ([4], 9, 1)]
    assert _with_siblings([*requests, *others], greedy=False) == merged
    assert _with_siblings(requests, greedy=True) == [(list(r.prompt), r.seed, 1) for r in requests]
    assert _with_siblings([], greedy=False) == []
