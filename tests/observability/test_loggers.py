import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_popsd.errors import UserError
from nemo_popsd.observability.config import ObservabilityConfig
from nemo_popsd.observability.jsonl_logger import JsonlLogger
from nemo_popsd.observability.loggers import LoggedRun, build_loggers
from nemo_popsd.observability.trackers import close_trackers
from tests.observability.one_step import fit


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def run_in(output: Path) -> LoggedRun:
    return LoggedRun(name="a-run", output=output, overwrite=False, parameters={"training": {"steps": 200}})


def strict(line: str) -> dict:
    """Parses one line by the JSON standard, which does not allow NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(path: Path) -> list[dict]:
    text = path.read_text()
    assert text.endswith("\n")
    return [strict(line) for line in text.splitlines()]


def test_every_call_writes_a_line_that_is_immediately_readable(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "new")
    logger.log_metrics({"train/loss": 0.5, "n": torch.tensor(3), "half": torch.tensor(0.5, dtype=torch.bfloat16)}, 1)
    assert lines(logger.path) == [{"step": 1, "train/loss": 0.5, "n": 3, "half": 0.5}]
    logger.log_metrics({"accuracy": 1.0})
    assert lines(tmp_path / "new" / "metrics.jsonl")[1] == {"accuracy": 1.0}


def test_nan_and_infinity_are_written_as_strings(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf}, step=0)
    (line,) = lines(logger.path)
    assert line == {"step": 0, "a": "nan", "b": "inf", "c": "-inf"}
    assert math.isnan(float(line["a"]))


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "", "{"])
def test_a_resumed_run_appends_and_drops_an_incomplete_line(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    JsonlLogger(tmp_path).log_metrics({}, step=3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    JsonlLogger(tmp_path / "run").log_metrics({"a": 1.0}, step=1)
    assert build_loggers(ObservabilityConfig(), run_in(tmp_path / "run")) == []
    fit(1, logger=build_loggers(ObservabilityConfig(), run_in(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_trainer_writes_jsonl_and_tensorboard(tmp_path: Path) -> None:
    loggers = build_loggers(ObservabilityConfig(), run_in(tmp_path))
    fit(3, logger=loggers)
    close_trackers(loggers, True)
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (1, 0.5),
        (2, 1.5),
        (3, 2.5),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.5), (3, 2.5)]


def test_tensorboard_can_be_turned_off(tmp_path: Path) -> None:
    loggers = build_loggers(ObservabilityConfig(tensorboard=False), run_in(tmp_path))
    assert [type(logger) for logger in loggers] == [JsonlLogger]


def test_metrics_that_cannot_be_written_end_the_run_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics .*metrics.jsonl: got Is a directory.*free space, or set output"):
        JsonlLogger(tmp_path).log_metrics({}, step=1)


def test_nothing_is_written_to_an_output_of_another_run(tmp_path: Path) -> None:
    JsonlLogger(tmp_path, may_write=lambda: False).log_metrics({"a": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_writes_offline(tmp_path: Path) -> None:
    """In a separate process: wandb keeps a service running and reads the environment once."""
    code = f"""
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.observability.loggers import LoggedRun, build_loggers
from dataclasses import asdict
from pathlib import Path
config = PopsdConfig(name="a-run", output={str(tmp_path / "run")!r}, overwrite=False)
config.observability.tensorboard = False
config.observability.wandb.enabled = True
config.observability.wandb.mode = "offline"
from nemo_popsd.observability.trackers import close_trackers
import wandb
def attempt(loss, succeeded):
    run = LoggedRun(
        name=config.name, output=Path(config.output), overwrite=config.overwrite, parameters=asdict(config)
    )
    loggers = build_loggers(config.observability, run)
    seen = []
    loggers[1].log_metrics({{"train/loss": loss}}, step=1.0)
    loggers[1]._put(lambda inner: seen.append((wandb.run.id, wandb.run.offline, wandb.run.config["training"]["steps"])))
    close_trackers(loggers, succeeded)
    assert wandb.run is None
    return seen[0]
first = attempt(0.125, None)
assert first[1:] == (True, 200), first
config.training.steps = 300
assert attempt(0.25, True) == (first[0], True, 300)
config.overwrite = True
assert attempt(0.5, True)[0] != first[0]
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    content = b"".join(file.read_bytes() for file in (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert b"train/loss" in content
    assert b"0.125" in content
    assert b"a-run" in content


def without_network(code: str) -> str:
    """Wraps `code` so that a connection to another machine is an error."""
    return f"""
import socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"a connection to {{address}}")
    return connect(self, address)
socket.socket.connect = refuse
{code}"""


@pytest.mark.slow
def test_mlflow_writes_to_files_without_a_network(tmp_path: Path) -> None:
    """A trainer logs to files, and mlflow's own client reads them, without network access."""
    code = f"""
import json, math, mlflow
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.observability.loggers import LoggedRun, build_loggers
from nemo_popsd.observability.trackers import close_trackers
from dataclasses import asdict
from pathlib import Path
config = PopsdConfig(name="a-run", output={str(tmp_path / "run")!r}, overwrite=False)
config.observability.tensorboard = False
config.observability.mlflow.enabled = True
def attempt(rows, steps, succeeded):
    config.training.steps = steps  # parameters of a run are those of its first attempt
    run = LoggedRun(
        name=config.name, output=Path(config.output), overwrite=config.overwrite, parameters=asdict(config)
    )
    loggers = build_loggers(config.observability, run)
    for row in rows:
        loggers[1].log_metrics({{"train/loss": row - 0.5}}, step=float(row))  # a float, as Lightning passes it
    close_trackers(loggers, succeeded)
    return loggers[1]
attempt((1, 2), 200, None)  # requested to stop
client = mlflow.MlflowClient({(tmp_path / "run" / "mlflow").as_uri()!r})
(experiment,) = [each for each in client.search_experiments() if each.name == "nemo_popsd"]
(run,) = client.search_runs([experiment.experiment_id])
assert run.info.status == "RUNNING", run.info
attempt((3,), 300, True)
(run,) = client.search_runs([experiment.experiment_id])
assert run.info.run_name == "a-run", run.info
assert run.info.status == "FINISHED", run.info
history = client.get_metric_history(run.info.run_id, "train/loss")
assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 1.5), (3, 2.5)], history
assert run.data.params["training/steps"] == "200", run.data.params
assert run.data.params["distillation/target/family"] == "purified"
config.overwrite = True
attempt((1,), 200, False)
assert sorted(each.info.status for each in client.search_runs([experiment.experiment_id])) == ["FAILED", "FINISHED"]
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    done = subprocess.run(
        [sys.executable, "-c", without_network(code)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
