"""Errors of any sub-command: a closed output, a missing package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_popsd.cli import boundary
from nemo_popsd.cli import main as cli
from nemo_popsd.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "conf" / "tiny.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["config", TINY], ["plan", TINY, "nodes=1", "gpus_per_node=1"], ["doctor", "--json"], ["--help"]], ids=str
)
def test_an_output_that_is_closed_early_prints_no_traceback(words: list[str]) -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "nemo_popsd", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.wait(timeout=60) == (0 if words == ["--help"] else boundary.OUTPUT_CLOSED)
    assert command.stderr.read() == ""


def test_a_command_that_builds_a_model_ends_too_when_nobody_reads_its_output(tmp_path: Path) -> None:
    code = f"""
import sys, types
entry = types.ModuleType("nemo_popsd.commands.entry")
def train(config, **options):
    for _ in range(10000):
        print("a line", flush=True)
entry.train = train
sys.modules[entry.__name__] = entry
from nemo_popsd.cli.main import main
sys.exit(main(["train", {TINY!r}, "output={tmp_path}"]))
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stderr is not None
    assert command.stdout.readline() == "a line\n"
    command.stdout.close()
    assert command.wait(timeout=120) == boundary.OUTPUT_CLOSED
    assert command.stderr.read() == ""


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        (["megatron.bridge"], ["no package megatron.bridge;", "pip install --no-deps ", "'megatron-bridge>=0.3.1"]),
        (
            ["transformers", "megatron.bridge"],
            ["no packages megatron.bridge, transformers;", "pip install 'transformers>=4.57,<5.13' && ", "--no-deps"],
        ),
    ],
)
def test_all_missing_packages_of_a_command_are_named_before_any_is_imported(
    absent: list[str],
    expected: list[str],
    calls: list[tuple],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(boundary, "_is_found", lambda module: module not in absent)
    assert cli.main(["train", TINY, f"output={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert calls == []
    assert err.count("\n") == 1
    assert all(text in err for text in expected), err


@pytest.mark.parametrize(
    ("version", "option"), [((3, 12, 1), "--no-deps"), ((3, 13, 0), "--no-deps --ignore-requires-python")]
)
def test_megatron_bridge_of_the_newer_stack_is_installed_on_python_3_13(
    version: tuple[int, ...], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "_is_found", lambda module: module != "megatron.bridge")
    with monkeypatch.context() as changed:
        changed.setattr(sys, "version_info", version)
        with pytest.raises(UserError, match=f"pip install {option} 'megatron-bridge>"):
            boundary.refuse_missing_packages()


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @boundary.quiet_when_output_closes
    def command() -> int:
        raise BrokenPipeError("of a server")

    with pytest.raises(BrokenPipeError, match="of a server"):
        command()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("megatron.bridge", "'megatron-bridge>=0.3.1,<0.7,!=0.4.*,!=0.5.*'"),
        ("megatron.core.models", "pip install 'megatron-core>=0.16,<0.20,!=0.17.*,!=0.18.*'"),
        ("nemo.core", "pip install 'nemo_toolkit[common]>=2.6,<3.1'"),
        ("transformers", "pip install 'transformers>=4.57,<5.13'"),
        ("lightning.pytorch", "pip install 'lightning>=2.4'"),
        ("math_verify", "pip install 'math-verify[antlr4_9_3]>=0.9,<0.10'"),
        ("mlflow", "pip install 'mlflow-skinny'"),
        ("something_that_torch_needs", "pip install 'something-that-torch-needs'"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command_to_install_it(
    module: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli.show_config, "run", fail)
    assert cli.main(["config", TINY]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"popsd: error: installation: got no package {module}; need ")
    assert line in err
    assert err.count("\n") == 1


def test_a_missing_module_of_this_package_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> None:
        raise ModuleNotFoundError("No module named 'nemo_popsd.nothing'", name="nemo_popsd.nothing")

    monkeypatch.setattr(cli.show_config, "run", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["config", TINY])


@pytest.mark.slow
def test_training_without_megatron_bridge_is_one_line(tmp_path: Path) -> None:
    """The real import, in a process in which `megatron.bridge` cannot be found."""
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "megatron.bridge":
            raise ModuleNotFoundError("No module named 'megatron.bridge'", name=name)
sys.meta_path.insert(0, Hidden())
from nemo_popsd.cli.main import main
sys.exit(main(["train", {TINY!r}, "output={tmp_path}"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("popsd: error: installation: got no package megatron.bridge")
