"""Optimizer state in bf16 and on the host, and gradients that a product adds to the buffer itself.

A GPU has the libraries for these. Here Transformer Engine's Adam runs on emulated kernels, Megatron's hybrid optimizer
takes tensors of the CPU for those of a GPU, and the product is written in torch.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import LoRAConfig
from tests.harness import LOCAL, TRANSFORMER_ENGINE, run_ranks
from tests.layers import BOTH, on_transformer_engine
from tests.megatron import cases
from tests.tiny_models import build_student, save_tiny_model

STEPS = 3
CONFIG = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3}
ROWS = list(range(len(cases.LENGTHS)))


def emulate_hybrid_optimizer() -> None:
    """Megatron's hybrid optimizer takes tensors of the CPU for those of a GPU, and its copies for those of the host."""
    import megatron.core.optimizer as package
    from megatron.core.optimizer import distrib_optimizer

    from nemo_popsd.megatron import optimizer_state
    from tests.te.install import _Torch

    name = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    for stock, changed in (
        ("if param.is_cuda:", "if not cpu_copy:"),
        ("param.is_cuda", "True"),
        (".pin_memory()", ""),
    ):
        assert stock in source, stock
        source = source.replace(stock, changed)
    module = types.ModuleType(name)
    exec(compile(source, spec.origin, "exec"), module.__dict__)
    module.torch = _Torch()  # type: ignore[attr-defined]
    sys.modules[name] = module
    for user in (package, distrib_optimizer, optimizer_state):
        user.HybridDeviceOptimizer = module.HybridDeviceOptimizer  # type: ignore[attr-defined]


def _steps(source: Path, **config: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    from nemo_popsd.megatron.config import OptimizerConfig
    from nemo_popsd.megatron.optimizer import StudentOptimizer

    student = build_student(source, precision="bf16")
    settings = OptimizerConfig(**{**CONFIG, **config})
    unpinned = {"pin_cpu_grads": False, "pin_cpu_params": False}
    optimizer = StudentOptimizer(student.wrap(settings), settings, steps=STEPS, bf16=True, fields=unpinned)
    share = ROWS[student.dp_group.rank() :: student.dp_group.size()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        cases.fill_gradients(student, share, 30)
        optimizer.prepare()
        optimizer.step()
    return student, optimizer, {name: p.detach().float().clone() for name, p in student.gpt.named_parameters()}


def _states(optimizer: Any) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    from nemo_popsd.megatron.optimizer_state import parameter_states

    return [(state, state.values) for state in parameter_states(optimizer.megatron) if state.values]


def _written_and_read(student: Any, optimizer: Any, source: Path, folder: Path, **config: Any) -> dict[str, Any]:
    """The state after it was written and read by a new optimizer of the same and of the plain kind."""

    from nemo_popsd.checkpoint.training_state import load_training_state
    from nemo_popsd.megatron.config import OptimizerConfig
    from nemo_popsd.megatron.optimizer import StudentOptimizer
    from nemo_popsd.megatron.optimizer_state import step_count
    from tests.checkpoint.test_training_state import write_state

    write_state(student, optimizer, folder)
    before = [{name: value.float().cpu().clone() for name, value in values.items()} for _, values in _states(optimizer)]
    result: dict[str, Any] = {"steps": step_count(optimizer.megatron)}
    for name, fields in (("again", config), ("plain", {})):
        other = build_student(source, precision="bf16")
        settings = OptimizerConfig(**{**CONFIG, "distributed": "true", **fields})
        unpinned = {"pin_cpu_grads": False, "pin_cpu_params": False}
        fresh = StudentOptimizer(other.wrap(settings), settings, steps=STEPS, bf16=True, fields=unpinned)
        assert load_training_state(folder, other.chunks, fresh.megatron) == STEPS
        after = [{key: value.float().cpu() for key, value in values.items()} for _, values in _states(fresh)]
        result[name] = len(after) == len(before) and all(
            a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
            for a, b in zip(before, after, strict=True)
        )
        result[f"{name}, steps"] = step_count(fresh.megatron)
    return result


def _in_bf16(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, Any]:
    _, _, plain = _steps(source, distributed="true")
    student, optimizer, weights = _steps(source, state_dtype="bf16")
    start = build_student(source, precision="bf16")
    moved = {name: p.detach().float() for name, p in start.gpt.named_parameters()}
    kept = {v.dtype for part in _parts(optimizer) for state in part.optimizer.state.values() for v in state.values()}
    return {
        "dtypes": kept,
        "moved": {name: float((plain[name] - value).abs().max()) for name, value in moved.items()},
        "errors": {name: float((weights[name] - value).abs().max()) for name, value in plain.items()},
        **_written_and_read(student, optimizer, source, folder, state_dtype="bf16"),
    }


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]))


@pytest.mark.slow
@on_transformer_engine
@pytest.mark.transformer_engine
def test_moments_in_bf16_train_like_those_in_fp32_and_are_saved(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", "qwen3")
    for seen in run_ranks(_in_bf16, 2, source, tmp_path / "state", layers=TRANSFORMER_ENGINE):
        assert seen["dtypes"] == {torch.bfloat16, torch.float32}, "moments, main weights"
        assert seen["again"]
        assert seen["plain"], "an optimizer in fp32 reads them"
        assert seen["steps"] == seen["again, steps"] == seen["plain, steps"] == STEPS
        for name, error in seen["errors"].items():
            assert error <= 0.02 * seen["moved"][name] + 2**-8, name  # 8 bits of a moment; one rounding of a weight
        assert max(seen["moved"].values()) > 1e-3


def _gradients_in_bf16(rank: int, world_size: int, source: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for adaptation in ("full", "lora"):
        seen = {}
        for name, options in (("fp32", {}), ("bf16", {"grad_dtype": "bf16"})):
            student = build_student(source, precision="bf16", adaptation=adaptation, lora=LoRAConfig(rank=4))
            seen[name], _ = cases.accumulated_gradients(student, ROWS[rank::2], 30, **options)
            result[f"{adaptation} {name}"] = {gradient.dtype for gradient in seen[name].values()}
        wide = {name: gradient.float() for name, gradient in seen["bf16"].items()}
        # Under LoRA the gradient of the A matrices is 0 where the B matrices are.
        some = [name for name, gradient in seen["fp32"].items() if gradient.abs().max() > 0]
        result[adaptation] = cases.deviations({n: wide[n] for n in some}, {n: seen["fp32"][n] for n in some})
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layers", BOTH)
def test_gradients_reduced_in_bf16_are_those_of_fp32_up_to_rounding(tmp_path: Path, layers: str) -> None:
    for seen in run_ranks(_gradients_in_bf16, 2, save_tiny_model(tmp_path, "qwen3"), layers=layers):
        for adaptation in ("full", "lora"):
            assert seen[f"{adaptation} fp32"] == {torch.float32}
            assert seen[f"{adaptation} bf16"] == {torch.bfloat16}
            errors = seen[adaptation]
            assert 0 < max(errors.values()) < 2**-5, "a few roundings to 8 bits, relative to the largest entry"


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).abs() / expected.abs().clamp(min=2**-6)).max())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _on_the_host(rank: int, world_size: int, source: Path, folder: Path, share: float) -> dict[str, Any]:
    emulate_hybrid_optimizer()
    _, _, plain = _steps(source, distributed="true")
    student, optimizer, weights = _steps(source, host_share=share)
    [hybrid] = [part.optimizer for part in _parts(optimizer)]
    on_host = sum(p.numel() for adam in hybrid.cpu_optimizers for group in adam.param_groups for p in group["params"])
    total = sum(p.numel() for group in hybrid.param_groups for p in group["params"])
    return {
        "share": on_host / total,
        "largest": max(_relative(weights[name], value) for name, value in plain.items()),
        "different": _mean([float((weights[name] != value).float().mean()) for name, value in plain.items()]),
        **_written_and_read(student, optimizer, source, folder, host_share=share),
    }


@pytest.mark.slow
@on_transformer_engine
@pytest.mark.transformer_engine
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_state_on_the_host_trains_the_same_and_is_saved(tmp_path: Path, share: float) -> None:
    source = save_tiny_model(tmp_path / "model", "qwen3")
    for seen in run_ranks(_on_the_host, 2, source, tmp_path / "state", share, layers=TRANSFORMER_ENGINE):
        assert share <= seen["share"] <= min(1.0, share + 0.3), "whole tensors, until the share is reached"
        assert seen["largest"] <= 2**-7, "one rounding of a bf16 weight"
        assert seen["different"] < 0.01, "where the two forms of Adam round a sum in fp32 to both sides of a boundary"
        assert seen["again"]
        assert seen["plain"]
        assert seen["steps"] == seen["again, steps"] == seen["plain, steps"] == STEPS


def emulate_fused_accumulation() -> None:
    """The kernel of apex, in torch."""
    from megatron.core.tensor_parallel import layers

    def accumulate(inputs: torch.Tensor, gradients: torch.Tensor, buffer: torch.Tensor) -> None:
        buffer.add_(gradients.t().float() @ inputs.float())

    kernel = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    layers.fused_weight_gradient_mlp_cuda = kernel
    layers._grad_accum_fusion_available = True


def _fused(rank: int, world_size: int, source: Path) -> dict[str, Any]:
    try:
        build_student(source, gradient_accumulation_fusion="true")
        refused = ""
    except UserError as error:
        refused = str(error)
    result: dict[str, Any] = {"refused": refused}
    emulate_fused_accumulation()
    for overlap in (False, True):
        seen = {}
        for fusion in ("false", "true"):
            student = build_student(source, gradient_accumulation_fusion=fusion)
            seen[fusion], _ = cases.accumulated_gradients(student, ROWS, 30, overlap_grad_reduce=overlap)
            assert student.gpt.config.gradient_accumulation_fusion == (fusion == "true")
        result[f"overlap={overlap}"] = cases.deviations(seen["true"], seen["false"])
    return result


def test_products_that_add_to_the_gradient_buffer_give_the_same_gradients(tmp_path: Path) -> None:
    [seen] = run_ranks(_fused, 1, save_tiny_model(tmp_path, "qwen3"), layers=LOCAL)
    assert "without fused_weight_gradient_mlp_cuda" in seen["refused"]
    for overlap in (False, True):
        assert {name: error for name, error in seen[f"overlap={overlap}"].items() if error > 1e-6} == {}


def test_what_this_machine_lacks_is_refused_by_name() -> None:
    from nemo_popsd.megatron.config import OptimizerConfig
    from nemo_popsd.megatron.limits import refuse_optimizer

    refuse_optimizer(OptimizerConfig())
    with pytest.raises(UserError, match=r"optimizer\.state_dtype=bf16 on a machine where Transformer Engine does not"):
        refuse_optimizer(OptimizerConfig(state_dtype="bf16"))
    with pytest.raises(UserError, match=r"optimizer\.host_share=0\.5 on a machine without"):
        refuse_optimizer(OptimizerConfig(host_share=0.5))
