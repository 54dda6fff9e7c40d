"""Saves that are killed, and saves onto a full disk: the previous checkpoint is intact and loads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from tests.counted_kills import CountedKill
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model

KILLS = 30


def _run(source: Path, output: Path, *, background: bool) -> tuple[Any, Any]:
    """The parts of a run that is saved, and its `RunCheckpoints`."""
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.checkpoint.save import Content
    from nemo_popsd.config.loading import to_dict_config
    from nemo_popsd.megatron.config import OptimizerConfig
    from nemo_popsd.megatron.optimizer import StudentOptimizer
    from nemo_popsd.model.checkpoints import RunCheckpoints
    from nemo_popsd.parallel.signals import StopSignals

    config = PopsdConfig(output=str(output))
    config.training.async_save, config.training.keep_last = background, 1
    student = build_student(source)
    optimizer = StudentOptimizer(student.wrap(OptimizerConfig()), OptimizerConfig(), steps=9, bf16=False)
    architecture = HuggingFaceModel(source)
    model = SimpleNamespace(student=student, settings=config, completed_steps=0, optimizer=optimizer)

    def content() -> Content:
        return Content(
            models=student.chunks,
            architecture=architecture,
            config=to_dict_config(config),
            step=model.completed_steps,
            base={"source": "s", "fingerprint": "f"},
            adapters_only=student.adapters is not None,
            optimizer=optimizer.megatron,
            facts={"data": "d"},
        )

    checkpoints = RunCheckpoints(
        config.training,
        output,
        content=content,
        completed_steps=lambda: model.completed_steps,
        stop=StopSignals(),
        resumed=None,
    )
    checkpoints.at_end()
    return model, checkpoints


def _source(directory: Path) -> Path:
    """A tiny model with a tokenizer file, which the checkpoints of a run must have."""
    (save_tiny_model(directory) / "tokenizer.json").write_text("{}")
    return directory


def _mark(model: Any, step: int) -> None:
    """Sets every element of weights and optimizer state to `step`."""
    from nemo_popsd.megatron.optimizer_state import parameter_states, set_step_count

    model.completed_steps = step
    with torch.no_grad():
        for state in parameter_states(model.optimizer.megatron):
            state.parameter.fill_(step)
            for value in state.values.values():
                value.fill_(step)
    set_step_count(model.optimizer.megatron, step)


def _marks(model: Any) -> set[float]:
    from nemo_popsd.megatron.optimizer_state import parameter_states

    marks = set()
    for state in parameter_states(model.optimizer.megatron):
        size = min(203, state.parameter.shape[0])  # the rest is padding of the vocabulary
        marks |= set(state.parameter.detach()[:size].unique().tolist())
        for value in state.values.values():
            marks |= set(value.view(state.parameter.shape)[:size].unique().tolist())
    return marks


def _load_and_save_until_killed(rank: int, world_size: int, source: Path, output: Path, attempt: int) -> None:
    from nemo_popsd.checkpoint.retention import FINAL, name_of
    from nemo_popsd.commands.run_directory import RunDirectory
    from nemo_popsd.model.checkpoints import resume_optimizer

    model, checkpoints = _run(source, output, background=attempt % 2 == 1)
    step = 0
    if (checkpoint := RunDirectory(model.settings).checkpoint()) is not None:
        checkpoint.load_trained(model.student.gpt)
        resume_optimizer(checkpoint, model.student.chunks, model.optimizer)
        step = checkpoint.step
        assert _marks(model) == {float(step)}
    (output / f"loaded-{attempt}").write_text(str(step))
    kill = CountedKill()
    while True:
        step += 1
        _mark(model, step)
        checkpoints.save(FINAL if step % 3 == 0 else name_of(step))
        checkpoints.wait()
        kill.arm((attempt + 0.5) / KILLS)  # after the first save, so that there is a previous checkpoint


@pytest.mark.slow
def test_kill_9_at_any_moment_of_saving_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    """Each of thirty processes loads the checkpoint of the process before, and is killed while it saves the next."""
    source, output = _source(tmp_path / "hf"), tmp_path / "run"
    output.mkdir()
    partial_saves = 0
    for attempt in range(KILLS):
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(_load_and_save_until_killed, 1, source, output, attempt)
        assert (output / f"loaded-{attempt}").exists()
        partial_saves += any(path.name.endswith(".partial") for path in (output / "checkpoints").iterdir())
    loaded = [int((output / f"loaded-{attempt}").read_text()) for attempt in range(KILLS)]
    assert loaded == sorted(loaded)
    assert loaded[1] >= 1
    assert partial_saves >= KILLS // 6, "no kill happened during a save"


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no permission to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill_the_disk(rank: int, world_size: int, source: Path, disk: Path) -> dict[str, str]:
    from nemo_popsd.checkpoint.retention import name_of
    from nemo_popsd.parallel.agreement import raise_on_all_ranks
    from nemo_popsd.rollout.engine import Rollout
    from nemo_popsd.rollout.storage import RolloutStore, StoredRollout

    messages: dict[str, str] = {}
    usage = shutil.disk_usage
    for background in (False, True):
        output = disk / f"background={background}"
        model, checkpoints = _run(source, output, background=background)
        _mark(model, 1)
        checkpoints.save(name_of(1))
        checkpoints.wait()
        free = usage(disk).free
        (disk / "other data").write_bytes(bytes(free - 100_000))
        for known in (True, False):  # whether the file system reports the free space
            if not known:
                shutil.disk_usage = lambda _: usage("/")  # type: ignore[assignment]
            _mark(model, 2)
            before = {name: value.clone() for name, value in model.student.gpt.named_parameters()}
            try:
                checkpoints.save(name_of(2))
                checkpoints.wait()
            except UserError as error:
                messages[f"{background} {known}"] = str(error)
            shutil.disk_usage = usage
            assert _marks(model) == {2.0}
            for name, value in model.student.gpt.named_parameters():
                assert torch.equal(value, before[name])
            assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", "step-000001"]
            _reload(source, output / "checkpoints" / "step-000001", 1)
        (disk / "other data").unlink()
        checkpoints.save(name_of(2))  # there is space again: the same state is saved
        checkpoints.wait()
        _reload(source, output / "checkpoints" / "step-000002", 2)
        shutil.rmtree(output)
    (disk / "other data").write_bytes(bytes(usage(disk).free - 20_000))
    rows = [StoredRollout("r", 1, [1], Rollout(list(range(5000)), [0.5] * 5000, False, 0))]
    try:
        store = RolloutStore(disk)
        raise_on_all_ranks("rollouts", lambda: store.write(1, rows, part=0, parts=1), need="space", fix="free space")
    except UserError as error:
        messages["rollouts"] = str(error)
    assert store.complete(1, {0}) is None
    return messages


def _reload(source: Path, checkpoint: Path, step: int) -> None:
    from nemo_popsd.checkpoint.nemo import NemoCheckpoint
    from nemo_popsd.model.checkpoints import resume_optimizer

    model, _ = _run(source, checkpoint.parent, background=False)
    opened = NemoCheckpoint(checkpoint)
    opened.load_trained(model.student.gpt)
    resume_optimizer(opened, model.student.chunks, model.optimizer)
    assert _marks(model) == {float(step)}


@pytest.mark.slow
def test_a_full_disk_is_reported_and_changes_nothing(small_disk: Path, tmp_path: Path) -> None:
    source = _source(tmp_path / "hf")
    [messages] = run_ranks(_fill_the_disk, 1, source, small_disk)
    assert set(messages) == {"False True", "False False", "True True", "True False", "rollouts"}
    for text in messages.values():
        assert "o space left on" in text
        assert "free space" in text
        assert "\n" not in text
