"""A run from Python, in three lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "conf" / "tiny.yaml"


def overrides(output: Path) -> list[str]:
    return [
        f"output={output}",
        "optimizer.warmup_steps=0",
        "training.steps=2",
        "training.prompts_per_step=2",
        "training.checkpoint_every=1",
        "rollout.max_response_tokens=12",
        "data.train.limit=8",
        "data.validation.path=''",
        "observability.progress_bar=false",
    ]


def train(rank: int, world_size: int, output: Path) -> dict[str, Any]:
    from nemo_popsd.config.consistency import holds_a_run
    from nemo_popsd.errors import UserError
    from nemo_popsd.files.ownership import read_mark
    from nemo_popsd.model import PurifiedOPSDModel

    model = PurifiedOPSDModel.from_config(str(TINY), overrides(output))
    mark = read_mark(output)
    seen: dict[str, Any] = {"mark": mark is not None and mark.kind, "steps before": model.completed_steps}
    model.trainer.fit(model)
    seen |= {"steps": model.completed_steps, "has a run": holds_a_run(str(output))}
    try:
        PurifiedOPSDModel.from_config(TINY, overrides(output))
    except UserError as error:
        seen["again"] = str(error)
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_config_trains_in_a_directory_of_its_own(tmp_path: Path, ranks: int) -> None:
    output = tmp_path / "run"
    seen = run_ranks(train, ranks, output)
    assert all(facts == seen[0] for facts in seen)
    assert (seen[0]["mark"], seen[0]["steps before"], seen[0]["steps"], seen[0]["has a run"]) == (
        "training run",
        0,
        2,
        True,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["train/loss"] > 0 for line in lines)
    assert "steps: 2" in (output / "config.yaml").read_text()
    assert (output / "checkpoints" / "step-000001").is_dir()
    assert "which contains a run" in seen[0]["again"]
