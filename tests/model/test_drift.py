"""A run that drifts keeps an earlier checkpoint, stops with one line, and continues if configured to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.runs import metrics, train

pytestmark = pytest.mark.slow

SENSITIVE = (
    "data.validation.path=",
    "diagnosis.in_training=false",
    "training.steps=12",
    "training.checkpoint_every=1",
    "training.keep_last=1",
    "optimizer.lr=2e-3",
    "distillation.target.family=opsd",
    "rollout.max_response_tokens=24",
    "guard.drift.baseline_steps=3",
    "guard.drift.slack=0",
    "guard.drift.threshold=1",
    *(
        f"guard.drift.{name}=off"
        for name in ("response_tokens", "marker_rate", "repetition", "cut_share", "forward_kl")
    ),
)


def test_an_alarm_keeps_a_checkpoint_ends_the_run_and_is_not_repeated(tmp_path: Path) -> None:
    stopping = [*SENSITIVE, "guard.drift.student_entropy=stop"]
    [(status, printed)] = train(tmp_path, *stopping)
    assert status == 2
    [(step, onset)] = metrics(tmp_path, "guard/student_entropy")
    before = int(abs(onset))
    assert 3 <= before < step < 12
    verb = "rose" if onset > 0 else "fell"
    words = " ".join(printed.split())
    assert f"step {step}: got the entropy of the student (train/student_entropy) {verb} from" in words
    assert "guard.drift.student_entropy=keep" in words
    assert [done for done, _ in metrics(tmp_path, "train/loss")] == list(range(1, step + 1)), "the step is logged"
    assert checkpoints(tmp_path) == sorted({before, step - 1}), "and nothing is saved after it"

    [(status, printed)] = train(tmp_path, *SENSITIVE, "guard.drift.student_entropy=keep")
    assert status == 0, printed
    assert metrics(tmp_path, "guard/student_entropy") == [(step, onset)], "repeated with the step, and never again"
    assert checkpoints(tmp_path) == [before, 11]


def checkpoints(output: Path) -> list[int]:
    """Steps of the numbered checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
