"""Sends weights to a server: full tensors under Hugging Face's names, packed into buckets of bounded size."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_popsd.rollout.vllm.serving import popsd_wire as wire
from nemo_popsd.rollout.vllm.supervisor import VllmServer

_ALIGNMENT = 64


class BucketSender:
    """Copies tensors into a bucket in host memory and sends it when it is full; at most one bucket at a time exists.

    A bucket is an anonymous file in memory, which a server on this machine maps; a server on another machine receives
    its bytes as the payload of the frame. The file disappears when either side dies.

    Attributes:
        tensors: number of tensors sent or packed so far.
        bytes: size of these tensors.
        buckets: number of buckets sent so far.
    """

    def __init__(self, server: VllmServer, bucket_bytes: int, *, content: str = "weights") -> None:
        """Announces an update to the server.

        Args:
            server: receives the weights.
            content: `weights` for all weights of the model, or `adapter` for those of LoRA under PEFT's names.
            bucket_bytes: size of a bucket, unless one tensor is larger.

        Raises:
            ServerLost: the server is lost.
        """
        self._server = server
        self._bucket_bytes = bucket_bytes
        self._bucket: _Bucket | None = None
        self.tensors = self.bytes = self.buckets = 0
        server.version = None
        server.ask({"request": "begin", "content": content})

    def add(self, name: str, tensor: Tensor) -> None:
        """Packs one tensor [any shape, any device]; sends the bucket and waits for the server when it is full.

        Raises:
            ServerLost: the server is lost.
        """
        size = tensor.numel() * tensor.element_size()
        if self._bucket is not None and not self._bucket.fits(size):
            self.flush()
        if self._bucket is None:
            self._bucket = _Bucket(max(size, self._bucket_bytes))
        self._bucket.add(name, tensor)
        self.tensors += 1
        self.bytes += size

    def flush(self) -> None:
        """Sends the packed tensors.

        Raises:
            ServerLost: the server is lost.
        """
        bucket, self._bucket = self._bucket, None
        if bucket is None:
            return
        with bucket.sealed():
            request: wire.Request = {"request": "bucket", "tensors": bucket.tensors}
            if self._server.launch.same_machine:
                self._server.ask({**request, "path": bucket.path})
            else:
                with bucket.bytes() as payload:
                    self._server.ask({**request, "path": None}, payload)
        self.buckets += 1

    def commit(self, version: int) -> None:
        """Sends the remaining tensors and ends the update: the server then has the weights of `version`.

        Raises:
            ServerLost: the server is lost, or weights were missing.
        """
        self.flush()
        self._server.version = self._server.ask({"request": "commit", "version": version})["version"]


class _Bucket:
    """A file in memory and the list of the tensors in it."""

    def __init__(self, capacity: int) -> None:
        self._descriptor = os.memfd_create("popsd-bucket")
        os.ftruncate(self._descriptor, capacity)  # pages are allocated when they are written
        self._mapping = mmap.mmap(self._descriptor, capacity)
        self._capacity = capacity
        self._used = 0
        self.tensors: wire.Tensors = []
        """Name, dtype, shape and offset of each."""

    @property
    def path(self) -> str:
        """Path under which other processes of this machine and user open it."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def fits(self, size: int) -> bool:
        return self._used + size <= self._capacity

    def add(self, name: str, tensor: Tensor) -> None:
        count = tensor.numel()
        target = torch.frombuffer(self._mapping, dtype=tensor.dtype, count=count, offset=self._used)
        target.view(tensor.shape).copy_(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.tensors.append((name, dtype, list(tensor.shape), self._used))
        end = self._used + count * tensor.element_size()
        self._used = min(math.ceil(end / _ALIGNMENT) * _ALIGNMENT, self._capacity)

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """Context in which the file has its final size; it is closed afterwards."""
        os.ftruncate(self._descriptor, self._used)
        try:
            yield
        finally:
            os.close(self._descriptor)

    @contextmanager
    def bytes(self) -> Iterator[memoryview]:
        with memoryview(self._mapping) as mapped, mapped[: self._used] as used:
            yield used
