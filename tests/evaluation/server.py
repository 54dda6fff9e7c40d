"""A real HTTP server with the completions API, which can reproduce faults of real servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Serves `model` on a port chosen by the kernel. A context manager.

    Attributes:
        root: directory from which it reports to have loaded the model.
        requests: bodies of the completion requests, in order of arrival.
        keys: Authorization headers of all requests.
        most_at_once: largest number of simultaneous completions.
        fault: called with each body before it is answered; may return (status, headers, text), or "hang up".
    """

    def __init__(self, model: str = "served", answer: Callable[[dict[str, Any]], str] | None = None) -> None:
        self.model = model
        self.root = "/models/one"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self.fault: Callable[[dict[str, Any]], tuple[int, dict[str, str], str] | str | None] = lambda body: None
        self.seconds = 0.0
        self._answer = answer or (lambda body: f"seed {body['seed']}</think> \\boxed{{4}}")
        self._running = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.keys.append(self.headers.get("Authorization"))
                if self.path == "/v1/models":
                    self._respond(200, json.dumps({"data": [{"id": outer.model, "root": outer.root}]}))
                else:
                    self._respond(404, "no such page")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.append(self.headers.get("Authorization"))
                try:
                    fault = outer._begin(body)
                    if fault is None and self.path == "/v1/completions":
                        time.sleep(outer.seconds)
                        fault = 200, {}, json.dumps(outer._completion(body))
                finally:  # before the client has the answer and may send another request
                    with outer._lock:
                        outer._running -= 1
                if fault == "hang up":
                    self.connection.close()
                elif fault is None:
                    self._respond(404, "no such page")
                else:
                    status, headers, text = fault
                    self._respond(status, text, headers)

            def _respond(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def _begin(self, body: dict[str, Any]) -> Any:
        with self._lock:
            self.requests.append(body)
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        return self.fault(body)

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self._answer(body)
        tokens = len(text.split())
        cut = tokens >= body["max_tokens"]
        return {
            "object": "text_completion",
            "model": body["model"],
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length" if cut else "stop"}],
            "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens, "total_tokens": 0},
        }
