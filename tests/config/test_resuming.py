from __future__ import annotations

from pathlib import Path

import pytest

from nemo_popsd.config.keys import known_keys
from nemo_popsd.config.resuming import DONE, FREE, finished_steps, refuse_another_run, with_decisions
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.parallel.config import ParallelConfig


def test_every_free_setting_exists() -> None:
    assert set(FREE) <= set(known_keys())


def test_free_settings_may_change() -> None:
    new = PopsdConfig(name="other", overwrite=True)
    new.training.steps = new.training.checkpoint_every = 7
    new.parallel.tensor, new.optimizer.distributed = 2, "true"
    new.observability.wandb.project, new.evaluation.problems = "p", 3
    refuse_another_run(PopsdConfig(), new)


def test_other_changes_are_named() -> None:
    new = PopsdConfig(seed=5)
    new.optimizer.lr, new.student.lora.rank, new.data.train.limit = 1.0, 8, 3
    with pytest.raises(UserError) as refused:
        refuse_another_run(PopsdConfig(), new)
    for words in ("seed=5 (was 1234)", "optimizer.lr=1.0", "student.lora.rank=8 (was 64)", "data.train.limit=3"):
        assert words in str(refused.value)
    assert "data.train.path" not in str(refused.value)


def test_the_decision_on_sequences_is_recorded_and_kept() -> None:
    run = PopsdConfig(parallel=ParallelConfig(tensor=2))
    assert with_decisions(run, None).parallel.sequence == "true"
    assert with_decisions(PopsdConfig(), None).parallel.sequence == "false"
    assert run.parallel.sequence == "auto"
    older = PopsdConfig(parallel=ParallelConfig(tensor=2, sequence="false"))
    assert with_decisions(run, older).parallel.sequence == "false"
    assert with_decisions(older, with_decisions(run, None)) == older
    wider = PopsdConfig(parallel=ParallelConfig(tensor=4))
    assert with_decisions(wider, older).parallel.sequence == "true"


def test_finished(tmp_path: Path) -> None:
    assert finished_steps(str(tmp_path)) is None
    (tmp_path / DONE).write_text("12\n")
    assert finished_steps(str(tmp_path)) == 12
