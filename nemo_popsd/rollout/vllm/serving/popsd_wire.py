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
from typing import Any

PROTOCOL = 2
"""Version, the same on both sides."""

_LENGTHS = struct.Struct("!IQ")
_LARGEST_HEADER = 1 << 30
_LARGEST_PAYLOAD = 1 << 36


class DisconnectedError(ConnectionError):
    """The other side has closed the connection, or died."""


def send(connection: socket.socket, header: dict[str, Any], payload: bytes | bytearray | memoryview = b"") -> None:
    """Sends one frame.

    Raises:
        OSError: the connection is broken.
    """
    text = json.dumps(header).encode()
    size = memoryview(payload).nbytes
    connection.sendall(_LENGTHS.pack(len(text), size) + text)
    if size:
        connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytearray]:
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
