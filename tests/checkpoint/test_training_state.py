"""Optimizer state that another layout reads is bit-equal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from nemo_popsd.checkpoint.contents import STATE
from nemo_popsd.checkpoint.training_state import StagedState, _owners, load_training_state
from nemo_popsd.distillation.config import WeightsConfig
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import LoRAConfig, OptimizerConfig
from nemo_popsd.megatron.moving import MovingCopy
from nemo_popsd.megatron.optimizer import StudentOptimizer
from nemo_popsd.megatron.optimizer_state import parameter_states, set_step_count, step_count
from tests.harness import LOCAL, TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.tiny_models import build_student, save_tiny_model

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "bf16": {"precision": "bf16"},
    "lora": {"adaptation": "lora", "lora": LoRAConfig(rank=4)},
    "tied": {},
}
LAYOUTS = {"1": (1, 1, False), "tp2": (2, 2, False), "dp2": (2, 1, False), "dp2 split": (2, 1, True)}
LAYOUTS["tp2 split"] = (2, 2, True)


EXPERTS = ("experts",)
"""A mixture of experts that is divided over four ranks."""
PARTS = {"sequence": "true", "expert": 2, "expert_tensor": 2}


def _optimizer(source: Path, name: str, tensor: int, split: bool) -> tuple[Any, StudentOptimizer]:
    folder, case = source / (name if name in ("tied", *EXPERTS) else "plain"), CASES.get(name, {})
    student = build_student(folder, tensor=tensor, parallel=PARTS if name in EXPERTS and tensor > 1 else {}, **case)
    settings = OptimizerConfig(distributed=str(split).lower())
    bf16 = case.get("precision") == "bf16"
    return student, StudentOptimizer(student.wrap(settings), settings, steps=5, bf16=bf16)


def _pieces(folder: Path) -> dict[str, torch.Tensor]:
    pieces: dict[str, torch.Tensor] = {}
    for file in sorted((folder / STATE).glob("rank-*.safetensors")):
        pieces |= load_file(file)
    return pieces


def write_state(student: Any, optimizer: StudentOptimizer, folder: Path, copies: Any = None) -> None:
    """Writes the optimizer's state to `folder`, as a checkpoint does. Collective over all ranks."""
    import torch.distributed as dist

    (folder / STATE).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    staged = StagedState(student.chunks, optimizer.megatron, folder, copies=copies or {}, random_state={})
    staged.write()
    if dist.get_rank() == 0:
        staged.finish()
    dist.barrier()


def _fill(rank: int, world_size: int, source: Path, folder: Path, names: Iterable[str] = tuple(CASES)) -> None:
    """On one rank, writes optimizer state with different random values in every piece."""
    for name in names:
        student, optimizer = _optimizer(source, name, 1, False)
        generator = torch.Generator().manual_seed(3)
        for state in parameter_states(optimizer.megatron):
            for value in state.values.values():
                value.copy_(torch.randn(value.shape, generator=generator))
                value[::7] = -0.0
        vocabulary = student.gpt.embedding.word_embeddings.weight
        for state in parameter_states(optimizer.megatron):  # the state of the vocabulary's padding is 0
            if state.parameter.shape[0] == vocabulary.shape[0] and state.parameter.dim() == 2:
                for value in state.values.values():
                    value.view(state.parameter.shape)[203:] = 0
        set_step_count(optimizer.megatron, 41)
        moving = MovingCopy(student.chunks, WeightsConfig(weights="ema"))
        for parameter, value in moving.values.items():
            value.copy_(torch.randn(value.shape, generator=generator))
            if parameter.shape[0] == vocabulary.shape[0] and parameter.dim() == 2:
                value[203:] = 0
        write_state(student, optimizer, folder / name / "1", {"teacher": moving.values})


def _stage_twice(rank: int, world_size: int, source: Path, folder: Path, split: bool) -> dict[str, Any]:
    """Whether staged tensors are in the optimizer's memory, without and with a request to copy; bytes of this rank."""
    student, optimizer = _optimizer(source, "full", 1, split)
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for copy in (False, True):
        staged = StagedState(student.chunks, optimizer.megatron, folder, random_state={}, copy=copy)
        kept = {v.untyped_storage().data_ptr() for s in parameter_states(optimizer.megatron) for v in s.values.values()}
        found[f"own memory, copy={copy}"] = any(
            t.untyped_storage().data_ptr() in kept for t in staged._tensors.values()
        )
        found["bytes"] = sum(t.numel() * t.element_size() for t in staged._tensors.values())
    return found


@pytest.mark.parametrize("split", [False, True])
def test_state_is_copied_only_where_training_would_change_it_and_divided_evenly(
    source: Path, tmp_path: Path, split: bool
) -> None:
    found = run_ranks(_stage_twice, 2, source, tmp_path, split)
    for rank in found:
        assert rank["own memory, copy=False"] == (not split), "a sharded state is gathered into tensors of its own"
        assert not rank["own memory, copy=True"]
    sizes = [rank["bytes"] for rank in found]
    assert min(sizes) > 0.8 * max(sizes)


def test_the_largest_parameters_are_divided_first() -> None:
    group, experts = (mock.Mock(**{"size.return_value": size}) for size in (2, 1))
    sizes = [(1, group), (4, group), (9, experts), (3, group), (2, group)]
    assert _owners(sizes) == [0, 0, 0, 1, 1]


def _load_and_write(
    rank: int, world_size: int, source: Path, folder: Path, before: str, after: str, names: Iterable[str] = tuple(CASES)
) -> None:
    _, tensor, split = LAYOUTS[after]
    for name in names:
        student, optimizer = _optimizer(source, name, tensor, split)
        copies = {"teacher": MovingCopy(student.chunks, WeightsConfig(weights="ema")).values}
        assert load_training_state(folder / name / before, student.chunks, optimizer.megatron, copies) == 41
        assert step_count(optimizer.megatron) == 41
        write_state(student, optimizer, folder / name / after, copies)
        if after == "1 again" and "lora" in names:
            with pytest.raises(UserError, match="an unreadable training_state"):
                load_training_state(
                    folder / "lora" / before, build_student(source / "plain").chunks, optimizer.megatron
                )


LAYOUTS["1 again"] = (1, 1, False)
LAYOUTS["tp2 on transformer engine"] = LAYOUTS["tp2"]
LAYOUTS["dp2 split on transformer engine"] = LAYOUTS["dp2 split"]


@pytest.mark.parametrize(
    ("between", "layers"),
    [
        pytest.param("tp2", LOCAL, marks=pytest.mark.slow),
        pytest.param("dp2", LOCAL, marks=pytest.mark.slow),
        ("dp2 split", LOCAL),
        pytest.param("tp2 split", LOCAL, marks=pytest.mark.slow),
        # Their norms are parameters of the linears that follow.
        pytest.param("tp2 on transformer engine", TRANSFORMER_ENGINE, marks=on_transformer_engine),
        pytest.param("dp2 split on transformer engine", TRANSFORMER_ENGINE, marks=on_transformer_engine),
    ],
)
def test_state_that_another_layout_wrote_is_bit_equal(source: Path, filled: Path, between: str, layers: str) -> None:
    world, _, _ = LAYOUTS[between]
    run_ranks(_load_and_write, world, source, filled, "1", between, layers=layers)
    for name in CASES:
        if "dp2" in between or "split" in between:  # both ranks wrote different pieces
            files = [load_file(f) for f in sorted((filled / name / between / STATE).glob("rank-*"))]
            assert len(files) == 2
    run_ranks(_load_and_write, 1, source, filled, between, "1 again")
    _compare(filled, CASES)


@pytest.mark.slow
def test_state_of_experts_in_parts_is_bit_equal(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "experts", "qwen3_moe")
    state = tmp_path / "state"
    run_ranks(_fill, 1, tmp_path, state, EXPERTS)
    run_ranks(_load_and_write, 4, tmp_path, state, "1", "tp2 split", EXPERTS)
    run_ranks(_load_and_write, 1, tmp_path, state, "tp2 split", "1 again", EXPERTS)
    _compare(state, EXPERTS)


def _compare(filled: Path, names: Iterable[str]) -> None:
    for name in names:
        first, last = _pieces(filled / name / "1"), _pieces(filled / name / "1 again")
        assert first.keys() == last.keys()
        assert len(first) > 10
        assert any("teacher" in key for key in first)
        for key, value in first.items():
            assert torch.equal(value.view(torch.int32), last[key].view(torch.int32)), (name, key)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "plain", "qwen3")
    save_tiny_model(folder / "tied", "qwen3_tied")
    return folder


@pytest.fixture(scope="module")
def filled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    run_ranks(_fill, 1, source, folder)
    return folder
