"""Runs of a small model, as the planner and as the trainer get them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.planning.config import PlanConfig, WorkloadConfig
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case

_RECIPE = Path(__file__).resolve().parents[2] / "conf" / "qwen3_8b.yaml"
PROMPT, REFERENCE, RESPONSE, ROWS = 10, 40, 16, 4
"""Lengths for which each frozen branch is a separate forward without padding within `frozen_tokens`."""
MODEL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 24}
"""Wide enough that positions and indices, which the plan leaves out, are few bytes in comparison."""

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"adaptation": "full"},
    "full, recompute": {"adaptation": "full", "recompute": "full"},
    "lora": {"adaptation": "lora"},
    "lora, recompute": {"adaptation": "lora", "recompute": "full"},
    "full, block": {"adaptation": "full", "recompute": "full", "recompute_method": "block"},
    "full, selective": {
        "adaptation": "full",
        "recompute": "selective",
        "recompute_modules": ["core_attn", "mlp"],
    },
    "lora, selective": {"adaptation": "lora", "recompute": "selective", "recompute_modules": ["core_attn"]},
}


def run_config(*, tensor: int = 1, distributed: bool = False, **student: Any) -> PopsdConfig:
    """All rows have the lengths above, which are the limits."""
    config = PopsdConfig()
    config.student.precision = "fp32"
    for name, value in student.items():
        setattr(config.student, name, value)
    config.student.lora.rank, config.student.lora.alpha = 4, 8
    config.parallel.tensor, config.parallel.sequence = tensor, "false"
    config.optimizer.distributed = str(distributed).lower()
    config.data.max_prompt_tokens, config.data.max_reference_tokens = PROMPT, REFERENCE
    config.rollout.max_response_tokens = RESPONSE
    config.rollout.top_k, config.rollout.top_p = 0, 1.0
    config.training.prompts_per_step = ROWS
    config.training.frozen_tokens = ROWS * (PROMPT + REFERENCE + RESPONSE)
    config.distillation.diagnosed_tokens = 16  # eight of each chunk: products are made for multiples of eight rows
    config.distillation.chunk_tokens = 32
    return config


def planned(directory: Path, config: PopsdConfig, *, ranks: int, device: str = "cpu") -> Case:
    """The case of `config` on one node of `ranks`, by default with the kernels of the CPU."""
    sizes, _ = read_sizes(str(directory))
    plan = PlanConfig(gpus_per_node=ranks, workload=WorkloadConfig(layers="plain"))
    return Case(config, plan, sizes, 1, device)


def rows(count: int) -> list[Any]:
    """Rows whose contexts have exactly the planned lengths."""
    from nemo_popsd.data.contexts import Contexts
    from nemo_popsd.data.dataset import PromptRow
    from nemo_popsd.data.records import Record

    rows = []
    for index in range(count):
        ids = [(index + position) % 199 for position in range(PROMPT + REFERENCE)]
        contexts = Contexts(ids[:PROMPT], ids, ids[:REFERENCE], reference_text="r", reference_truncated=False)
        rows.append(PromptRow(Record(id=f"row{index}", question="q", reference="r", answer=None), contexts))
    return rows


def case(
    model: str = "Qwen3-8B", *settings: str, nodes: int = 1, plan: PlanConfig | None = None, **layout: Any
) -> Case:
    """The recipe for `model` on `nodes`, with `layout` in place of the run's."""
    config = load_config(_RECIPE, [f"student.source={model}", *settings])
    run = Case(config, plan or PlanConfig(), read_sizes(model)[0], nodes)
    run.__dict__["layout"] = replace(run.layout, **layout)
    return run
