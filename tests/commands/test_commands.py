"""The commands as a user runs them: in separate processes, with and without torchrun.

Training in one process and under torchrun starts Python as a user does. Other commands are forked from a process that
has imported everything; an import of all packages takes longer than they do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_popsd.config.loading import load_config
from nemo_popsd.config.resuming import with_decisions
from nemo_popsd.embedded.names import asset
from tests.command_runner import run_command
from tests.harness import run_ranks

pytestmark = pytest.mark.slow(seconds=12)

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "conf" / "tiny.yaml")
SHORT = [
    "training.steps=5",
    "training.prompts_per_step=2",
    "training.checkpoint_every=0",
    "optimizer.warmup_steps=0",
    "rollout.max_response_tokens=12",
    "evaluation.max_response_tokens=12",
    "evaluation.problems=2",
    "observability.progress_bar=false",
]
ONE = [sys.executable, "-m", "nemo_popsd"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nemo_popsd"]


def environment() -> dict[str, str]:
    """Environment variables without those of a launcher, with one thread."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}


def run(launcher: list[str], *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, *words], capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT
    )


def run_forked(log: Path, *words: str) -> tuple[int | None, str]:
    """Exit status and output of ``popsd *words``."""
    status = run_command(list(words), log, timeout=300)
    return status, log.read_text()


def command(rank: int, world_size: int, words: list[str]) -> tuple[int, str]:
    """Exit status and output of a command on ranks of the test harness."""
    from nemo_popsd.cli.main import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(words)
    return status, printed.getvalue()


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    done = run(ONE, "train", TINY, f"output={output}", *SHORT)
    assert done.returncode == 0, done.stderr
    (output / "stdout").write_text(done.stdout)
    return output


def test_train_writes_checkpoints_export_and_report(trained: Path) -> None:
    assert len(losses(trained)) == 5
    assert (trained / "checkpoints" / "final" / "manifest.json").is_file()
    assert (trained / "DONE").read_text() == "5\n"
    assert (trained / "huggingface" / "model.safetensors").is_file()
    assert (trained / "tensorboard").is_dir()
    printed = (trained / "stdout").read_text()
    assert "accuracy" in printed
    assert "before" in printed
    assert "after" in printed
    assert printed.splitlines()[-1] == f"report: {trained / 'report.html'}"
    recorded = with_decisions(load_config(TINY, [f"output={trained}", *SHORT]), None)
    assert load_config(trained / "config.yaml") == recorded


def test_the_report_of_a_run_has_its_results(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    for absent in (
        "not measured",
        "not diagnosed",
        "No validation",
        "no stored answers",
        "No step",
        "neither metrics nor",
    ):
        assert absent not in page, absent
    for printed in (
        "Did the accuracy change?",
        "Held-out questions: of 2",
        "Push of each component in tiny",
        "megatron-core",
    ):
        assert printed in page, printed
    for moment in ("before", "after"):
        assert (trained / "diagnosis" / moment / "index.html").is_file()


def test_diagnose_with_two_tensor_parallel_processes(trained: Path, tmp_path: Path) -> None:
    words = [TINY, f"output={tmp_path}", "parallel.tensor=2", *SHORT, "diagnosis.rows=2"]
    words = ["diagnose", *words, "--checkpoint", str(trained / "checkpoints" / "final")]
    ranks = run_ranks(command, 2, words)
    assert [status for status, _ in ranks] == [0, 0], ranks
    (page,) = (tmp_path / "diagnosis").glob("*/index.html")
    assert ranks[0][1].splitlines()[-1] == f"diagnosis: {page}"
    summary = json.loads((page.parent / "summary.json").read_text())
    assert (summary["step"], summary["rollouts"]) == (5, 2)


def test_two_tensor_parallel_processes_train_like_one(trained: Path, tmp_path: Path) -> None:
    words = ["train", TINY, f"output={tmp_path / 'two'}", "parallel.tensor=2", *SHORT]
    ranks = run_ranks(command, 2, words)
    assert [status for status, _ in ranks] == [0, 0], ranks
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-5)


def test_evaluate_export_and_convert(trained: Path, tmp_path: Path) -> None:
    final = str(trained / "checkpoints" / "final")
    words = ["evaluate", TINY, f"output={tmp_path / 'e'}", *SHORT, "--checkpoint", final]
    status, printed = run_forked(tmp_path / "evaluate.log", *words)
    assert status == 0, printed
    assert "accuracy" in printed
    status, printed = run_forked(tmp_path / "export.log", "export", final, str(tmp_path / "hf"))
    assert status == 0, printed
    exported = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert exported == (trained / "huggingface" / "model.safetensors").read_bytes()
    written, source = trained / "huggingface", Path(asset("nemo_popsd:tiny_reasoner"))
    assert json.loads((written / "generation_config.json").read_text()) == json.loads(
        (source / "generation_config.json").read_text()
    )
    cards = [(folder / "README.md").read_text() for folder in (written, tmp_path / "hf")]
    assert cards[1] == cards[0].replace("# tiny", "# hf").replace("serve tiny", "serve hf").replace('"tiny"', '"hf"')
    for part in (
        "`tiny_reasoner`",
        "- `nemo_popsd:tiny_train`",
        "| validation (2 problems, avg@12) | ",
        "| torch | 2.",
    ):
        assert part in cards[0], part
    assert str(tmp_path) not in cards[1]
    status, printed = run_forked(tmp_path / "convert.log", "convert", "nemo-to-hf", final, str(tmp_path / "c" / "hf"))
    assert status == 0, printed
    assert (tmp_path / "c" / "hf" / "README.md").read_text() == cards[1]


def test_torchrun_reports_the_first_failure_and_ends_all_ranks(tmp_path: Path) -> None:
    """Rank 1 fails in step 2; rank 0 fails after it, at the collective that it waits in."""
    script = tmp_path / "train.py"
    script.write_text(
        """
import os, sys
from nemo_popsd.cli.main import main
if os.environ["RANK"] == "1":
    from nemo_popsd.training.step import OnPolicyStep
    accumulate = OnPolicyStep._accumulate
    calls = []
    def fail(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("the first failure")
        return accumulate(self, *args)
    OnPolicyStep._accumulate = fail
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
    )
    launcher = [*TWO[:-2], str(script)]
    start = time.monotonic()
    done = run(launcher, "train", TINY, f"output={tmp_path / 'run'}", *SHORT)
    assert done.returncode not in (0, 85)
    assert len(losses(tmp_path / "run")) == 1
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in summary
    assert "ArithmeticError: the first failure" in summary
    assert time.monotonic() - start < 300


def one_line(log: Path, *words: str) -> str:
    status, printed = run_forked(log, *words)
    assert status == 2, printed
    errors = [line for line in printed.splitlines() if line.startswith("popsd: error:")]
    assert len(errors) == 1, printed
    assert "Traceback" not in printed
    assert "; need " in errors[0]
    return errors[0]


def test_a_broken_row_a_wrong_key_and_a_missing_file_are_one_line(tmp_path: Path) -> None:
    train = tmp_path / "log", "train", TINY, f"output={tmp_path / 'run'}"
    assert "training.stepz" in one_line(*train, "training.stepz=3")
    assert "nowhere.jsonl" in one_line(*train, "data.train.path=nowhere.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a", "question": "1+1?", "reference": "2"}\n{"id": "b", "question": "2+2?"}\n')
    printed = one_line(*train, f"data.train.path={broken}")
    assert "broken.jsonl:2" in printed
    assert "reference" in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_long_reference_is_one_line_where_the_setting_says_error(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "long", "question": "1+1?", "reference": "so 2 " * 400}) + "\n")
    settings = [f"output={tmp_path / 'run'}", f"data.train.path={rows}", "data.long_references=error"]
    printed = one_line(tmp_path / "log", "train", TINY, *settings)
    assert "row long" in printed
    limit = load_config(TINY).data.max_reference_tokens
    assert f"data.max_reference_tokens={limit}" in printed
