"""Every command in the documents is checked by parser, settings, Makefile and scripts, and run unless
`tests.docs.command_runs` has a reason."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest

from nemo_popsd.cli.main import build_parser
from tests.command_runner import run_command
from tests.docker.test_dockerfile import tool
from tests.docs.command_checks import WrongCommandError, check, statements
from tests.docs.command_runs import AS_WRITTEN, NOT_RUN, is_run_with_stand_ins, prepare, reason, with_stand_ins
from tests.docs.pages import PAGES, ROOT, blocks, inline_code

_INLINE = re.compile(
    r"(popsd|torchrun|make|sbatch|python -m|slurm/(?:pipeline|sweep)\.sh|[A-Z_]+=\S+ (?:python|popsd)) .*"
)
_PLACEHOLDER = re.compile(r"\b[A-Z][A-Z]+\b(?!=)|\.\.\.")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_commands_to_check() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/tour.md", "docs/slurm.md"} <= set(PAGES)
    assert sum(len(statements(block.body)) for page in PAGES for block in blocks(page, "bash")) > 60


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_block_is_right(page: str) -> None:
    for block in blocks(page, "bash"):
        for statement in statements(block.body):
            check(statement, refused=block.words == "shown-below")


@pytest.mark.parametrize("page", PAGES)
def test_every_complete_command_in_the_text_is_right(page: str) -> None:
    commands = {action.metavar: action for action in build_parser()._actions}["COMMAND"].choices
    assert commands is not None
    for code in filter(_INLINE.fullmatch, inline_code(page)):
        words = code.split()
        if words[0] == "popsd" and not words[1].startswith("-"):
            assert words[1] in [*commands, "COMMAND"], code
            # A command that is named without its arguments, or with placeholders, is not a command to run.
            if len(words) == 2 or _PLACEHOLDER.search(code):
                continue
            if not any(word.startswith("conf/") for word in words):
                continue
        if not _PLACEHOLDER.search(code):
            check(shlex.split(code))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_shellcheck_finds_nothing(page: str) -> None:
    for block in blocks(page, "bash"):
        done = subprocess.run(
            # SC1091: a sourced file that does not exist yet. SC2164: a reader sees that cd failed.
            [tool("shellcheck"), "--shell=bash", "--exclude=SC1091,SC2164", "-"],
            input=block.body,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), block.body


@pytest.mark.parametrize(
    "statement",
    [
        "popsd trian conf/tiny.yaml",
        "popsd train conf/absent.yaml",
        "popsd train conf/tiny.yaml training.stepz=3",
        "popsd evaluate conf/tiny.yaml --checkpont runs/x",
        "popsd plan conf/qwen3_8b.yaml nodes=0",
        "torchrun --nproc 2 -m nemo_popsd train conf/tiny.yaml",
        "make trian",
        "make train NOTHING=1",
        "make train ARGS='training.stepz=3'",
        "sbatch slurm/absent.sh conf/tiny.yaml",
        "sbatch slurm/train.sh conf/tiny.yaml training.stepz=3",
        "python -m benchmarks.absent",
        "python -m benchmarks.gpu --rehearsal",
        "python -m pytest tests/absent",
        "source slurm/absent.sh",
        "curl https://example.org",
    ],
)
def test_a_wrong_command_is_detected(statement: str) -> None:
    with pytest.raises(WrongCommandError):
        check(shlex.split(statement))


def environment() -> dict[str, str]:
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(words: list[str], directory: Path, log: Path) -> int | None:
    """Exit status of a command; `popsd` in a process that has everything imported, anything else as it is."""
    words = [name for word in words for name in sorted(glob(word, root_dir=directory)) or [word]]
    if words[0] == "popsd":
        return run_command(words[1:], log, timeout=600, directory=directory)
    with log.open("w") as file:
        done = subprocess.run(words, cwd=directory, stdout=file, stderr=file, timeout=600, env=environment())
    return done.returncode


def commands_of(page: str) -> list[list[str]]:
    """The commands of the blocks whose output the page does not show, which tests/planning/test_docs.py runs."""
    return [words for b in blocks(page, "bash") if b.words == "" for words in statements(b.body)]


def test_every_command_is_run_or_has_a_reason() -> None:
    commands = [words for page in PAGES for words in commands_of(page)]
    unknown = [
        shlex.join(words)
        for words in commands
        if reason(words) is None and not AS_WRITTEN.fullmatch(shlex.join(words)) and not is_run_with_stand_ins(words)
    ]
    assert unknown == [], "run it, or state the reason in tests/docs/command_runs.py"
    unused = [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, " ".join(words)) for words in commands)]
    assert unused == []
    assert {b.words for page in PAGES for b in blocks(page, "bash")} <= {"", "run", "shown-below"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_commands_run_with_the_embedded_model(tmp_path: Path) -> None:
    """The commands of all pages except the tour, in order; later pages use the runs of docs/data.md."""
    prepare(tmp_path)
    log, trainings = tmp_path / "log", 0
    ran: list[list[str]] = []  # several pages have the same command
    commands = [words for page in PAGES for words in commands_of(page) if reason(words) is None]
    assert [words[1] for words in commands[:4]] == ["data", "data", "data", "train"]
    for words in commands:
        as_run = words
        if is_run_with_stand_ins(words):
            as_run = with_stand_ins(words, "runs/qwen3_8b" + f"_{trainings}" * bool(trainings))
            trainings += words[1] == "train"
        if as_run in ran:
            continue
        ran.append(as_run)
        # A machine without a GPU fails the examination for one.
        expected = {0, 1} if words[1] == "doctor" else {0}
        assert run(as_run, tmp_path, log) in expected, f"{shlex.join(as_run)}\n{log.read_text()[-4000:]}"
        assert "Traceback" not in log.read_text()
    assert (tmp_path / "models" / "Qwen3-8B-purified" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_first_run_works_as_it_is_written(tmp_path: Path) -> None:
    """All of docs/tour.md, in its order, in a directory with nothing but the configurations."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    page, log = "docs/tour.md", tmp_path / "log"
    commands = [words for b in blocks(page, "bash") if b.words == "run" for words in statements(b.body)]
    [script] = [block.body for block in blocks(page, "python") if block.words == "run"]
    assert {words[0] for words in commands} == {"popsd", "torchrun"}
    for words in [*commands, [sys.executable, "-c", script]]:
        assert run(words, tmp_path, log) == 0, f"{shlex.join(words)}\n{log.read_text()[-4000:]}"
    listed = re.findall(r"^\| (`[^|]+) \| ", (ROOT / page).read_text(), re.MULTILINE)
    names = [name for cell in listed for name in re.findall(r"`([^`]+)`", cell)]
    assert "checkpoints/final" in names
    for name in names:
        if not name.startswith("make "):
            assert (tmp_path / "runs" / "tour" / name).exists(), name
    assert (tmp_path / "runs" / "tiny_hf" / "config.json").is_file()
