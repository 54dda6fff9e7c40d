"""FP8 by kind of pass: which autocast Megatron enters, what its linears then compute, and which tokens they get."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import FP8_MULTIPLES
from tests.harness import LOCAL, TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.tiny_models import build_student, save_tiny_model

pytestmark = [on_transformer_engine, pytest.mark.slow]

CASES: dict[str, dict[str, Any]] = {
    "off": {},
    "frozen": {"frozen": True, "recipe": "blockwise"},
    "rollouts": {"rollouts": True, "recipe": "tensorwise"},
    "training": {"training": True, "recipe": "delayed"},
    "one layer": {"frozen": True, "recipe": "tensorwise", "num_layers_at_end_in_bf16": 1},
}
RECIPES = {
    "frozen": "Float8BlockScaling",
    "rollouts": "Float8CurrentScaling",
    "training": "DelayedScaling",
    "one layer": "Float8CurrentScaling",
}
PHASES = {"frozen": "frozen", "rollouts": "rollout", "training": "train", "one layer": "frozen"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", **sizes)


def _steps(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """One step of each case: the contexts entered by phase, and the metrics."""
    from nemo_popsd.observability.stopwatch import Stopwatch
    from tests.te.fp8 import Entries, recorded_autocast
    from tests.training.runs import row, settings, start

    phase, result = Stopwatch.phase, {}
    by_phase: dict[str, tuple[list[str], list[int]]] = {}

    def recording(entries: Entries) -> Any:
        @contextlib.contextmanager
        def recorded(watch: Stopwatch, name: str) -> Iterator[None]:
            recipes, rows = len(entries.recipes), len(entries.rows)
            with phase(watch, name):
                yield
            by_phase[name] = entries.recipes[recipes:], entries.rows[rows:]

        return recorded

    for name, fp8 in CASES.items():
        for adaptation in ("full", "lora"):
            config = settings(student={"precision": "bf16", "adaptation": adaptation}, fp8=fp8)
            run = start(folder, config)
            assert run.student.gpt.config.fp8 is None
            by_phase = {}
            with recorded_autocast() as entries:
                Stopwatch.phase = recording(entries)  # type: ignore[method-assign]
                metrics = run.on_policy_step()(1, [row(index) for index in range(4)], run.optimizer, run.update)
            Stopwatch.phase = phase  # type: ignore[method-assign]
            assert run.student.gpt.config.fp8 is None
            result[name, adaptation] = {
                "phases": by_phase,
                "in phases": sum(len(recipes) for recipes, _ in by_phase.values()),
                "entries": len(entries.recipes),
                "format": entries.recipe and entries.recipe.fp8_format.name,
                "group": entries.group and entries.group.size(),
                "loss": metrics.loss,
            }
    return result


@pytest.fixture(scope="module")
def steps(model: Path) -> dict[tuple[str, str], Any]:
    return run_ranks(_steps, 1, model, layers=TRANSFORMER_ENGINE)[0]


@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_megatron_enters_the_recipe_in_these_passes_alone(
    steps: dict[tuple[str, str], Any], name: str, adaptation: str
) -> None:
    """The self-check, outside of all phases, is in bf16 too: else the loss of equal weights would not be 0."""
    seen = steps[name, adaptation]
    assert seen["entries"] == seen["in phases"]
    for phase in ("rollout", "frozen", "train"):
        recipes, rows = seen["phases"][phase]
        if PHASES.get(name) != phase:
            assert recipes == rows == [], phase
            continue
        assert set(recipes) == {RECIPES[name]}
        assert {count % FP8_MULTIPLES[CASES[name]["recipe"]] for count in rows} == {0}
        forwards = len(rows) / 4  # linears of a layer
        per_entry = {"training": 2, "frozen": 1, "rollouts": 1, "one layer": 1}[name]
        assert forwards == per_entry * len(recipes), "each layer, or under delayed scaling the model, is one entry"
    assert (seen["format"], seen["group"]) == ((None, None) if name == "off" else ("HYBRID", 1))


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_what_fp8_computes_reaches_the_loss(steps: dict[tuple[str, str], Any], adaptation: str) -> None:
    losses = {name: steps[name, adaptation]["loss"] for name in CASES}
    assert len(set(losses.values())) == len(CASES)
    assert all(abs(loss / losses["off"] - 1) < 0.5 for name, loss in losses.items() if name != "rollouts")


def _sharded(rank: int, world_size: int, folder: Path) -> tuple[list[int], int, float]:
    """Tokens of the products on this rank, ranks that share scales, and the loss, with sequences split by two."""
    from tests.te.fp8 import recorded_autocast
    from tests.training.runs import row, settings, start

    config = settings(
        student={"precision": "bf16"},
        parallel={"tensor": world_size, "sequence": "true"},
        training={"packing": True},
        fp8={"frozen": True, "training": True, "recipe": "tensorwise"},
    )
    run = start(folder, config)
    with recorded_autocast() as entries:
        metrics = run.on_policy_step()(1, [row(index) for index in range(2)], run.optimizer, run.update)
    return entries.rows, entries.group.size(), metrics.loss


def test_each_shard_of_a_sequence_has_the_tokens_that_fp8_needs(model: Path) -> None:
    """A product has the gathered tokens of both ranks: a multiple of 16 on each."""
    first, second = run_ranks(_sharded, 2, model, layers=TRANSFORMER_ENGINE)
    assert first == second
    rows, ranks, loss = first
    assert ranks == 2
    assert rows
    assert {count % (2 * FP8_MULTIPLES["tensorwise"]) for count in rows} == {0}
    assert 0 < loss < 1


def _states(rank: int, world_size: int, folder: Path, recipe: str) -> dict[str, torch.Tensor]:
    """Frozen states in fp32 and in FP8: by Transformer Engine's switch, or by the emulation on local layers."""
    from nemo_popsd.diagnosis.fp8 import layer_linears
    from nemo_popsd.diagnosis.fp8_rounding import emulated
    from nemo_popsd.megatron.config import FP8Config
    from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
    from nemo_popsd.megatron.fp8 import in_fp8
    from nemo_popsd.megatron.microbatches import ContextSequence
    from nemo_popsd.megatron.spec import on_transformer_engine as has_fp8

    student = build_student(folder)
    sequences = [ContextSequence([7, 8, 9 + index], list(range(30, 45))) for index in range(3)]

    def states() -> torch.Tensor:
        batches = student_batches(student.chunks, sequences, 1000, packed=False)
        return torch.cat(frozen_hidden_states(student.chunks, batches)).float()

    found = {"exact": states()}
    if has_fp8("auto"):
        from tests.te.fp8 import recorded_autocast

        student.gpt.config.fp8_recipe = recipe
        kept = [module for module in student.gpt.modules() if hasattr(module, "is_first_microbatch")]
        assert len(kept) == 8
        assert not any(module.is_first_microbatch for module in kept)
        with recorded_autocast(), in_fp8(student.chunks, FP8Config(frozen=True, recipe=recipe), "frozen"):
            assert all(module.is_first_microbatch for module in kept), "the weights are quantised again"
            found["fp8"] = states()
    else:
        with emulated(layer_linears(student.chunks), recipe):
            found["fp8"] = states()
    return found


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_the_emulation_computes_what_the_switch_does(model: Path, recipe: str) -> None:
    """In fp32, where nothing else rounds; the remaining differences are values midway between two e4m3 numbers."""
    [switched] = run_ranks(_states, 1, model, recipe, layers=TRANSFORMER_ENGINE)
    [emulated] = run_ranks(_states, 1, model, recipe, layers=LOCAL)
    error = (switched["fp8"] - switched["exact"]).norm()
    assert error / switched["exact"].norm() > 0.01
    assert (switched["fp8"] - emulated["fp8"]).norm() < 0.05 * error


def _refusals(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.megatron import fp8
    from nemo_popsd.megatron.config import FP8Config, StudentConfig
    from nemo_popsd.parallel.config import ParallelConfig

    said: dict[str, str] = {}

    def refused(name: str, kind: str, tensor: int = 1, **settings: Any) -> None:
        provider = HuggingFaceModel(folder / kind).provider()
        try:
            fp8.refuse_fp8(provider, StudentConfig(), ParallelConfig(tensor=tensor), FP8Config(**settings))
            said[name] = ""
        except UserError as error:
            said[name] = str(error)

    refused("off", "qwen3_moe")
    refused("blackwell", "wide", frozen=True, recipe="mxfp8")
    refused("experts", "qwen3_moe", training=True, recipe="tensorwise")
    refused("narrow", "wide", 2, frozen=True, recipe="blockwise")
    refused("tensorwise", "wide", 2, frozen=True, recipe="tensorwise")
    refused("ends", "wide", frozen=True, recipe="tensorwise", num_layers_at_end_in_bf16=3)
    fp8.spec.chosen_layers = lambda setting: "local"
    refused("local", "wide", rollouts=True)
    return said


def test_what_cannot_be_in_fp8_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "qwen3_moe", "qwen3_moe")
    (tmp_path / "wide").symlink_to(model)
    [said] = run_ranks(_refusals, 1, tmp_path, layers=TRANSFORMER_ENGINE)
    assert said["off"] == said["tensorwise"] == ""
    for name, message in {
        "blackwell": "fp8.recipe=mxfp8; need Device compute capability 10.0",
        "experts": "fp8.training=true with a mixture of 4 experts",
        "narrow": "attention of width 64 on each of 2 tensor-parallel ranks; need a multiple of 128",
        "ends": "need at most 2, the layers of a stage",
        "local": "fp8.rollouts=true with local layers",
    }.items():
        assert message in said[name], said[name]
