"""The recipes of published settings: sources, values, plans, and a step on a tiny stand-in of each architecture."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.config.contradictions import check_sections
from nemo_popsd.config.loading import load_config
from nemo_popsd.data.templates import check_templates, student_turn, teacher_turn
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.plan import problems
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case
from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model

CONF = Path(__file__).resolve().parents[2] / "conf"
RECIPES = {
    "qwen3_8b": "qwen3",
    "qwen3_4b": "qwen3_tied",
    "r1_distill_qwen_7b": "qwen2",
    "olmo3_7b_think": "olmo3",
    "qwen3_1.7b_answer": "qwen3_tied",
    "opsd_official": "qwen3_tied",
}
"""Architecture of the small substitute model, by name of the recipe."""
EVALUATIONS = ("paper_evaluation", "replication_evaluation")
SMALL = [
    "student.lora.rank=4",
    "student.lora.alpha=8",
    "student.precision=fp32",
    "training.prompts_per_step=2",
    "rollout.max_response_tokens=12",
    "optimizer.lr=1e-2",
]
_NAMES_A_SOURCE = re.compile(r"# (paper|OPSD|inference|study|replication|here|code|--\w|this model's chat template)")


@pytest.mark.parametrize("name", [*RECIPES, *EVALUATIONS])
def test_every_number_names_its_source(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    values = re.findall(
        r"^ +\w+: (?!\")[^#\n]*\d.*$|^ +(?:enable_thinking|kind|family|decay|loss_mean): .*$", text, re.MULTILINE
    )
    assert len(values) > 5
    assert [
        line for line in values if not re.match(r" +(path|source):", line) and not _NAMES_A_SOURCE.search(line)
    ] == []


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_recipe_fits_on_one_node_and_on_four(name: str, nodes: int) -> None:
    config = load_config(CONF / f"{name}.yaml")
    check_sections(config)
    case = Case(config, PlanConfig(nodes=[nodes]), read_sizes(config.student.source)[0], nodes)
    assert problems(case) == []


def test_the_replications_strongest_case() -> None:
    config = load_config(CONF / "qwen3_1.7b_answer.yaml")
    target, lora = config.distillation.target, config.student.lora
    assert (target.family, target.beta, target.cap, config.distillation.divergence.weight) == (
        "purified",
        1.0,
        10.0,
        0.5,
    )
    assert (lora.rank, lora.alpha, config.optimizer.lr, config.training.prompts_per_step) == (64, 128, 5e-6, 32)
    assert (config.data.privileged.view, config.data.reference_only.view) == ("answer", None)
    assert (config.rollout.max_response_tokens, config.training.steps, config.data.enable_thinking) == (1024, 200, True)
    protocol = load_config(CONF / "replication_evaluation.yaml").evaluation
    for sampling in (config.evaluation, protocol):
        assert (sampling.samples_per_problem, sampling.temperature, sampling.top_p, sampling.top_k) == (
            8,
            0.6,
            0.95,
            20,
        )


def test_official_opsd_by_its_command_line() -> None:
    config = load_config(CONF / "opsd_official.yaml")
    target, divergence, data = config.distillation.target, config.distillation.divergence, config.data
    assert (target.family, target.temperature, config.distillation.loss_mean) == ("opsd", 1.1, "token")
    assert (divergence.kind, divergence.clip) == ("forward_kl", 0.05)
    assert (config.optimizer.lr, config.optimizer.clip_grad, config.training.prompts_per_step) == (5e-6, 0.1, 32)
    assert (config.student.lora.rank, config.student.lora.alpha) == (64, 128)
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.1, 0.95, 20)
    assert (config.rollout.max_response_tokens, config.training.checkpoint_every) == (1024, 25)
    assert (data.enable_thinking, data.privileged.enable_thinking) == (False, True)
    check_templates(data.templates)
    assert student_turn(data.templates, question="Q") == (
        "Problem: Q\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    teacher = teacher_turn(data.templates, question="Q", reference="R")
    assert teacher.startswith(
        "Problem: Q\n\nHere is a reference solution to this problem:\n=== Reference Solution Begin ===\nR\n"
        "=== Reference Solution End ===\n\n\nAfter reading the reference solution above, make sure you truly understand"
    )
    assert teacher.endswith("work out:\n\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert "  " not in teacher


def steps(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Two steps of each recipe on its stand-in: the first with the self-check."""
    from tests.training.runs import row, start

    found = {}
    for name, stand_in in RECIPES.items():
        run = start(folder / stand_in, load_config(CONF / f"{name}.yaml", SMALL))
        step = run.on_policy_step()
        trained = [p for p in run.student.gpt.parameters() if p.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        metrics = [step(number, [row(0), row(1)], run.optimizer, run.update) for number in (1, 2)]
        moved = sum(not p.equal(old) for p, old in zip(trained, before, strict=True))
        found[name] = [(m.loss, m.grad_norm) for m in metrics], moved / len(trained)
    return found


@pytest.mark.slow
def test_each_recipe_trains_a_stand_in(tmp_path: Path) -> None:
    for kind in sorted(set(RECIPES.values())):
        save_tiny_model(tmp_path / kind, kind)
    (found,) = run_ranks(steps, 1, tmp_path)
    for name, (metrics, moved) in found.items():
        assert moved == 1, name
        assert all(math.isfinite(loss) and loss != 0 and norm > 0 for loss, norm in metrics), name
