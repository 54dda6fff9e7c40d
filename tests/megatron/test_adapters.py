"""LoRA: the base bit for bit when off and at the start, the same initial values in every layout, gradients, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.megatron.config import LoRAConfig, StudentConfig
from tests.harness import run_ranks
from tests.megatron import cases
from tests.tiny_models import build_student, load_dense, save_tiny_model, whole_logits

LORA = LoRAConfig(rank=4, alpha=6.0)
SCALE = 1.5
IDS = torch.randint(0, cases.VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))
ROWS = range(len(cases.LENGTHS))
KINDS = ("qwen3", "qwen2")  # without and with biases


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: save_tiny_model(folder / kind, kind) for kind in KINDS}


def _whole(parameter: Any, group: Any) -> Tensor:
    parts = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(parts, parameter.detach().contiguous(), group=group)
    return torch.cat(parts, dim=parameter.partition_dim)


def _expected_adapter_gradients(gpt: Any, weight_gradients: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """From dW of W + s·B·A: dB = s·dW·Aᵀ and dA = s·Bᵀ·dW, as shards of this rank."""
    result = {}
    for name, module in gpt.named_modules():
        if not name.endswith(".adapter"):
            continue
        base = name.removesuffix(".adapter")
        dw = SCALE * weight_gradients[f"{base}.weight"]
        a, b = module.linear_in.weight, module.linear_out.weight
        rank, size = group.rank(), group.size()
        if module.input_is_parallel:  # W is split along its inputs, as A is; B along the outputs
            da = _whole(b, group).T @ dw
            db = dw @ a.detach().T
            dist.all_reduce(db, group=group)
            db = db.chunk(size)[rank]
        else:  # W is split along its outputs, as B is; A along its rows
            db = dw @ _whole(a, group).T
            da = b.detach().T @ dw
            dist.all_reduce(da, group=group)
            da = da.chunk(size)[rank]
        result |= {f"{name}.linear_in.weight": da, f"{name}.linear_out.weight": db}
    return result


def _examine(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, Any]:
    from nemo_popsd.megatron.adapters import merged_state
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import on_any_rank
    from tests.digests import base_digest

    plain = build_student(source, tensor=world_size).gpt
    settings: dict[str, Any] = {"adaptation": "lora", "lora": LORA}
    student = build_student(source, tensor=world_size, **settings)
    group, gpt = student.tp_group, student.gpt
    result: dict[str, Any] = {"plain": whole_logits(plain, IDS, cases.VOCABULARY)}
    result["initial"] = whole_logits(gpt, IDS, cases.VOCABULARY)
    result["initial_weights"] = {
        name: _whole(p, group) for name, p in gpt.named_parameters() if "adapter.linear_in" in name
    }
    result["trained"] = sorted(name for name, p in gpt.named_parameters() if p.requires_grad)
    result["count"] = (
        sum(p.numel() for p in student.gpt.parameters() if p.requires_grad),
        sum(p.numel() for p in gpt.parameters() if p.requires_grad),
    )
    result["base_digest"] = (base_digest(plain), base_digest(gpt))

    torch.manual_seed(100 + rank)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if "adapter.linear_out" in name:
                p.normal_(std=0.1)
    result["adapted"] = whole_logits(gpt, IDS, cases.VOCABULARY)
    with student.adapters.off():
        result["off"] = whole_logits(gpt, IDS, cases.VOCABULARY)
    with student.base.model() as [base]:
        result["base"] = whole_logits(base, IDS, cases.VOCABULARY)
    try:
        with student.adapters.off():
            raise KeyError
    except KeyError:
        result["on again"] = whole_logits(gpt, IDS, cases.VOCABULARY)

    [merged] = build_chunks(
        HuggingFaceModel(source).provider(),
        StudentConfig(precision="fp32"),
        ParallelConfig(tensor=world_size, sequence="false"),
    )
    merged.load_state_dict(merged_state(gpt, LORA))
    result["merged"] = whole_logits(merged, IDS, cases.VOCABULARY)
    HuggingFaceModel(source).export(gpt, folder / "merged")
    HuggingFaceModel(source).export(gpt, folder / "base", merge_adapters=False)

    if rank == 0:
        result["loss"] = cases.dense_gradients(folder / "merged", folder / "gradients")
    on_any_rank(False)  # a barrier
    weight_gradients = cases.expected_gradients(folder / "gradients", world_size)
    expected = _expected_adapter_gradients(gpt, weight_gradients, group)
    actual, losses = cases.accumulated_gradients(student, ROWS, 30)
    result["gradients"] = cases.deviations(actual, expected)
    result["losses"] = losses
    again = build_student(source, tensor=world_size, recompute="full", **settings)
    with torch.no_grad():
        for mine, theirs in zip(again.gpt.parameters(), gpt.parameters(), strict=True):
            mine.copy_(theirs)
    recomputed, _ = cases.accumulated_gradients(again, ROWS, 30)
    result["recomputed"] = cases.deviations(recomputed, actual)
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory, layers):
    return {size: tmp_path_factory.mktemp(f"exports{size}") for size in (1, 2)}


def _examine_all(rank: int, world_size: int, sources: dict[str, Path], folder: Path) -> dict[str, Any]:
    return {kind: _examine(rank, world_size, source, folder / kind) for kind, source in sources.items()}


@pytest.fixture(scope="module")
def results(sources, folders, layers):
    return {size: run_ranks(_examine_all, size, sources, folders[size], layers=layers) for size in (1, 2)}


each_layout = pytest.mark.parametrize("size", [1, 2], ids=["tp1", "tp2"])
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@each_layout
def test_the_student_starts_as_the_base_bit_for_bit(results, size, kind):
    for ranks in results[size]:
        result = ranks[kind]
        assert torch.equal(result["initial"], result["plain"])
        assert result["base_digest"][0] == result["base_digest"][1]


@each_kind
@each_layout
def test_with_adapters_off_the_model_is_the_base_bit_for_bit(results, size, kind):
    for ranks in results[size]:
        result = ranks[kind]
        assert (result["adapted"] - result["plain"]).abs().max() > 0.1
        assert torch.equal(result["off"], result["plain"])
        assert torch.equal(result["base"], result["plain"])
        assert torch.equal(result["on again"], result["adapted"]), "an error in the context leaves them off"


@each_kind
def test_only_adapters_are_trained_and_their_start_does_not_depend_on_the_layout(results, kind):
    one, two = results[1][0][kind], results[2][0][kind]
    assert one["trained"] == two["trained"]
    assert len(one["trained"]) == 2 * 4 * 2  # A and B, four linears, two layers
    assert all(".adapter." in name for name in one["trained"])
    assert one["count"][0] == one["count"][1] == 2 * two["count"][0]
    for name, value in one["initial_weights"].items():
        assert torch.equal(value, two["initial_weights"][name]), name
    distinct = {tuple(value.flatten()[:4].tolist()) for value in one["initial_weights"].values()}
    assert len(distinct) == len(one["initial_weights"]), "no two matrices alike"
    for value in one["initial_weights"].values():  # Xavier normal: sqrt(2 / (rows + columns))
        assert value.std().item() == pytest.approx((2 / sum(value.shape)) ** 0.5, rel=0.25)


@each_kind
@each_layout
def test_merged_adapters_compute_the_same(results, folders, size, kind):
    """In a plain Megatron model and in transformers; without the merge the export is the source."""
    for ranks in results[size]:
        result = ranks[kind]
        torch.testing.assert_close(result["merged"], result["adapted"], rtol=0, atol=2e-5)
        with torch.no_grad():
            exported = load_dense(folders[size] / kind / "merged")(IDS).logits
            unmerged = load_dense(folders[size] / kind / "base")(IDS).logits
        torch.testing.assert_close(exported, result["adapted"], rtol=0, atol=2e-5)
        torch.testing.assert_close(unmerged, result["plain"], rtol=0, atol=1e-5)


@each_kind
@each_layout
def test_gradients_of_the_adapters_equal_the_dense_ones(results, size, kind):
    for ranks in results[size]:
        result = ranks[kind]
        assert len(result["gradients"]) == 16
        assert {name: error for name, error in result["gradients"].items() if error > 1e-5} == {}
        assert sum(result["losses"]) == pytest.approx(results[size][0][kind]["loss"], rel=1e-5)


@each_kind
@each_layout
def test_gradient_checkpointing_changes_nothing(results, size, kind):
    for ranks in results[size]:
        assert {name: error for name, error in ranks[kind]["recomputed"].items() if error > 1e-6} == {}


@pytest.mark.parametrize("targets", [["q_proj"], ["linear_qkv", "linear_prj"], ["output_layer"], []])
def test_targets_that_are_not_linears_of_the_decoder_are_refused(tmp_path, targets):
    with pytest.raises(AssertionError, match=r"UserError: adapters: got student\.lora\.targets=.*linear_qkv"):
        run_ranks(build_with_targets, 1, save_tiny_model(tmp_path), targets)


def build_with_targets(rank, world_size, folder, targets):
    build_student(folder, adaptation="lora", lora=LoRAConfig(targets=targets))


def _mixture(rank: int, world_size: int, source: Path) -> tuple[str, Tensor]:
    """The refusal of adapters on experts that are split over two ranks, and the logits that they would compute."""
    from nemo_popsd.errors import UserError
    from nemo_popsd.megatron import limits
    from tests.training.layouts import randomize_adapters

    settings = {"adaptation": "lora", "lora": LORA, "parallel": {"tensor": world_size, "sequence": "auto"}}
    said = ""
    if world_size > 1:
        try:
            build_student(source, **settings)
        except UserError as error:
            said = str(error)
        limits._refuse_adapters_of_experts = lambda *_, **__: None
    student = build_student(source, **settings)
    randomize_adapters(student)
    return said, whole_logits(student.gpt.eval(), IDS[:, :10], cases.VOCABULARY)


@pytest.mark.slow
def test_adapters_of_experts_in_parts_are_refused_because_they_compute_something_else(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "mixture", "qwen3_moe")
    [(_, expected)] = run_ranks(_mixture, 1, source)
    for said, logits in run_ranks(_mixture, 2, source):
        assert "linear_fc1, linear_fc2 for experts that are split over 2 ranks (parallel.tensor=2)" in said
        assert "set student.lora.targets=[linear_qkv,linear_proj]" in said
        assert (logits - expected).abs().max() > 1e-2, (
            "right with this version of Megatron-Bridge: no refusal is needed"
        )
