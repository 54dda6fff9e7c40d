"""Megatron's optimizer against torch's AdamW; the same weights in every layout; a base that does not change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.megatron.config import LoRAConfig, OptimizerConfig
from tests.harness import run_ranks
from tests.megatron import cases
from tests.tiny_models import build_student, save_tiny_model

STEPS = 3
# An epsilon above the rounding of the gradients: Adam's first step is lr · g / (|g| + eps).
CONFIG = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3, "clip_grad": 1.0}
LORA = {"adaptation": "lora", "lora": LoRAConfig(rank=4, alpha=6.0)}
ROWS = list(range(len(cases.LENGTHS)))


def _share(student: Any) -> list[int]:
    return ROWS[student.dp_group.rank() :: student.dp_group.size()]


def _train(student: Any, bf16: bool = False, **config: Any) -> tuple[Any, dict[str, Any]]:
    """Three steps on this rank's share, and those of AdamW with the same gradients, parameter by parameter."""
    from nemo_popsd.megatron.optimizer import StudentOptimizer
    from tests.digests import base_digest

    settings = OptimizerConfig(**{**CONFIG, **config})
    optimizer = StudentOptimizer(student.wrap(settings), settings, steps=STEPS, bf16=bf16)
    trained = {name: p for name, p in student.gpt.named_parameters() if p.requires_grad}
    copies = {name: p.detach().float().clone().requires_grad_() for name, p in trained.items()}
    matrices = [p for p in copies.values() if p.dim() > 1]
    vectors = [p for p in copies.values() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    reference = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)
    with student.base.model() as [base]:
        before = base_digest(base)
    report: dict[str, Any] = {"norms": [], "local norms": [], "calls": 0}

    def closure() -> None:
        report["calls"] += 1

    for _ in range(STEPS):
        optimizer.zero_grad()
        cases.fill_gradients(student, _share(student), 30)
        gradients = {name: p.main_grad.clone() for name, p in trained.items()}
        norm = optimizer.prepare()
        optimizer.step(closure)
        assert optimizer.grad_norm == norm
        report["norms"].append(norm)
        report["local norms"].append(math.sqrt(sum(g.double().square().sum().item() for g in gradients.values())))
        clip = min(1.0, settings.clip_grad / (norm + 1e-6)) if settings.clip_grad else 1.0
        for name, copy in copies.items():
            copy.grad = gradients[name] * clip
        reference.step()
    with student.base.model() as [base]:
        report["frozen"] = before == base_digest(base)
    report["student moved"] = before != base_digest(student.gpt)
    report["adapters moved"] = any(p.abs().max() > 0 for n, p in trained.items() if "linear_out.weight" in n)
    report["deviation"] = max((trained[n].float() - c).abs().max().item() for n, c in copies.items())
    report["rate"] = optimizer.learning_rate
    report["copies"] = copies
    return optimizer, report


def _weights(student: Any, source: Path, folder: Path, name: str) -> None:
    HuggingFaceModel(source).export(student.gpt, folder / name)


def _two_layouts(rank: int, world_size: int, source: Path, folder: Path) -> dict[str, Any]:
    from megatron.core import parallel_state

    reports = {}
    for tensor in {world_size, 1}:
        layout = f"tp{tensor}" if tensor == world_size else "dp2"
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        for name, config in {"full": {}, "lora": LORA}.items():
            for distributed in (False, True) if layout == "dp2" else (False,):
                student = build_student(source, tensor=tensor, **config)
                case = f"{layout} {name}" + (" distributed" if distributed else "")
                _, reports[case] = _train(student, distributed=str(distributed).lower())
                reports[case].pop("copies")
                _weights(student, source, folder, case)
        if layout != "tp2":
            for distributed in (False, True) if layout == "dp2" else (False,):
                case = f"{layout} bf16" + (" distributed" if distributed else "")
                reports[case] = _train_in_bf16(source, tensor, distributed)
    return reports


def _train_in_bf16(source: Path, tensor: int, distributed: bool) -> dict[str, Any]:
    """Uses a learning rate whose updates bf16 weights alone would round away."""
    student = build_student(source, tensor=tensor, precision="bf16")
    optimizer, report = _train(
        student, bf16=True, distributed=str(distributed).lower(), lr=1e-4, weight_decay=0.0, clip_grad=0.0
    )
    copies = report.pop("copies")
    if not distributed:
        mains = [p for group in _inner(optimizer).fp32_from_float16_groups for p in group]
        report["fp32 mains"] = all(main.dtype == torch.float32 for main in mains)
        by_shape = {tuple(p.shape): [] for p in mains}
        for main in mains:
            by_shape[tuple(main.shape)].append(main)
        report["main deviation"] = max(
            min((main - copy).abs().max().item() for main in by_shape[tuple(copy.shape)]) for copy in copies.values()
        )
    report["total"] = {n: p.detach().float().clone() for n, p in student.gpt.named_parameters()}
    report["rounded"] = max(
        (p.detach() - copies[n].bfloat16()).float().abs().max().item() for n, p in student.gpt.named_parameters()
    )
    report["dtypes"] = {str(p.dtype) for p in student.gpt.parameters()}
    return report


def _inner(optimizer: Any) -> Any:
    inner = optimizer.megatron
    return inner.chained_optimizers[0] if hasattr(inner, "chained_optimizers") else inner


@pytest.fixture(scope="module")
def trained(tmp_path_factory, layers):
    folder = tmp_path_factory.mktemp("trained")
    source = save_tiny_model(folder / "source", "qwen3")
    one = run_ranks(_two_layouts, 1, source, folder, layers=layers)
    two = run_ranks(_two_layouts, 2, source, folder, layers=layers)
    return source, folder, [one[0]], two


CASES = ("tp1 full", "tp1 lora", "tp2 full", "tp2 lora", "dp2 full", "dp2 lora", "dp2 full distributed")


def _reports(trained: Any, case: str) -> list[dict[str, Any]]:
    return [report[case] for report in trained[2 if case.startswith("tp1") else 3]]


@pytest.mark.parametrize("case", [c for c in CASES if "distributed" not in c])
def test_steps_are_those_of_adamw_on_the_clipped_gradients(trained, case):
    for report in _reports(trained, case):
        assert report["norms"][0] > CONFIG["clip_grad"], "something to clip"
        assert report["deviation"] < 1e-6
        assert report["rate"] == CONFIG["lr"]
        assert report["calls"] == STEPS


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_norm_is_global_and_the_same_on_every_rank_and_in_every_layout(trained, case):
    expected = _reports(trained, "tp1 lora" if "lora" in case else "tp1 full")[0]
    assert expected["norms"] == pytest.approx(expected["local norms"], rel=1e-5)
    for report in _reports(trained, case):
        assert report["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.parametrize("case", [*CASES[2:], "dp2 lora distributed"])
def test_every_layout_ends_with_the_same_weights(trained, case):
    folder = trained[1]
    kind = "lora" if "lora" in case else "full"
    start, expected, actual = (
        load_file(folder / name / "model.safetensors") for name in ("source", f"tp1 {kind}", case)
    )
    for name, value in expected.items():
        if kind == "full" or "proj" in name:
            assert (value - start[name]).abs().max() > 1e-3, f"{name} was trained"
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", [*CASES, "dp2 lora distributed"])
def test_the_base_does_not_change_while_the_student_does(trained, case):
    for report in _reports(trained, case):
        assert report["frozen"]
        assert report["student moved"] == ("full" in case)
        assert report["adapters moved"] == ("lora" in case)


@pytest.mark.parametrize("case", ["tp1 bf16", "dp2 bf16"])
def test_bf16_weights_follow_main_weights_in_fp32(trained, case):
    for report in _reports(trained, case):
        assert report["dtypes"] == {"torch.bfloat16"}
        assert report["fp32 mains"]
        assert report["main deviation"] < 1e-7
        assert report["rounded"] == 0


def test_the_distributed_optimizer_ends_with_the_same_bf16_weights(trained):
    plain, distributed = (_reports(trained, f"dp2 bf16{suffix}") for suffix in ("", " distributed"))
    for a, b in zip(plain, distributed, strict=True):
        assert {n for n, value in a["total"].items() if not torch.equal(value, b["total"][n])} == set()


def _rates(rank: int, world_size: int, source: Path) -> dict[str, list[float]]:
    from nemo_popsd.megatron.optimizer import StudentOptimizer

    student = build_student(source)
    result = {}
    for name, fields in SCHEDULES.items():
        config = OptimizerConfig(lr=1.0, min_lr=0.1, **fields)
        optimizer = StudentOptimizer(student.wrap(config), config, steps=6, bf16=False)
        rates = []
        for _ in range(8):
            optimizer.zero_grad()
            optimizer.prepare()
            optimizer.step()
            rates.append(optimizer.learning_rate)
        result[name] = rates
    return result


SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "warm-up": {"warmup_steps": 4},
    "linear": {"decay": "linear"},
    "linear after warm-up": {"decay": "linear", "warmup_steps": 2},
    "cosine after warm-up": {"decay": "cosine", "warmup_steps": 2},
}


def test_learning_rates_by_step(tmp_path):
    [rates] = run_ranks(_rates, 1, save_tiny_model(tmp_path, "qwen3"))
    # The decay would end with step 7: the last step of the run still moves something where min_lr is 0.
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    expected = {
        "constant": [1.0] * 8,
        "warm-up": [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0],
        "linear": [1 - 0.9 * k / 7 for k in range(1, 8)] + [0.1],
        "linear after warm-up": [0.5, 1.0, *(1 - 0.9 * k / 5 for k in range(1, 6)), 0.1],
        "cosine after warm-up": [0.5, 1.0, *cosine[1:], 0.1],
    }
    for name, values in expected.items():
        assert rates[name] == pytest.approx(values), name
