"""Evaluation in the processes of the model: in several layouts, interrupted and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.embedded.names import asset
from nemo_popsd.evaluation.records import EvaluationDirectory
from tests.harness import run_ranks

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "conf" / "tiny.yaml"


def overrides(output: Path, tensor: int = 1, samples: int = 2) -> list[str]:
    return [
        f"output={output}",
        f"parallel.tensor={tensor}",
        "evaluation.problems=5",
        f"evaluation.samples_per_problem={samples}",
        "evaluation.max_response_tokens=24",
        "rollout.batch_rows=2",
        "data.validation.limit=6",
        "observability.progress_bar=false",
        "training.prompts_per_step=2",
    ]


def evaluate(rank: int, world_size: int, output: Path, tensor: int, calls: int) -> dict[str, Any]:
    """Evaluates `calls` times; if more than once, the first is interrupted in the second call of the engine."""
    from nemo_popsd.config.loading import load_config, to_dict_config
    from nemo_popsd.data.config import SourceConfig
    from nemo_popsd.evaluation.run import conclude_all, prepare_sets
    from nemo_popsd.model import PurifiedOPSDModel
    from nemo_popsd.model.evaluation import generate_missing

    config = load_config(TINY, overrides(output, tensor))
    without_rows = load_config(TINY, overrides(output, tensor))
    without_rows.data.train, without_rows.data.validation = SourceConfig(), SourceConfig()
    model = PurifiedOPSDModel(to_dict_config(without_rows))
    sets = prepare_sets(config.evaluation, config.data, model.tokenizer, model="m", output=output)
    seen: dict[str, Any] = {"requests": []}
    generate = model.engine.generate

    def counted(requests: Any, sampling: Any) -> Any:
        seen["requests"].append(len(requests))
        if calls > 1 and len(seen["requests"]) == 2:
            raise KeyboardInterrupt
        return generate(requests, sampling)

    model.engine.generate = counted  # type: ignore[method-assign]
    for _ in range(calls):
        try:
            generate_missing(model.sampler, sets, model="m", digest="f")
        except KeyboardInterrupt:
            seen["kept"] = sum(len(path.read_text().splitlines()) for path in sets[0].directory.path.glob("samples-*"))
            import torch.distributed as dist

            dist.barrier()
    if rank == 0:
        seen["table"] = conclude_all(sets, config.evaluation, model="m")
    return seen


def samples(output: Path) -> dict[Any, Any]:
    return EvaluationDirectory(output / "evaluation" / "m" / "validation").samples()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("single")
    (seen,) = run_ranks(evaluate, 1, output, 1, 1)
    assert seen["requests"] == [2] * 5
    return output


@pytest.mark.parametrize("tensor", [1, 2], ids=["DP2", "TP2"])
def test_every_layout_generates_the_same_samples_and_none_twice_after_an_interruption(
    single: Path, tmp_path: Path, tensor: int
) -> None:
    first, second = run_ranks(evaluate, 2, tmp_path, tensor, 2)
    # Two of ten samples per call; tensor-parallel ranks generate the same ones, data-parallel ranks different ones.
    assert first["kept"] in (2, 4)
    generated = sum(first["requests"]) + (sum(second["requests"]) if tensor == 1 else 0)
    interrupted = 2 * (2 if tensor == 1 else 1)
    assert generated - interrupted == 10
    assert samples(tmp_path) == samples(single)
    directory = tmp_path / "evaluation" / "m" / "validation"
    files = sorted(path.name for path in directory.glob("samples-*"))
    assert files == ["samples-00000.jsonl", "samples-00001.jsonl"][: 3 - tensor]
    concluded = [
        json.loads((output / "evaluation/m/validation/summary.json").read_text()) for output in (single, tmp_path)
    ]
    assert concluded[0] == concluded[1]
    assert "accuracy (avg@2)" in first["table"]


def evaluate_other_weights(rank: int, world_size: int, output: Path) -> str:
    """The same directory for the samples of two models."""
    from nemo_popsd.config.loading import load_config, to_dict_config
    from nemo_popsd.errors import UserError
    from nemo_popsd.evaluation.run import prepare_sets
    from nemo_popsd.model import PurifiedOPSDModel
    from nemo_popsd.model.evaluation import generate_missing

    config = load_config(TINY, overrides(output))
    model = PurifiedOPSDModel(to_dict_config(config))
    sets = prepare_sets(config.evaluation, config.data, model.tokenizer, model="m", output=output)
    generate_missing(model.sampler, sets, model="m", digest="f")
    try:
        generate_missing(model.sampler, sets, model="m", digest="other")
    except UserError as error:
        return str(error)
    return ""


def test_samples_of_other_weights_are_refused_on_every_rank(tmp_path: Path) -> None:
    printed = run_ranks(evaluate_other_weights, 2, tmp_path)
    assert printed[0] == printed[1]
    assert "weights_digest" in printed[0]


def validate(rank: int, world_size: int, output: Path, tensor: int) -> Any:
    from nemo_popsd.config.loading import load_config, to_dict_config
    from nemo_popsd.model import PurifiedOPSDModel
    from nemo_popsd.model.trainer import build_trainer

    config = load_config(TINY, overrides(output, tensor))
    trainer = build_trainer(config)
    model = PurifiedOPSDModel(to_dict_config(config), trainer)
    trainer.validate(model, verbose=False)
    return model.last_evaluation


@pytest.mark.parametrize("tensor", [1, 2], ids=["DP2", "TP2"])
def test_validation_is_equal_in_every_layout_and_writes_its_samples(single: Path, tmp_path: Path, tensor: int) -> None:
    summaries = run_ranks(validate, 2, tmp_path, tensor)
    assert summaries[0] == summaries[1]
    directory = EvaluationDirectory(tmp_path / "validation" / "step-000000")
    assert directory.samples() == samples(single)
    rows = asset("nemo_popsd:tiny_validation").read_text(encoding="utf-8").splitlines()[:5]
    ids = [json.loads(row)["id"] for row in rows]
    assert [problem.id for problem in directory.problems()] == ids
    summary = directory.summary()
    assert summary["accuracy"] == summaries[0].accuracy
    assert summary["model"] == "step 0"
    order = [(score.problem, score.sample) for score in directory.scores()]
    assert order == [(problem, sample) for problem in ids for sample in range(2)]
