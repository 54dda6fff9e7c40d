"""Samples over HTTP, from a real server."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import TransientError, UserError
from nemo_popsd.evaluation import endpoint as module
from nemo_popsd.evaluation.config import EndpointConfig
from nemo_popsd.evaluation.endpoint import Endpoint
from nemo_popsd.evaluation.records import EvaluationDirectory
from nemo_popsd.evaluation.sampling import missing_samples
from nemo_popsd.evaluation.served import evaluate_served
from nemo_popsd.rollout.engine import SamplingParams
from tests.data.small import tokenizer
from tests.evaluation.server import Server
from tests.evaluation.test_sampling import prompts

ROOT = Path(__file__).parents[2]
TINY = ROOT / "conf" / "tiny.yaml"
SAMPLING = SamplingParams(0.7, 0.9, 5, max_response_tokens=50, stop_token_ids=frozenset({3, 2}))
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def endpoint(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(EndpointConfig(url=server.url, **settings), tokenizer())


def generate(server: Server, count: int = 2, samples: int = 2, **settings: Any) -> list[Any]:
    requests = missing_samples(prompts(count), samples)
    return list(endpoint(server, **settings).generate(requests, SAMPLING, seed=1))


def test_a_request_contains_all_sampling_parameters(server: Server) -> None:
    (sample,) = generate(server, 1, 1)
    (request,) = server.requests
    seed = request.pop("seed")
    assert request == {
        "model": "served",
        "prompt": [7, 7],
        "max_tokens": 50,
        "temperature": 0.7,
        "top_p": 0.9,
        "n": 1,
        "stream": False,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": [2, 3],
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }
    assert 0 <= seed < 2**31
    assert (sample.problem, sample.sample, sample.truncated, sample.tokens) == ("p0", 0, False, 3)
    assert sample.text == f"seed {seed}</think> \\boxed{{4}}"


def test_standard_parameters_and_text_for_other_servers(server: Server) -> None:
    generate(server, 1, 1, dialect="openai", prompts="text")
    (request,) = server.requests
    assert set(request) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "stream"}
    assert request["prompt"] == tokenizer().decode([7, 7])


def test_an_unpaired_surrogate_in_an_answer_is_replaced() -> None:
    with Server(answer=lambda body: "half \ud83d of a pair") as server:
        (sample,) = generate(server, 1, 1)
    assert sample.text == "half ? of a pair"


def test_disabled_top_k_is_sent(server: Server) -> None:
    sampling = SamplingParams(1.0, 1.0, 0, max_response_tokens=3, stop_token_ids=frozenset({2}))
    (sample,) = endpoint(server).generate(missing_samples(prompts(1), 1), sampling, seed=1)
    assert server.requests[0]["top_k"] == -1
    assert sample.truncated


def test_each_sample_has_its_own_seed_and_concurrency_is_limited(server: Server) -> None:
    server.seconds = 0.02
    samples = generate(server, 5, 4, concurrency=3)
    assert sorted((s.problem, s.sample) for s in samples) == [(f"p{n}", s) for n in range(5) for s in range(4)]
    assert len({request["seed"] for request in server.requests}) == 20
    assert server.most_at_once == 3
    again = {(s.problem, s.sample): s.text for s in generate(server, 5, 4)}
    assert again == {(s.problem, s.sample): s.text for s in samples}
    assert generate(server, 0) == []


@pytest.mark.parametrize(
    "fault", [(429, {"Retry-After": "2"}, "busy"), (500, {}, "oops"), (503, {}, ""), "hang up"], ids=str
)
def test_transient_failures_are_retried(
    server: Server, fault: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pauses.append))
    seen: dict[int, int] = {}

    def twice(body: dict[str, Any]) -> Any:
        seen[body["seed"]] = seen.get(body["seed"], 0) + 1
        return fault if seen[body["seed"]] <= 2 else None

    server.fault = twice
    assert len(generate(server, concurrency=1)) == 4
    assert set(seen.values()) == {3}
    assert len(pauses) == 8
    if fault[0] == 429:
        assert set(pauses) == {2.0}
    else:
        assert all(0.5 <= pause <= 1 for pause in pauses[::2])
        assert all(1 <= pause <= 2 for pause in pauses[1::2])
    assert "retrying in" in caplog.text


def test_permanent_failures_are_raised_after_the_received_samples(server: Server) -> None:
    server.fault = lambda body: (500, {}, "out of memory") if len(body["prompt"]) == 3 else None
    requests = missing_samples(prompts(3), 1)
    samples = endpoint(server, retries=2, concurrency=1).generate(requests, SAMPLING, seed=1)
    assert next(samples).problem == "p0"
    with pytest.raises(TransientError, match=r"status 500: out of memory, 3 times.*check the server"):
        next(samples)
    assert len(server.requests) == 4


def test_a_refusal_is_raised_without_retries(server: Server) -> None:
    server.fault = lambda body: (400, {}, '{"error": "prompt is too long"}')
    with pytest.raises(UserError, match=r"status 400: .*prompt is too long"):
        generate(server, 1, 1)
    assert len(server.requests) == 1


def test_a_defect_is_not_a_user_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "_request", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(server)


def test_the_key_is_sent_and_never_logged(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    generate(server, 1, 1)
    assert set(server.keys) == {None}
    monkeypatch.setenv("MY_KEY", KEY)
    server.keys.clear()
    server.fault = lambda body: (500, {}, f"bad key {KEY}") if len(server.requests) < 4 else (401, {}, f"no {KEY}")
    with pytest.raises(UserError, match=r"status 401: no \*\*\*.*MY_KEY is set") as caught:
        generate(server, 1, 1, key_variable="MY_KEY")
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert "bad key ***" in caplog.text
    assert KEY not in caplog.text + str(caught.value)


def test_the_key_does_not_follow_a_redirect(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as elsewhere:
        server.fault = lambda body: (307, {"Location": f"{elsewhere.url}/completions"}, "moved")
        with pytest.raises(UserError, match="status 307"):
            generate(server, 1, 1)
        assert elsewhere.keys == []


def test_other_servers_are_refused(server: Server) -> None:
    with pytest.raises(UserError, match="got models served; need the model 'other'"):
        endpoint(server, model="other")
    server.fault = lambda body: (200, {}, '{"choices": [{"text": "x"}]}')
    with pytest.raises(UserError, match="an answer without 'finish_reason'"):
        generate(server, 1, 1)
    server.fault = lambda body: (200, {}, "<html>")
    with pytest.raises(TransientError, match=r"JSONDecodeError.*3 times"):
        generate(server, 1, 1, retries=2)
    url = server.url
    server.__exit__()
    with pytest.raises(UserError, match="refused"):
        Endpoint(EndpointConfig(url=url, retries=1), tokenizer())


# The command


def configured(output: Path, server: Server, *more: str) -> PopsdConfig:
    settings = [f"output={output}", f"evaluation.endpoint.url={server.url}", "evaluation.problems=3"]
    return load_config(TINY, [*settings, "evaluation.samples_per_problem=2", *more])


def evaluated(output: Path, server: Server, *more: str) -> str:
    """The tables of `popsd evaluate`."""
    config = configured(output, server, *more)
    return evaluate_served(
        config.evaluation, config.data, source=config.student.source, output=config.output, seed=config.seed
    )


def test_a_repeated_command_generates_only_missing_samples(server: Server, tmp_path: Path) -> None:
    table = evaluated(tmp_path, server)
    assert "accuracy (avg@2)" in table
    assert len(server.requests) == 6
    assert evaluated(tmp_path, server) == table
    assert len(server.requests) == 6
    more = evaluated(tmp_path, server, "evaluation.samples_per_problem=3", "evaluation.problems=4")
    assert "avg@3" in more
    assert len(server.requests) == 12
    # Fewer samples than exist: only the first ones are read.
    assert evaluated(tmp_path, server) == table
    with pytest.raises(UserError, match=r"temperature=0\.5 where the samples have 1\.0"):
        evaluated(tmp_path, server, "evaluation.temperature=0.5")
    server.root = "/models/other"
    with pytest.raises(UserError, match="weights_digest='served from /models/other'"):
        evaluated(tmp_path, server)
    assert len(server.requests) == 12
    directory = EvaluationDirectory(tmp_path / "evaluation" / "served" / "validation")
    assert directory.summary()["closed_thinking_share"] == 1.0
    assert "key" not in json.dumps(directory.settings())


@pytest.mark.slow
def test_a_killed_evaluation_continues(server: Server, tmp_path: Path) -> None:
    server.seconds = 0.15
    words = [f"output={tmp_path}", f"evaluation.endpoint.url={server.url}", "evaluation.problems=10"]
    words += ["evaluation.samples_per_problem=4", "evaluation.endpoint.concurrency=2"]
    command = [sys.executable, "-m", "nemo_popsd", "evaluate", str(TINY), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    file = tmp_path / "evaluation" / "served" / "validation" / "samples-00000.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (file.exists() and file.read_bytes().count(b"\n") >= 7):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            os.sched_yield()
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    kept = file.read_bytes().count(b"\n")
    asked = len(server.requests)
    server.seconds = 0.0
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(server.requests) - asked == 40 - kept
    assert len(EvaluationDirectory(file.parent).samples()) == 40
    assert "accuracy (avg@4)" in done.stdout
    assert KEY not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY in path.read_text()]
