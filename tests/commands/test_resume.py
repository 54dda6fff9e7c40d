"""Runs that are killed, signalled or moved, and resumed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.cli.main import main
from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import SAVED_AND_STOPPED
from tests.model.runs import LORA, SETTINGS, TINY, differences, metrics, rollouts, state, train, train_and_die

pytestmark = pytest.mark.slow

ADAPTATIONS = {
    "full": (),
    "lora": (LORA, "distillation.teacher.weights=ema", "distillation.teacher.decay=0.5"),
}
"""With adapters the weights of the teachers move; their second set is restored with the optimizer state."""
both = pytest.mark.parametrize("adaptation", list(ADAPTATIONS))
SIX_STEPS = ("training.steps=6", "training.checkpoint_every=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(runs: Path) -> Path:
    """Four steps without an interruption, with and without adapters."""
    for adaptation, words in ADAPTATIONS.items():
        assert train(runs / "undisturbed" / adaptation, *words)[0][0] == 0
    return runs / "undisturbed"


@pytest.fixture(scope="module")
def resumed(runs: Path) -> Path:
    """Killed in step 4, with a checkpoint after step 2; then the same command again."""
    for adaptation, words in ADAPTATIONS.items():
        output = runs / "resumed" / adaptation
        train_and_die(output, *words, plan={"step": 4})
        assert [step for step, _ in metrics(output, "train/loss")] == [1, 2, 3]
        assert sorted(rollouts(output)) == [f"step-{step:06d}/part-0000-of-0001.jsonl" for step in (1, 2, 3, 4)]
        with (output / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "train/l')  # an incomplete line, as after a kill
        (output / "checkpoints" / "step-000003.partial").mkdir()
        written = (output / "rollouts" / "step-000003" / "part-0000-of-0001.jsonl").stat().st_mtime_ns
        status, printed = train(output, *words)[0]
        assert status == 0
        assert "resuming after step 2" in printed
        part = output / "rollouts" / "step-000003" / "part-0000-of-0001.jsonl"
        assert part.stat().st_mtime_ns == written  # its rollouts were not generated again
    return runs / "resumed"


@pytest.fixture(scope="module")
def longer(undisturbed: Path, runs: Path) -> Path:
    """The same runs with two steps more."""
    for adaptation, words in ADAPTATIONS.items():
        output = runs / "longer" / adaptation
        shutil.copytree(undisturbed / adaptation, output)
        assert train(output, *words, *SIX_STEPS)[0][0] == 0
    return runs / "longer"


@both
def test_a_killed_run_ends_with_the_same_bits(undisturbed: Path, resumed: Path, adaptation: str) -> None:
    one, other = undisturbed / adaptation, resumed / adaptation
    assert differences(one / "checkpoints" / "final", other / "checkpoints" / "final") == []
    assert any("random-00000" in name for name in state(one / "checkpoints" / "final"))
    assert rollouts(one) == rollouts(other)
    assert len(rollouts(one)) == 4
    assert metrics(one, "train/loss") == metrics(other, "train/loss")


def test_a_kill_before_the_first_checkpoint_changes_no_bit(undisturbed: Path, runs: Path) -> None:
    """The second start logs the first validation even if the kill came before its metrics, and the third start, of a
    run that was killed before it was marked as finished, logs none again.
    """
    output = runs / "killed early"
    train_and_die(output, plan={"step": 1})
    assert (output / "validation" / "step-000000" / "summary.json").is_file()
    assert not list((output / "checkpoints").glob("step-*"))
    (output / "metrics.jsonl").unlink()
    for _ in range(2):
        assert train(output)[0][0] == 0
        assert differences(undisturbed / "full" / "checkpoints" / "final", output / "checkpoints" / "final") == []
        assert [step for step, _ in metrics(output, "validation/accuracy")] == [0, 2, 4]
        (output / "DONE").unlink()


def test_a_resumed_run_does_not_need_the_checkpoint_that_it_started_from(undisturbed: Path, runs: Path) -> None:
    """Resumed after step 2, which is removed when step 3 is complete: `final` still has all files."""
    from nemo_popsd.checkpoint.manifest import read_manifest

    output = runs / "outlived"
    words = ("training.checkpoint_every=1", "training.keep_last=1", "training.export_huggingface=true")
    train_and_die(output, *words, plan={"step": 3})
    status, printed = train(output, *words)[0]
    assert status == 0
    assert "resuming after step 2" in printed
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["final", "latest", "step-000003"]
    files = [sorted(read_manifest(path / "checkpoints" / "final")["files"]) for path in (undisturbed / "full", output)]
    assert files[0] == files[1]
    assert {"huggingface/config.json", "huggingface/tokenizer.json"} <= set(files[0])
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (output / "huggingface").iterdir()}
    assert train(output, *words, "training.steps=5")[0][0] == 0


def test_an_old_damaged_checkpoint_is_kept_and_does_not_stop_the_run(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed / "full", output)
    (output / "DONE").unlink()
    old = output / "checkpoints" / "step-000002"
    (old / "manifest.json").write_bytes(b"")
    words = ("training.steps=6", "training.checkpoint_every=1", "training.keep_last=1")
    status, printed = train(output, *words)[0]
    assert status == 0, printed
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "final",
        "latest",
        "step-000002",
        "step-000005",
    ]
    assert (old / "weights" / "common.pt").is_file()


@both
def test_no_line_of_the_metrics_is_lost_or_duplicated(resumed: Path, adaptation: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [step for step, _ in metrics(resumed / adaptation, "train/loss")] == [1, 2, 3, 4]
    assert [step for step, _ in metrics(resumed / adaptation, "validation/accuracy")] == [0, 2, 4]
    events = EventAccumulator(str(resumed / adaptation / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_two_seeded_runs_are_equal_bit_for_bit(undisturbed: Path, runs: Path) -> None:
    assert train(runs / "again")[0][0] == 0
    assert differences(undisturbed / "full" / "checkpoints" / "final", runs / "again" / "checkpoints" / "final") == []
    assert rollouts(undisturbed / "full") == rollouts(runs / "again")


@pytest.mark.parametrize(
    ("adaptation", "layout"),
    [
        ("full", "parallel.tensor=2"),
        ("full", "optimizer.distributed=true"),
        ("lora", "parallel.tensor=2 optimizer.distributed=true"),
        ("full", "parallel.pipeline=2"),
        ("lora", "parallel.pipeline=2 optimizer.distributed=true"),
    ],
)
def test_in_another_layout_the_losses_are_equal(
    undisturbed: Path, longer: Path, tmp_path: Path, adaptation: str, layout: str
) -> None:
    """Steps 3 and 4 on two ranks, steps 5 and 6 on one again."""
    moved = tmp_path / "moved"
    shutil.copytree(undisturbed / adaptation, moved)
    shutil.rmtree(moved / "checkpoints" / "final")
    (moved / "DONE").unlink()
    words = ADAPTATIONS[adaptation]
    assert [status for status, _ in train(moved, *words, *layout.split(), ranks=2)] == [0, 0]
    recorded = load_config(moved / "config.yaml").parallel.sequence
    assert recorded == NemoCheckpoint(moved / "checkpoints" / "final").config.parallel.sequence
    assert recorded == str("tensor" in layout).lower()
    assert train(moved, *words, *SIX_STEPS)[0][0] == 0
    there, here = metrics(moved, "train/loss"), metrics(longer / adaptation, "train/loss")
    assert [step for step, _ in there] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in there] == pytest.approx([loss for _, loss in here], rel=3e-5)


def test_a_finished_run_is_reported_as_finished(
    undisturbed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = (undisturbed / "full" / "metrics.jsonl").read_bytes()
    assert main(["train", TINY, f"output={undisturbed / 'full'}", *SETTINGS]) == 0
    assert "is finished after 4 steps" in capsys.readouterr().out
    assert (undisturbed / "full" / "metrics.jsonl").read_bytes() == before


def test_only_adapters_are_saved_and_old_checkpoints_are_removed(undisturbed: Path) -> None:
    lora, full = (undisturbed / name / "checkpoints" for name in ("lora", "full"))
    assert json.loads((lora / "final" / "manifest.json").read_text())["weights"] == "adapters"
    size = {p: sum(f.stat().st_size for f in (p / "final" / "weights").glob("*.distcp")) for p in (lora, full)}
    assert size[lora] < size[full] / 3
    assert (lora / "latest").read_text() == "final\n"
    assert sorted(path.name for path in lora.iterdir()) == ["final", "latest", "step-000002"]


def test_another_base_other_rows_and_other_settings_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    shutil.copytree(undisturbed / "lora", output)
    (output / "DONE").unlink()
    from nemo_popsd.embedded.names import asset

    other = tmp_path / "other"
    shutil.copytree(asset("nemo_popsd:tiny_reasoner"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    words = (*ADAPTATIONS["lora"], "training.steps=5")
    status, printed = train(output, *words, f"student.source={other}")[0]
    assert status == 2
    assert f"got student.source='{other}' with digest" in printed
    assert "need the base that it was trained from: 'nemo_popsd:tiny_reasoner'" in printed
    status, printed = train(output, *words, "data.train.limit=7")[0]
    assert (status, "data.train.limit=7 (was 8)" in printed) == (2, True)
    rows = tmp_path / "rows.jsonl"
    text = asset("nemo_popsd:tiny_train").read_text().splitlines()[1:9]
    rows.write_text("\n".join(text) + "\n")
    status, printed = train(output, *words, f"data.train.path={rows}")[0]
    assert (status, "got training rows that differ" in printed) == (2, True)
    status, printed = train(output, *words, "optimizer.lr=0.5", "seed=3")[0]
    assert (status, "seed=3 (was 1234), optimizer.lr=0.5" in printed) == (2, True)


def test_damage_is_named_before_anything_is_loaded(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed / "full", output)
    (output / "DONE").unlink()
    shard = min((output / "checkpoints" / "final" / "weights").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    status, printed = train(output, "training.steps=5")[0]
    assert status == 2
    assert f"weights/{shard.name} was changed" in printed
    folder = output / "checkpoints"
    move = f"mv {folder / 'final'} {folder / 'final.damaged'}"
    assert (
        f"{move}; then the same command resumes after step 2 from {folder / 'step-000002'}, which is intact" in printed
    )
    (folder / "final").rename(folder / "final.damaged")
    status, printed = train(output, "training.steps=5")[0]
    assert status == 0
    assert "resuming after step 2" in printed
    assert (folder / "final.damaged").is_dir()
    for name in ("final", "step-000002", "step-000004"):
        (folder / name / "manifest.json").write_bytes(b"")
    status, printed = train(output, "training.steps=6")[0]
    assert status == 2
    assert f"move {folder} away to begin at step 1: no other checkpoint is intact" in printed


@pytest.mark.parametrize(
    ("where", "number", "saved"),
    [("decoding", signal.SIGTERM, 2), ("trained", signal.SIGUSR1, 3), ("decoding", signal.SIGINT, 2)],
    ids=["TERM while decoding", "USR1 while training", "Ctrl-C while decoding"],
)
def test_a_signal_to_one_rank_saves_and_stops_all(
    undisturbed: Path, tmp_path: Path, where: str, number: signal.Signals, saved: int
) -> None:
    """Rank 1 of two data-parallel ranks receives it in step 3. A step that decodes is dropped, one that trains ends."""
    output = tmp_path / "run"
    plan = {"rank": 1, "where": where, "step": 3, "signal": number}
    limits = ("rollout.max_response_tokens=60", "rollout.temperature=3.0", "training.checkpoint_every=0")
    ranks = train(output, *limits, ranks=2, plan=plan)
    assert [status for status, _ in ranks] == [SAVED_AND_STOPPED] * 2
    assert f"saved after step {saved}" in ranks[0][1]
    assert (output / "REQUEUE").read_text() == f"{saved}\n"
    assert not (output / "DONE").exists()
    assert [path.name for path in (output / "checkpoints").glob("step-*")] == [f"step-{saved:06d}"]
    assert ("step-000003/part-0000-of-0002.jsonl" in rollouts(output)) == (where == "trained")
    assert [status for status, _ in train(output, *limits, ranks=2)] == [0, 0]
    assert not (output / "REQUEUE").exists()
    assert (output / "DONE").read_text() == "4\n"
    assert [step for step, _ in metrics(output, "train/loss")] == [1, 2, 3, 4]


def test_saving_in_the_background_keeping_the_best_and_overwriting(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    background = ("training.async_save=true", "training.checkpoint_every=1")
    keep = ("training.keep_last=1", "training.keep_best=1", "training.best_metric=train/loss", "training.best_is=min")
    assert train(output, *background, *keep)[0][0] == 0
    assert metrics(output, "train/loss") == metrics(undisturbed / "full", "train/loss")
    losses = dict(metrics(output, "train/loss")[:3])
    kept = {f"step-{step:06d}" for step in (3, min(losses, key=lambda step: losses[step]))}
    assert {path.name for path in (output / "checkpoints").glob("step-*")} == kept
    assert differences(undisturbed / "full" / "checkpoints" / "final", output / "checkpoints" / "final") == []
    for name in ("checkpoints/my-model", "checkpoints/step-000003", "rollouts/step-000001", "tensorboard"):
        (output / name).mkdir(exist_ok=True)
        (output / name / "notes.txt").write_text("mine")
    status, printed = train(output, "overwrite=true", "training.steps=1", "training.validate_every=0")[0]
    assert status == 0
    for name in ("checkpoints/my-model", "checkpoints/step-000003", "rollouts/step-000001", "tensorboard"):
        assert (output / name / "notes.txt").read_text() == "mine"
    assert "beginning at step 1" in printed
    assert [step for step, _ in metrics(output, "train/loss")] == [1]
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == ["final", "latest", "my-model", "step-000003"]
    assert len(rollouts(output)) == 1
