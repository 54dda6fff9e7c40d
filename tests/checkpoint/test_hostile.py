"""Random damaged and hostile models are read, or refused in one line.

No command hangs, runs code of a model, or writes outside its output. More cases of each type:

    POPSD_HOSTILE_CASES=100 POPSD_HOSTILE_SEED=7 pytest tests/checkpoint/test_hostile.py
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from nemo_popsd.checkpoint.conversion import huggingface_to_nemo
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.embedded.names import asset
from tests.checkpoint.file_damage import (
    change_json_value,
    flip_bytes,
    overwrite_file,
    remove_file,
    replace_by_special_file,
    truncate_file,
)
from tests.checkpoint.hostile_checkpoints import change_index, change_yaml, replace_by_pickle, sealed, write_archive
from tests.checkpoint.hostile_models import (
    add_python_code,
    add_wrong_index,
    change_config,
    change_header,
    change_tensors,
    copy_weights,
    weights_as_pickle,
)
from tests.command_runner import HANGS, run_command
from tests.harness import run_ranks

CASES = int(os.environ.get("POPSD_HOSTILE_CASES", "5"))
SEED = int(os.environ.get("POPSD_HOSTILE_SEED", "1"))
SECONDS = 60.0


class IntactModels:
    """The models that are changed, and the files that show an attack.

    Attributes:
        folder: contains all other paths.
        mark: a file that payloads create when they are run.
        model: a Hugging Face directory.
        checkpoint: a NeMo checkpoint.
        outside: a directory that no command may change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.outside = folder, folder / "mark", folder / "outside"
        self.model = Path(shutil.copytree(asset("nemo_popsd:tiny_reasoner"), folder / "model"))
        self.outside.mkdir()
        (self.outside / "secret").write_text("kept")
        run_ranks(_convert, 1, self.model, folder / "checkpoint", timeout=300.0)
        self.checkpoint = folder / "checkpoint"


def _convert(rank: int, world_size: int, source: Path, output: Path) -> None:
    huggingface_to_nemo(HuggingFaceModel(source), output, "fp32")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> IntactModels:
    return IntactModels(tmp_path_factory.mktemp("hostile"))


def _check_command(intact: IntactModels, argv: list[str], case: str) -> None:
    """Runs a command on a changed model, and checks its exit status, output and side effects."""
    log = intact.folder / "log"
    status = run_command(argv, log, timeout=SECONDS)
    text = log.read_text(errors="replace")
    assert status is not HANGS, f"{case}: hangs\n{text[-2000:]}"
    lines = [line for line in text.splitlines() if line.startswith("popsd: error")]
    assert "Traceback" not in text, f"{case}: {text[-3000:]}"
    assert (status == 2 and len(lines) == 1) or (status == 0 and not lines), f"{case}: exit {status}\n{text[-3000:]}"
    assert not intact.mark.exists(), f"{case}: code of the model has run"
    assert [path.name for path in intact.outside.iterdir()] == ["secret"], case
    assert (intact.outside / "secret").read_text() == "kept", case
    output = Path(argv[-1])
    assert output.exists() == (status == 0), f"{case}: exit {status}"
    assert not [path for path in output.parent.iterdir() if path.name.startswith(output.name) and path != output], case


def _change_checkpoint(rng: random.Random, checkpoint: Path, mark: Path) -> str:
    damage = (truncate_file, flip_bytes, overwrite_file, remove_file, change_json_value)
    unsealed = rng.choice((*damage, replace_by_special_file))
    change = rng.choice((*damage, change_index, replace_by_pickle(mark), change_yaml(mark)))
    return rng.choice((unsealed, sealed(change), sealed(change)))(rng, checkpoint)


def _change_model(rng: random.Random, model: Path, mark: Path) -> str:
    damage = (truncate_file, flip_bytes, overwrite_file, remove_file, replace_by_special_file, change_json_value)
    changes = (change_config, change_config, change_tensors, change_header, add_wrong_index, copy_weights)
    return rng.choice((*damage, *changes, weights_as_pickle(mark), add_python_code(mark)))(rng, model)


def _check_case(intact: IntactModels, index: int, model_type: str) -> None:
    rng = random.Random(f"{SEED} {model_type} {index}")
    work = intact.folder / f"{model_type}-{index}"
    output = intact.folder / f"out-{model_type}-{index}"
    if model_type == "archive":
        archive = work.with_suffix(".nemo")
        change = write_archive(rng, intact.checkpoint, archive)
        argv = ["convert", "nemo-to-hf", str(archive), str(output)]
    elif model_type == "checkpoint":
        shutil.copytree(intact.checkpoint, work)
        change = _change_checkpoint(rng, work, intact.mark)
        argv = ["convert", "nemo-to-hf", str(work), str(output)]
    else:
        shutil.copytree(intact.model, work)
        change = _change_model(rng, work, intact.mark)
        argv = ["convert", "hf-to-nemo", str(work), str(output)]
    try:
        _check_command(intact, argv, f"{model_type} {index} of seed {SEED}: {change}")
    finally:
        for path in (work, output, work.with_suffix(".nemo"), work.with_suffix(".source")):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["directory", "checkpoint", "archive"])
def test_damaged_and_hostile_models_are_read_or_refused_in_one_line(intact: IntactModels, model_type: str) -> None:
    failures = []
    for index in range(CASES):
        try:
            _check_case(intact, index, model_type)
        except AssertionError as error:
            failures.append(str(error).split("\nassert ")[0])
    assert not failures, f"{len(failures)} of {CASES}:\n" + "\n\n".join(failures)
