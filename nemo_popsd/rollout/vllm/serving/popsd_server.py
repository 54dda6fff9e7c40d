"""A vLLM server that generates rollouts for one trainer, run by vLLM's Python: `popsd_server.py --connect host:port`.

It connects to the trainer, sends the token that it read from its standard input, and answers one request at a time.
When the connection closes, for any reason, it kills its process group: no server outlives its trainer.

request      answer
-----------  -------------------------------------------------------------
(settings)   the first frame; the event `imported`, then `ready` or `failed`
`ping`       the version of the weights
`begin`      starts an update
`bucket`     some of its tensors, in a file or as the frame's payload
`commit`     ends an update; the version
`generate`   the responses, and the version of the weights that generated them
`sleep`      releases memory until the next request
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import popsd_wire as wire

if TYPE_CHECKING:
    import popsd_adapter
    import popsd_interfaces
    from vllm.outputs import CompletionOutput

_CONNECT_SECONDS = 60


class Server:
    """The model, the version of its weights, and one method for each request."""

    def __init__(self, settings: wire.Settings) -> None:
        """Loads the model with random weights.

        Args:
            settings: `arguments` of vLLM's `LLM`, the requested `interface`, whether to `sleep`, and `adapter`, null or
                the LoRA configuration of the adapters that are sent instead of weights.
        """
        import popsd_adapter
        import popsd_interfaces as interfaces
        from vllm import LLM
        from vllm.platforms import current_platform

        self.sleeps = bool(settings["sleep"]) and current_platform.is_sleep_mode_available()
        arguments = settings["arguments"]
        if self.sleeps:
            arguments["enable_sleep_mode"] = True
        self._adapter: popsd_adapter.Adapter | None = None
        if settings["adapter"] is not None:
            self.interface = popsd_adapter.INTERFACE
            self._llm = LLM(**arguments)
            self._weights: popsd_adapter.Adapter | popsd_interfaces.Weights = popsd_adapter.Adapter(
                self._llm, settings["adapter"]
            )
            self._adapter = self._weights
        else:
            self.interface = interfaces.choose(settings["interface"])
            extension = "popsd_weights.WorkerExtension"
            self._llm = LLM(worker_extension_cls=extension, **arguments, **interfaces.arguments(self.interface))
            self._weights = interfaces.Weights(self._llm, self.interface)
        self._version: int | None = None
        self._asleep = False

    def ping(self, request: wire.Request, payload: bytearray) -> wire.Answer:
        """The version, as a sign of life."""
        return {"version": self._version}

    def begin(self, request: wire.Request, payload: bytearray) -> wire.Answer:
        """Starts an update; until it is committed the weights have no version and nothing can be generated."""
        if (request["content"] == "adapter") != (self._adapter is not None):
            raise ValueError(f"{request['content']} for a server with the interface {self.interface}")
        self._wake()
        self._version = None
        self._weights.begin()
        return {}

    def bucket(self, request: wire.Request, payload: bytearray) -> wire.Answer:
        """Some tensors of an update."""
        with _file(request["path"], payload) as path:
            self._weights.bucket(path, request["tensors"])
        return {}

    def commit(self, request: wire.Request, payload: bytearray) -> wire.Answer:
        """Ends an update."""
        self._weights.commit(request["version"])
        self._version = request["version"]
        return {"version": self._version}

    def generate(self, request: wire.Request, payload: bytearray) -> wire.Answer:
        """The responses to each prompt, one prompt after the other."""
        from vllm import SamplingParams

        if self._version is None:
            raise RuntimeError("no weights have been sent")
        self._wake()
        shared = request["sampling"]
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in request["requests"]]
        sampling = [
            SamplingParams(
                temperature=shared["temperature"],
                top_p=shared["top_p"],
                top_k=shared["top_k"],
                max_tokens=shared["max_tokens"],
                stop_token_ids=shared["stop_token_ids"],
                ignore_eos=True,  # exactly the trainer's stop tokens
                seed=seed,
                n=count,  # with the seeds that follow
                logprobs=0,  # only of the sampled token
                detokenize=False,
            )
            for _, seed, count in request["requests"]
        ]
        start = time.monotonic()
        adapter = None if self._adapter is None else self._adapter.request
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
        completions = [o for output in outputs for o in sorted(output.outputs, key=lambda o: o.index)]
        responses = [[list(o.token_ids), _log_probs(o)] for o in completions]
        return {"responses": responses, "version": self._version, "seconds": time.monotonic() - start}

    def sleep(self, request: wire.Request, payload: bytearray) -> wire.Answer:
        """Releases memory, if vLLM can."""
        if self.sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True
        return {"asleep": self._asleep}

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


_REQUESTS = ("ping", "begin", "bucket", "commit", "generate", "sleep")


def _log_probs(completion: CompletionOutput) -> list[float]:
    return [at[token].logprob for token, at in zip(completion.token_ids, completion.logprobs, strict=True)]


@contextlib.contextmanager
def _file(path: str | None, payload: bytearray) -> Iterator[str]:
    """Path of a file that all workers can open; the payload of a frame is written to a file in memory."""
    if path is not None:
        yield path
        return
    descriptor = os.memfd_create("popsd-bucket")
    try:
        rest = memoryview(payload)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _read(connection: socket.socket, frames: queue.Queue[tuple[wire.Request | wire.Settings, bytearray]]) -> None:
    """Puts frames into the queue until the connection closes, then kills this process and its workers."""
    try:
        while True:
            frames.put(wire.receive(connection))
    except Exception as error:
        print(f"the connection to the trainer closed: {error}", flush=True)
    finally:
        os.killpg(os.getpgrp(), signal.SIGKILL)


def serve(connection: socket.socket, token: str) -> None:
    """Answers requests until the connection closes, which ends the process."""
    hello = {"token": token, "protocol": wire.PROTOCOL, "pid": os.getpid(), "host": socket.gethostname()}
    wire.send(connection, hello)
    frames: queue.Queue[tuple[wire.Request | wire.Settings, bytearray]] = queue.Queue()
    threading.Thread(target=_read, args=(connection, frames), name="frames", daemon=True).start()
    settings, _ = frames.get()
    stage = "import"
    try:
        import vllm

        wire.send(connection, {"event": "imported", "vllm": vllm.__version__})
        stage = "load"
        server = Server(settings)
    except Exception as error:
        traceback.print_exc()
        wire.send(connection, {"event": "failed", "stage": stage, "error": _words(error)})
        frames.get()  # Waits until the trainer has read it and closes the connection.
        return
    wire.send(connection, {"event": "ready", "interface": server.interface, "sleeps": server.sleeps})
    while True:
        request, payload = frames.get()
        try:
            if request.get("request") not in _REQUESTS:
                raise ValueError(f"no such request: {request.get('request')!r}")
            answer = getattr(server, request["request"])(request, payload)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": _words(error)}
        wire.send(connection, answer)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Reads the token, connects and serves."""
    parser = argparse.ArgumentParser(description="vLLM server of one trainer")
    parser.add_argument("--connect", required=True, metavar="HOST:PORT", help="where the trainer listens")
    host, _, port = parser.parse_args().connect.rpartition(":")
    token = sys.stdin.readline().strip()
    # The trainer handles signals and ends its server.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    connection = socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    serve(connection, token)


if __name__ == "__main__":
    main()
