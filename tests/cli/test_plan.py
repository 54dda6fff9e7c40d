"""`popsd plan`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_popsd.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
CONF = str(ROOT / "conf" / "qwen3_8b.yaml")


def test_a_plan_is_fast_and_imports_no_torch() -> None:
    code = f"""
import sys
from nemo_popsd.cli.main import main
status = main(["plan", {CONF!r}, "nodes=2"])
sys.exit("imported torch" if "torch" in sys.modules else status)
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Estimates by formula, not measurements")
    assert "sizes that ship with nemo_popsd as Qwen3-8B; models/Qwen3-8B is not on this machine" in done.stdout
    assert time.perf_counter() - start < 5


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CONF, "nodes=1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["estimate"] is True
    assert plan["fits"] is True
    memory, seconds = plan["memory_bytes"], plan["seconds"]
    for phase in ("rollout", "frozen", "training"):
        assert memory["peak"][phase] == sum(memory["standing"].values()) + sum(memory[phase].values())
    assert seconds["step"] == pytest.approx(sum(seconds[p]["total"] for p in ("rollout", "frozen", "training")))
    assert cli.main(["plan", CONF, "nodes=1,3", "--json"]) == 0
    one, three = json.loads(capsys.readouterr().out)
    assert one["seconds"] == plan["seconds"]
    assert three is None


def test_a_layout_is_explained_by_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    words = [CONF, "nodes=2", "parallel.tensor=8", "--explain"]
    assert cli.main(["plan", *words]) == 0
    text = capsys.readouterr().out
    table = {line.split("  ")[0]: line for line in text[text.index("one setting changed") :].splitlines()}
    assert "8 key-value heads do not divide by parallel.tensor=16" in table["parallel.tensor=16"]
    assert "parallel.sequence=false" in table
    assert "parallel.expert=2" not in table
    assert cli.main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", CONF, "nodes=2", "parallel.tensor=4", "--json"]) == 0
    smaller = json.loads(capsys.readouterr().out)
    (other,) = [entry for entry in plan["alternatives"] if entry["changes"] == {"parallel.tensor": 4}]
    assert other["fits"]
    assert other["step_seconds"] == smaller["seconds"]["step"]
    assert other["worst_bytes"] == max(smaller["memory_bytes"]["peak"].values())
    assert cli.main(["plan", CONF, "nodes=1,2", "--explain"]) == 2
    assert "got --explain with 2 numbers of nodes" in capsys.readouterr().err


def test_the_embedded_model_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(ROOT / "conf" / "tiny.yaml"), "nodes=1", "gpus_per_node=1"]) == 0
    assert "config.json of nemo_popsd:tiny_reasoner" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tensor=3"], "8 key-value heads do not divide by parallel.tensor=3"),
        (["student.adaptation=full"], "GiB usable"),
        (["nodes=3"], "do not divide by data-parallel ranks=24"),
    ],
)
def test_a_refusal_is_one_line_and_the_nearest_layouts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", CONF, *words]) == 2
    out, err = capsys.readouterr()
    first, head, *layouts = err.splitlines()
    assert out == ""
    assert first.startswith("popsd: error: plan of Qwen3-8B")
    assert message in first
    assert head == "nearest layouts that fit (estimates):"
    assert layouts
    for line in layouts:  # each, added to the command, is accepted
        changes = line.split("  (")[0].split()
        assert cli.main(["plan", CONF, *words, *changes]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nodes=none"], "need a list of whole numbers"),
        (["nodes=0"], "need whole numbers from 1 to 100,000"),
        (["hardware.memory=80"], "the nearest is hardware.memory_gib"),
        (["hardware.link_efficiency=2"], "a number from 0.001 to 1"),
        (["workload.layers=thin"], "one of fused, plain"),
        (["traning.steps=3"], "the nearest is training.steps"),
        (["workload.response_tokens=1025"], "got workload.response_tokens=1025 with rollout.max_response_tokens=1024"),
        (["workload.prompt_tokens=2049"], "set workload.prompt_tokens or data.max_prompt_tokens"),
        (["workload.reference_tokens=16385"], "need a mean no higher than the limit"),
        (["student.source=none"], "Qwen3-32B"),
        (["hardware.memory_gib=4", "gpus_per_node=1", "--fastest"], "no layout on 1 GPUs"),
    ],
)
def test_user_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CONF, *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("popsd: error: ") == 1
