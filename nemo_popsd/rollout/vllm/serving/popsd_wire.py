"""Frames between the trainer and its vLLM server: a JSON header and, for weights, raw bytes.

    4 bytes   length of the header, unsigned, big-endian
    8 bytes   length of the payload, unsigned, big-endian
    header    UTF-8 JSON object
    payload   bytes

No pickle, so that received data cannot run code. Standard library only, because both environments use this module.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import TypedDict

PROTOCOL = 3
"""Version, the same on both sides."""

_LENGTHS = struct.Struct("!IQ")
_LARGEST_HEADER = 1 << 30
_LARGEST_PAYLOAD = 1 << 36

Tensors = list[tuple[str, str, list[int], int]]
"""Name, dtype, shape and offset in the bucket of each tensor; JSON arrays when received."""
Response = tuple[list[int], list[float]]
"""Tokens and their log-probabilities; a JSON array when received."""


class Sampling(TypedDict):
    """Settings that all requested responses share."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]


class Adapter(TypedDict):
    """LoRA configuration of the adapters, under PEFT's names."""

    r: int
    lora_alpha: float


class Settings(TypedDict):
    """The first frame from the trainer."""

    arguments: dict[str, object]
    """Arguments of vLLM's `LLM`."""
    interface: str
    """Requested interface for weights."""
    sleep: bool
    adapter: Adapter | None


class _NamedRequest(TypedDict):
    request: str


class Request(_NamedRequest, total=False):
    """A request; which other fields it has depends on `request`."""

    content: str
    """`begin`: `weights` or `adapter`."""
    path: str | None
    """`bucket`: a file, or None with a payload."""
    tensors: Tensors
    """`bucket`."""
    version: int
    """`commit`: of the weights."""
    requests: list[tuple[list[int], int, int]]
    """`generate`: token ids of each prompt, the seed of its first response, and its number of responses. Each further
    response has the next seed."""
    sampling: Sampling
    """`generate`."""


class Hello(TypedDict, total=False):
    """The first frame from the server."""

    token: str
    """The token that the server received."""
    protocol: int
    pid: int
    host: str


class Answer(TypedDict, total=False):
    """The answer to a request; which fields it has depends on the request."""

    version: int | None
    """`ping`, `commit`, `generate`: of the weights."""
    responses: list[Response]
    """`generate`."""
    seconds: float
    """`generate`."""
    asleep: bool
    """`sleep`."""
    error: str
    """The request failed."""


class Event(TypedDict, total=False):
    """An event during the start of the server; its fields depend on `event`."""

    event: str
    vllm: str
    """`imported`: version."""
    interface: str
    """`ready`."""
    sleeps: bool
    """`ready`."""
    stage: str
    """`failed`: `import` or `load`."""
    error: str
    """`failed`."""


class DisconnectedError(ConnectionError):
    """The other side has closed the connection, or died."""


def send(
    connection: socket.socket, header: Mapping[str, object], payload: bytes | bytearray | memoryview = b""
) -> None:
    """Sends one frame.

    Raises:
        OSError: the connection is broken.
    """
    text = json.dumps(header).encode()
    size = memoryview(payload).nbytes
    connection.sendall(_LENGTHS.pack(len(text), size) + text)
    if size:
        connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[dict[str, object], bytearray]:
    """Waits for one frame.

    Raises:
        DisconnectedError: the connection was closed.
        ValueError: the received bytes are not a frame.
        OSError: the connection is broken, or its time limit has passed.
    """
    header_size, payload_size = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    if header_size > _LARGEST_HEADER or payload_size > _LARGEST_PAYLOAD:
        raise ValueError(f"a frame of {header_size} and {payload_size} bytes")
    header = json.loads(_exactly(connection, header_size))
    if not isinstance(header, dict):
        raise ValueError(f"a header that is not an object: {header!r}")
    return header, _exactly(connection, payload_size)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        received = connection.recv_into(rest)
        if not received:
            raise DisconnectedError("the connection was closed")
        rest = rest[received:]
    return data
