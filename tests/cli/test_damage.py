"""Commands on damaged files of runs: an error of one line, or success if the damage does not matter.

More cases and other seeds: POPSD_FUZZ_CASES=500 POPSD_FUZZ_SEED=7 python -m pytest -s tests/cli/test_damage.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.cli.main import main
from nemo_popsd.embedded.names import asset
from nemo_popsd.rollout.engine import Rollout
from nemo_popsd.rollout.storage import RolloutStore, StoredRollout
from tests.evaluation.scores import score
from tests.evaluation.test_comparison import saved
from tests.report.runs_on_disk import write_run, write_samples

CASES = int(os.environ.get("POPSD_FUZZ_CASES", "60"))
SEED = int(os.environ.get("POPSD_FUZZ_SEED", "20261128"))
TINY = str(Path(__file__).resolve().parents[2] / "conf" / "tiny.yaml")
ODD: list[Any] = [None, "", -1, 0, 1e308, 10**400, "x", [], {}, [1], {"a": 1}, True, "nan", float("nan"), [[]]]
ODD.append("\ud800")  # half of a surrogate pair


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rollouts and evaluations, two evaluations to compare, and a model's directory."""
    folder = tmp_path_factory.mktemp("intact")
    run = write_run(folder / "run")
    for step, correct in ((0, False), (6, True)):
        write_samples(run, step, {"a": True, "b": correct})
    rows = [StoredRollout(name, 1, [1, 2], Rollout([3, 4], [-0.5, -0.1], False, 0)) for name in "ab"]
    RolloutStore(run).write(1, rows, part=0, parts=1)
    for name, correct in (("first", False), ("second", True)):
        saved(folder / "compared" / name / "validation", [score("p"), score("q", correct)])
    (folder / "model").mkdir()
    shutil.copy(asset("nemo_popsd:tiny_reasoner") / "config.json", folder / "model")
    return folder


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside `value`."""
    if isinstance(value, dict):
        for name in value:
            yield from [(*path, name), *places(value[name], (*path, name))]
    elif isinstance(value, list):
        for index in range(min(len(value), 3)):
            yield from [(*path, index), *places(value[index], (*path, index))]


def damage(file: Path, rng: random.Random) -> str:
    """Damages `file` and returns a description of the damage."""
    data = file.read_bytes()
    how = rng.choice(["cut", "bytes", "nested", "directory", "fifo", *["value", "gone"] * 4])
    if how in ("value", "gone") and file.suffix not in (".json", ".jsonl"):
        how = "cut"
    if how == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif how == "bytes":
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + rng.randbytes(4) + data[at:])
    elif how == "nested":
        file.write_bytes(b"[" * 100_000)
    elif how in ("directory", "fifo"):
        file.unlink()
        (file.mkdir if how == "directory" else lambda: os.mkfifo(file))()
    else:
        lines = data.decode().splitlines() if file.suffix == ".jsonl" else [data.decode()]
        number = rng.randrange(len(lines))
        value = json.loads(lines[number])
        *path, last = rng.choice(list(places(value)))
        inner = value
        for part in path:
            inner = inner[part]
        if how == "gone":
            del inner[last]
        else:
            inner[last] = rng.choice(ODD)
        lines[number] = json.dumps(value)
        file.write_text("\n".join(lines) + "\n")
    return how


COMMANDS = {
    "report": ("run", ["report", "run"]),
    "rollouts": ("run/rollouts", ["rollouts", "show", "run"]),
    "rows": ("run/rollouts", ["rollouts", "show", "run", "--step", "1", "--json"]),
    "compare": ("compared", ["evaluate", "--compare", "compared/first", "compared/second"]),
    "plan": ("model", ["plan", TINY, "student.source=model", "nodes=1", "gpus_per_node=1"]),
    "again": ("run/config.yaml", ["train", TINY, "output=run", "overwrite=false"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_files_are_read_or_refused_in_one_line(
    command: str,
    intact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rng, counts = random.Random(f"{SEED}/{command}"), Counter[str]()
    where, argv = COMMANDS[command]
    shutil.copytree(intact, tmp_path, dirs_exist_ok=True)
    assert main(argv) == (2 if command == "again" else 0)  # the run has other settings than TINY
    for _ in range(max(1, CASES // len(COMMANDS))):
        for entry in list(tmp_path.iterdir()):
            shutil.rmtree(entry)
        shutil.copytree(intact, tmp_path, dirs_exist_ok=True)
        root = tmp_path / where
        file = rng.choice([root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file()))
        how = damage(file, rng)
        capsys.readouterr()
        status = main(argv)
        err = capsys.readouterr().err
        printed = f"{how} in {file.relative_to(tmp_path)}: {err}"
        assert status in (0, 2), printed
        if status == 2:
            assert err.startswith("popsd: error: "), printed
            assert err.count("\n") == 1, printed
            assert len(err) < 1500, printed
        counts["refused" if status else "accepted"] += 1
    print(f"\n{command}: {dict(counts)}")
    assert counts["refused"], "no damage was noticed"
