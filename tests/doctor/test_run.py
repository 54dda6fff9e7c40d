"""Checks of a run's configuration and paths, and of the output that all nodes must share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_popsd.doctor.run import examine_run, examine_sharing
from tests.doctor.clean import ROOT

TINY = str(ROOT / "conf" / "tiny.yaml")


def run(*overrides: str, world_size: int = 1, **others: object) -> tuple[str, str | None]:
    (finding,), output = examine_run(
        TINY, overrides, world_size=world_size, **{"evaluates": False, "checkpoint": None, **others}
    )
    return finding.state + " " + " ".join((finding.found, finding.need, finding.note)), output


def test_a_run_that_can_start_passes(tmp_path: Path) -> None:
    text, output = run(f"output={tmp_path}", world_size=2)
    assert text.startswith(f"ok {TINY} for 2 ranks")
    assert output == str(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.source=/nowhere", "set student.source"),
        ("data.train.path=/nowhere", "set data.train.path"),
        ("output=/etc/hostname/nowhere", "set output"),
        ("training.prompts_per_step=31", "set training.prompts_per_step="),
        ("training.stepz=3", "training.steps"),
        ("student.layers=transformer_engine", "set student.layers=auto"),
        ("student.gradient_accumulation_fusion=true", "set student.gradient_accumulation_fusion=auto"),
    ],
)
def test_a_failure_states_its_fix(tmp_path: Path, override: str, message: str) -> None:
    text, _ = run(f"output={tmp_path}", override, world_size=2)
    assert text.startswith("failed ")
    assert message in text


@pytest.mark.parametrize(
    ("setting", "off"), [("state_dtype=bf16", "state_dtype=fp32"), ("host_share=0.5", "host_share=0")]
)
def test_a_library_of_the_optimizer_is_missing(tmp_path: Path, setting: str, off: str) -> None:
    text, _ = run(f"output={tmp_path}", "student.precision=bf16", f"optimizer.{setting}")
    assert text.startswith("failed ")
    assert "needs transformer_engine, not installed" in text
    assert f"set optimizer.{off}" in text


def test_an_evaluation_needs_its_checkpoint_and_its_rows(tmp_path: Path) -> None:
    output = f"output={tmp_path}"
    assert run(output, evaluates=True)[0].startswith("ok")
    assert "--checkpoint '/nowhere'" in run(output, evaluates=True, checkpoint="/nowhere")[0]
    assert "set data.validation.path" in run(output, "data.validation.path=", evaluates=True)[0]


def sharing(outputs: list[Path], seconds: float) -> list[tuple[str, str]]:
    ready = threading.Barrier(len(outputs))

    def on_node(node: int) -> tuple[str, str]:
        ready.wait()
        finding = examine_sharing(str(outputs[node]), node=node, nodes=len(outputs), token="7.0", seconds=seconds)
        return finding.state, finding.found

    with ThreadPoolExecutor(len(outputs)) as pool:
        return list(pool.map(on_node, range(len(outputs))))


def test_nodes_that_share_their_output_pass(tmp_path: Path) -> None:
    assert sharing([tmp_path / "run"] * 3, seconds=30) == [("ok", "seen by 3 nodes")] * 3
    assert list((tmp_path / "run" / ".nodes").iterdir()) == []


def test_a_node_with_a_local_disk_is_detected(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    findings = sharing([shared, shared, own], seconds=0.5)
    assert findings == [("failed", f"{shared} seen by 2")] * 2 + [("failed", f"{own} seen by 1")]


def test_an_output_that_cannot_be_created_is_a_failure() -> None:
    assert examine_sharing("/proc/nowhere", node=0, nodes=1, token="m").state == "failed"


def test_a_file_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    foreign = tmp_path / ".nodes" / "m" / "notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    assert examine_sharing(str(tmp_path), node=0, nodes=1, token="m").state == "ok"
    assert [file.name for file in foreign.parent.iterdir()] == ["notes.txt"]
