"""The recipes at scale: the planner chooses their layouts, each setting is explained, and they train stand-ins."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.config.loading import load_config
from nemo_popsd.planning.alternatives import alternatives
from nemo_popsd.planning.plan import fastest, problems
from nemo_popsd.planning.settings import split_settings
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case
from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Recipe:
    """Expected properties of a recipe, and the model that replaces its own."""

    nodes: int
    layout: dict[str, Any]
    stand_in: str
    small: tuple[str, ...]
    """Its layout on two ranks."""


_TENSOR = ("parallel.tensor=2",)
RECIPES = {
    "qwen3_32b": Recipe(4, {"tensor": 4, "sequence": True}, "qwen3", _TENSOR),
    "r1_distill_llama_70b": Recipe(16, {"tensor": 8, "sequence": True}, "llama3", _TENSOR),
    "qwen3_8b_full": Recipe(1, {"tensor": 2, "sequence": True}, "qwen3", _TENSOR),
    "qwen3_30b_a3b": Recipe(2, {"expert": 4}, "qwen3_moe", ("parallel.expert=2",)),
    "qwen3_8b_long": Recipe(1, {"context": 4}, "qwen3", ("parallel.context=2",)),
}
LIMITS = [
    "student.lora.rank=4",
    "student.lora.alpha=8",
    "training.prompts_per_step=4",
    "rollout.max_response_tokens=12",
    "optimizer.lr=1e-2",
]
each = pytest.mark.parametrize("name", RECIPES)


def planned(name: str) -> Case:
    """The recipe as the command in its head plans it."""
    text = (ROOT / "conf" / f"{name}.yaml").read_text().replace("\\\n#", "")
    (command,) = re.findall(r"^#   popsd plan (conf/\S+ .*)", text, re.MULTILINE)
    conf, *words = shlex.split(command)
    assert conf == f"conf/{name}.yaml"
    assert words.pop() == "--explain"
    plan, rest = split_settings(words)
    config = load_config(ROOT / conf, rest)
    (nodes,) = plan.nodes
    return Case(config, plan, read_sizes(config.student.source)[0], nodes)


@each
def test_a_recipe_has_the_nodes_and_the_layout_of_its_name(name: str) -> None:
    case, expected = planned(name), RECIPES[name]
    assert case.nodes == expected.nodes
    sizes = {**dict.fromkeys(("tensor", "pipeline", "context", "expert"), 1), "sequence": False, **expected.layout}
    assert {key: getattr(case.layout, key) for key in sizes} == sizes
    text = (ROOT / "conf" / f"{name}.yaml").read_text()
    start = f"sbatch --nodes={case.nodes} " if case.nodes > 1 else "torchrun --nproc-per-node 8 "
    assert f"#   {start}" in text


@each
def test_the_layout_of_a_recipe_is_the_fastest_that_fits(name: str) -> None:
    case = planned(name)
    assert problems(case) == []
    best = fastest(case)
    assert best is not None
    assert best[0] == {}


@each
def test_every_setting_of_the_layout_is_explained(name: str) -> None:
    case = planned(name)
    text = (ROOT / "conf" / f"{name}.yaml").read_text()
    for other in alternatives(case):
        section, _, key = next(iter(other.changes)).partition(".")
        block = re.search(rf"^{section}:\n((?:  .*\n|\n)*)", text, re.MULTILINE)
        assert block is not None
        assert re.search(rf"^  {key}: [^#\n]+ # (plan|here): \S", block[1], re.MULTILINE), other.changes


def steps(rank: int, world_size: int, names: list[str], folder: Path) -> dict[str, Any]:
    """Two steps of each recipe on its stand-in: the first with the self-check."""
    from tests.training.runs import row, start

    found = {}
    for name in names:
        recipe = RECIPES[name]
        run = start(folder / recipe.stand_in, load_config(ROOT / "conf" / f"{name}.yaml", [*recipe.small, *LIMITS]))
        step, group = run.on_policy_step(), run.student.dp_group
        share = 4 // group.size()
        mine = [row(number) for number in range(group.rank() * share, (group.rank() + 1) * share)]
        trained = [p for chunk in run.student.chunks for p in chunk.parameters() if p.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        metrics = [step(number, mine, run.optimizer, run.update) for number in (1, 2)]
        moved = sum(not p.equal(old) for p, old in zip(trained, before, strict=True))
        found[name] = [(m.loss, m.grad_norm) for m in metrics], moved, len(trained), str(trained[0].dtype)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("small", sorted({recipe.small for recipe in RECIPES.values()}), ids="+".join)
def test_recipes_train_stand_ins_in_small_layouts(small: tuple[str, ...], tmp_path: Path) -> None:
    names = [name for name, recipe in RECIPES.items() if recipe.small == small]
    for kind in {RECIPES[name].stand_in for name in names}:
        save_tiny_model(tmp_path / kind, kind)
    first, second = run_ranks(steps, 2, names, tmp_path)
    for name in names:
        metrics, moved, parameters, dtype = first[name]
        assert dtype == "torch.bfloat16"
        assert moved == parameters > 0
        assert metrics == second[name][0]
        assert all(math.isfinite(loss) and loss > 0 and norm > 0 for loss, norm in metrics)
        assert metrics[0] != metrics[1]
