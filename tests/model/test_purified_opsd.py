"""NeMo's contract, once with adapters and once without, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import load_dense, whole_logits

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
        "evaluation.samples_per_problem=1",
        "data.train.limit=8",
        "data.validation.limit=6",
        "observability.progress_bar=false",
        *more,
    ]


def live(rank: int, world_size: int, folder: Path, adaptations: tuple[str, ...]) -> dict[str, Any]:
    return {adaptation: live_once(folder, adaptation) for adaptation in adaptations}


def live_once(folder: Path, adaptation: str) -> dict[str, Any]:
    """One run, and what the public interface of the model reports about it."""
    from nemo.core.classes import ModelPT

    from nemo_popsd.config.loading import load_config, to_dict_config
    from nemo_popsd.model import PurifiedOPSDModel
    from nemo_popsd.model.trainer import build_trainer

    config = load_config(TINY, overrides(folder, adaptation))
    output = Path(config.output)
    trainer = build_trainer(config)
    model = PurifiedOPSDModel(to_dict_config(config), trainer)
    vocab_size = model.student.vocab_size

    def logits(of: Any) -> torch.Tensor:
        return whole_logits(of.student.gpt.eval(), IDS, vocab_size)

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
    trainer_of_two_steps = build_trainer(load_config(TINY, overrides(folder, adaptation, "training.steps=2")))
    resumed = PurifiedOPSDModel.restore_from(path, trainer=trainer_of_two_steps)
    trainer_of_two_steps.fit(resumed)
    seen["continued"] = resumed.completed_steps
    with resumed.student.base.model() as [base]:
        seen["base"] = whole_logits(base.eval(), IDS, vocab_size)
    train = DictConfig({"path": "nemo_popsd:tiny_train", "limit": 3, "columns": {"id": "id"}})
    model.setup_training_data(train)
    seen["train rows"] = len(model.training_data.dataset)
    columns = {"id": "id", "answer": "answer"}
    model.setup_validation_data(DictConfig({"path": "nemo_popsd:tiny_validation", "limit": 2, "columns": columns}))
    seen["validation rows"] = sum(len(batch) for batch in model._validation_dl)
    with torch.no_grad():
        next(parameter for parameter in model.student.gpt.parameters() if parameter.requires_grad).fill_(torch.inf)
    try:
        model.export_huggingface(output / "not finite")
    except UserError as error:
        seen["not finite"] = str(error), (output / "not finite").exists()
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
    assert seen["checkpoints"] == ["latest", "step-000002"]  # the last step's is `final`, written by the command
    lines = [json.loads(line) for line in (folder / adaptation / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]  # the last two are the restored run's, in the same directory
    validated = [line["step"] for line in lines if "validation/accuracy" in line]
    assert validated == [0, 2, 4, 6]
    assert seen["before"].problems == 4
    assert seen["before"].samples == 4


@both
@pytest.mark.parametrize("form", ["saved", "saved.nemo"])
def test_a_saved_model_is_restored(lives: dict[str, Any], adaptation: str, form: str) -> None:
    seen = lives[adaptation]
    logits, steps, model_class = seen[form]
    assert torch.equal(logits, seen["trained"])
    assert steps == 4
    assert model_class.__name__ == "PurifiedOPSDModel"


@both
def test_a_restored_model_keeps_its_base(lives: dict[str, Any], adaptation: str) -> None:
    assert lives[adaptation]["continued"] == 6
    assert torch.equal(lives[adaptation]["base"], lives[adaptation]["untrained"])


@both
def test_restored_configurations_can_be_overridden(lives: dict[str, Any], adaptation: str) -> None:
    seen = lives[adaptation]
    assert seen["config"].rollout.batch_rows == 256
    assert seen["config"].student.adaptation == adaptation
    assert seen["override"].rollout.batch_rows == seen["override file"].rollout.batch_rows == 3
    assert seen["override"].training.steps == 4


@both
def test_an_export_computes_the_same_in_transformers(lives: dict[str, Any], folder: Path, adaptation: str) -> None:
    from transformers import AutoTokenizer

    dense = load_dense(folder / adaptation / "huggingface")
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, lives[adaptation]["trained"], atol=2e-4, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(folder / adaptation / "huggingface").chat_template


@both
def test_weights_that_are_not_finite_are_not_exported(lives: dict[str, Any], adaptation: str) -> None:
    printed, written = lives[adaptation]["not finite"]
    assert "got weights that are NaN or Inf" in printed
    assert not written


@both
def test_data_is_set_up_from_plain_trees(lives: dict[str, Any], adaptation: str) -> None:
    assert lives[adaptation]["train rows"] == 3
    assert lives[adaptation]["validation rows"] == 2


def elsewhere(rank: int, world_size: int, folder: Path, tensor: int) -> dict[str, Any]:
    """The checkpoints of one rank, restored on two."""
    from nemo_popsd.config.loading import load_config
    from nemo_popsd.model import PurifiedOPSDModel
    from nemo_popsd.model.trainer import build_trainer

    seen: dict[str, Any] = {}
    for adaptation in ("full", "lora"):
        trainer = build_trainer(
            load_config(TINY, overrides(folder / "elsewhere", adaptation, f"parallel.tensor={tensor}"))
        )
        layout = OmegaConf.create({"parallel": {"tensor": tensor, "sequence": "false"}})
        path = str(folder / adaptation / "saved.nemo")
        model = PurifiedOPSDModel.restore_from(path, override_config_path=layout, trainer=trainer)
        seen[adaptation] = whole_logits(model.student.gpt.eval(), IDS, model.student.vocab_size)
        trainer.validate(model, verbose=False)
        seen[f"{adaptation} evaluated"] = model.last_evaluation
        model.save_to(str(folder / f"elsewhere-{tensor}" / adaptation))
    return seen


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_checkpoint_is_restored_in_another_layout(lives: dict[str, Any], folder: Path, tensor: int) -> None:
    ranks = run_ranks(elsewhere, 2, folder, tensor)
    for adaptation in ("full", "lora"):
        for seen in ranks:
            torch.testing.assert_close(seen[adaptation], lives[adaptation]["trained"], atol=1e-4, rtol=1e-5)
            assert seen[f"{adaptation} evaluated"] == ranks[0][f"{adaptation} evaluated"]
            assert seen[f"{adaptation} evaluated"].problems == 4


def test_the_embedded_model_is_listed_and_built_by_name() -> None:
    from nemo_popsd.model import PurifiedOPSDModel

    (listed,) = PurifiedOPSDModel.list_available_models()
    assert listed.pretrained_model_name == "nemo_popsd:tiny_reasoner"
    assert listed.class_ is PurifiedOPSDModel
    tree = PurifiedOPSDModel.from_pretrained(listed.pretrained_model_name, return_config=True)
    assert Path(tree.student.source).is_dir()
