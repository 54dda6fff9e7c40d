"""NeMo's contract, lived through once with adapters and once without, on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tests.harness import run_ranks
from tests.tiny_models import whole_logits

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "conf" / "tiny.yaml"
IDS = torch.tensor([[5, 200, 31, 7, 90, 12, 12, 64]])


def overrides(folder: Path, adaptation: str, *more: str) -> list[str]:
    return [
        f"output={folder / adaptation}",
        f"student.adaptation={adaptation}",
        "student.lora.rank=4",
        "optimizer.warmup_steps=0",
        "training.steps=4",
        "training.prompts_per_step=2",
        "training.checkpoint_every=2",
        "training.validate_every=2",
        "rollout.max_response_tokens=12",
        "evaluation.max_response_tokens=12",
        "evaluation.problems=4",
        "data.train.limit=8",
        "data.validation.limit=6",
        "observability.progress_bar=false",
        *more,
    ]


def live(rank: int, world_size: int, folder: Path, adaptations: tuple[str, ...]) -> dict[str, Any]:
    return {adaptation: live_once(folder, adaptation) for adaptation in adaptations}


def live_once(folder: Path, adaptation: str) -> dict[str, Any]:
    """One run; what can be seen of it from outside."""
    from nemo.core.classes import ModelPT

    from nemo_popsd.config.loading import load_config, to_dict_config
    from nemo_popsd.model import PurifiedOPSDModel
    from nemo_popsd.model.entry import build_trainer

    config = load_config(TINY, overrides(folder, adaptation))
    output = Path(config.output)
    trainer = build_trainer(config)
    model = PurifiedOPSDModel(to_dict_config(config), trainer)
    vocab_size = model.student.vocab_size

    def logits(of: Any) -> torch.Tensor:
        return whole_logits(of.gpt.eval(), IDS, vocab_size)

    seen: dict[str, Any] = {"is ModelPT": isinstance(model, ModelPT), "untrained": logits(model)}
    trainer.validate(model, verbose=False)
    seen["before"] = model.last_evaluation
    trainer.fit(model)
    seen["steps"], seen["trained"] = model.completed_steps, logits(model)
    seen["checkpoints"] = sorted(path.name for path in (output / "checkpoints").iterdir())
    model.save_to(str(output / "saved"))
    model.save_to(str(output / "saved.nemo"))
    model.export_huggingface(output / "huggingface")
    for name in ("saved", "saved.nemo"):
        restored = PurifiedOPSDModel.restore_from(str(output / name))
        seen[name] = (logits(restored), restored.completed_steps, type(restored))
    path = str(output / "saved.nemo")
    seen["config"] = PurifiedOPSDModel.restore_from(path, return_config=True)
    changed = OmegaConf.create({"rollout": {"batch_rows": 3}})
    seen["override"] = PurifiedOPSDModel.restore_from(path, override_config_path=changed, return_config=True)
    changes = output / "changes.yaml"
    OmegaConf.save(changed, changes)
    seen["override file"] = PurifiedOPSDModel.restore_from(path, override_config_path=str(changes), return_config=True)
    goes_on = build_trainer(load_config(TINY, overrides(folder, adaptation, "training.steps=2")))
    again = PurifiedOPSDModel.restore_from(path, trainer=goes_on)
    goes_on.fit(again)
    seen["goes on"] = again.completed_steps
    with again.student.base.model() as base:
        seen["base"] = whole_logits(base.eval(), IDS, vocab_size)
    train = DictConfig({"path": "nemo_popsd:tiny_train", "limit": 3, "columns": {"id": "id"}})
    model.setup_training_data(train)
    seen["train rows"] = len(model._train_dl.dataset)
    columns = {"id": "id", "answer": "answer"}
    model.setup_validation_data(DictConfig({"path": "nemo_popsd:tiny_validation", "limit": 2, "columns": columns}))
    seen["validation rows"] = sum(len(batch) for batch in model._validation_dl)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lives(folder: Path) -> dict[str, Any]:
    return run_ranks(live, 1, folder, ("full", "lora"))[0]


both = pytest.mark.parametrize("adaptation", ["full", "lora"])


@both
def test_fit_trains_validates_and_saves_on_time(lives: dict[str, Any], folder: Path, adaptation: str) -> None:
    seen = lives[adaptation]
    assert seen["is ModelPT"]
    assert seen["steps"] == 4
    assert not torch.equal(seen["trained"], seen["untrained"])
    assert seen["checkpoints"] == ["latest", "step-000002"]  # the command writes `final`
