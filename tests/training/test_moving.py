"""Teachers and anchor whose weights follow the student: which weights each branch has, and how they move."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.distillation.config import DistillationConfig, WeightsConfig
from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model

LENGTHS = (9, 1, 4, 6)
FROZEN, LIVE, SNAPSHOT = WeightsConfig(), WeightsConfig(weights="live"), WeightsConfig(weights="snapshot", every=7)
CASES = {
    "full: live": ("full", LIVE, LIVE),
    "full: snapshot": ("full", SNAPSHOT, SNAPSHOT),
    "lora: live teacher": ("lora", LIVE, FROZEN),
    "lora: snapshot as teacher, live anchor": ("lora", SNAPSHOT, LIVE),
    "lora: live anchor": ("lora", FROZEN, LIVE),
}
"""By name: adaptation, weights of the teachers, weights of the anchor."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"base": save_tiny_model(folder / "base"), "live": save_tiny_model(folder / "live", seed=1)}


def first_steps(rank: int, world_size: int, models: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Loss and gradients of a step of each case, in which the student is not its base; its weights in `folder`."""
    from tests.training.layouts import randomize_adapters
    from tests.training.runs import ScriptedEngine, named_gradients, response, row, settings, start

    found: dict[str, Any] = {}
    for adaptation in ("full", "lora"):
        config = settings(student={"adaptation": adaptation}, optimizer={"distributed": "false"})
        run = start(models["base"], config, initial=models["live"] if adaptation == "full" else None)
        if adaptation == "lora":
            randomize_adapters(run.student)
        run.architecture.export(run.student.chunks, folder / adaptation)
        for name, (_, teacher, anchor) in ((n, case) for n, case in CASES.items() if case[0] == adaptation):
            config.distillation.teacher, config.distillation.anchor = teacher, anchor
            step = run.on_policy_step(
                ScriptedEngine([response(n, length) for n, length in enumerate(LENGTHS)], lambda: 1)
            )
            gradients: dict[str, torch.Tensor] = {}

            def update(gradients: Any = gradients, full: bool = adaptation == "full", run: Any = run) -> None:
                if full:
                    gradients.update(named_gradients(run, folder / "gradients"))

            before = [(p.data_ptr(), p.detach().clone()) for p in run.student.gpt.parameters()]
            metrics = step(2, [row(n) for n in range(len(LENGTHS))], run.optimizer, update)
            after = list(run.student.gpt.parameters())
            assert all(p.data_ptr() == place and p.equal(old) for p, (place, old) in zip(after, before, strict=True))
            found[name] = metrics.loss, gradients
    return found


def test_each_branch_has_the_weights_that_are_set(models: dict[str, Path], tmp_path: Path) -> None:
    """Loss and gradient of the paper's equations in float64, with the weights of each branch exchanged."""
    from tests.training.dense import dense_step
    from tests.training.runs import trajectory

    (found,) = run_ranks(first_steps, 1, models, tmp_path)
    rows = [trajectory(number, length) for number, length in enumerate(LENGTHS)]
    losses = {}
    for name, (adaptation, teacher, anchor) in CASES.items():
        live, base = tmp_path / adaptation, models["base"]
        expected = dense_step(
            live,
            base if anchor == FROZEN else live,
            rows,
            loss_mean="sequence",
            teacher=base if teacher == FROZEN else live,
        )
        loss, gradients = found[name]
        assert loss == pytest.approx(expected.loss, rel=2e-5), name
        losses[name] = loss
        for key, gradient in gradients.items():
            wanted = expected.gradients[key]
            assert float((gradient - wanted).abs().max() / wanted.abs().max()) < 2e-5, (name, key)
    assert len({round(loss, 5) for name, loss in losses.items() if "lora" in name}) == 3
    assert losses["full: live"] == losses["full: snapshot"]


def movements(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """A trained weight after each of five steps, and what an average and a snapshot of it are then."""
    from tests.training.runs import row, settings, start

    found: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        config = settings(student={"adaptation": "lora", "precision": precision}, optimizer={"lr": 1e-2})
        config.distillation.teacher = WeightsConfig(weights="ema", decay=0.75, every=2)
        config.distillation.anchor = WeightsConfig(weights="snapshot", every=3)
        run = start(model, config)
        step = run.on_policy_step()
        assert run.weights is not None
        parameter = next(p for n, p in run.student.gpt.named_parameters() if n.endswith("adapter.linear_out.weight"))
        seen = [{"live": parameter.detach().float().clone()}]
        for number in range(1, 6):
            step(number, [row(n) for n in range(4)], run.optimizer, run.update)
            values = {name: x.values[parameter].clone() for name, x in run.weights.copies.items()}
            seen.append({"live": parameter.detach().float().clone(), **values})
        with run.weights.teacher.model() as [gpt]:
            inside = dict(gpt.named_parameters())
            place = next(name for name, p in inside.items() if p is parameter)
            seen[-1]["inside"] = inside[place].detach().float().clone()
        found[precision] = seen
    return found


@pytest.mark.slow
def test_averages_and_snapshots_move_as_set(models: dict[str, Path]) -> None:
    (found,) = run_ranks(movements, 1, models["base"])
    for precision, seen in found.items():
        live = [at["live"] for at in seen]
        assert all(not a.equal(b) for a, b in pairwise(live))
        average, snapshot = live[0].clone(), live[0]
        for number in range(1, 6):
            if number % 2 == 0:
                average = 0.75 * average + 0.25 * live[number]
            if number % 3 == 0:
                snapshot = live[number]
            torch.testing.assert_close(seen[number]["teacher"], average, rtol=1e-6, atol=1e-9)
            assert seen[number]["anchor"].equal(snapshot)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        assert seen[-1]["inside"].equal(seen[-1]["teacher"].to(dtype).float())


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (
            "teacher",
            {"weights": "ema", "decay": 1.0},
            r"distillation\.teacher\.decay=1\.0; need a number from 0 and below 1",
        ),
        ("teacher", {"weights": "ema", "decay": -0.1}, r"distillation\.teacher\.decay=-0\.1"),
        (
            "anchor",
            {"weights": "moving"},
            "distillation.anchor.weights='moving'; need one of frozen, live, ema, snapshot",
        ),
        ("anchor", {"weights": "snapshot", "every": 0}, r"distillation\.anchor\.every=0"),
    ],
)
def test_settings_without_a_meaning_are_refused(section: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistillationConfig(**{section: WeightsConfig(**settings)})  # type: ignore[arg-type]


def test_copies_are_counted_once() -> None:
    ema = WeightsConfig(weights="ema")
    assert DistillationConfig().moving_copies == DistillationConfig(teacher=LIVE, anchor=LIVE).moving_copies == 0
    assert (
        DistillationConfig(teacher=ema).moving_copies == DistillationConfig(teacher=ema, anchor=ema).moving_copies == 1
    )
    assert DistillationConfig(teacher=ema, anchor=SNAPSHOT).moving_copies == 2
