"""Ratios of rehearsed to planned numbers over layouts and sizes; the tables of docs/planning.md.

python -m tests.rehearsal.table layouts     the layouts below, two to eight layers of published models: a minute of CPU
python -m tests.rehearsal.table sizes       whole models at the lengths of the recipe: minutes of CPU each
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONF = Path(__file__).parents[2] / "conf" / "qwen3_8b.yaml"
SHORT = ("data.max_prompt_tokens=96", "data.max_reference_tokens=160", "rollout.max_response_tokens=256")
ATTENTION = "student.lora.targets=[linear_qkv,linear_proj]"
TP2, TP4 = "parallel.tensor=2", "parallel.tensor=4"
SP, WHOLE = "parallel.sequence=true", "parallel.sequence=false"
FULL, KEEP = "student.adaptation=full", "student.recompute=none"
PP2, PP4, VPP2, CP2 = "parallel.pipeline=2", "parallel.pipeline=4", "parallel.virtual_pipeline=2", "parallel.context=2"
EP2, EP4, EP8 = "parallel.expert=2", "parallel.expert=4", "parallel.expert=8"
ETP2 = "parallel.expert_tensor=2"
SELECTIVE = "student.recompute=selective"
UNEVEN = ("parallel.first_stage_layers=1", "parallel.last_stage_layers=1")


@dataclass(frozen=True)
class Layout:
    """A run of some layers of a published model on some GPUs, as one of its ranks."""

    model: str
    layers: int
    world: int
    rank: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model} {self.layers} {self.world} {self.rank} {' '.join(self.words)}"


def _layout(model: str, layers: int, world: int, rank: int, *words: str) -> Layout:
    return Layout(model, layers, world, rank, words)


_8B, _SMALL, _MOE, _70B = "Qwen3-8B", "Qwen3-1.7B", "Qwen3-30B-A3B", "DeepSeek-R1-Distill-Llama-70B"

LAYOUTS = (
    _layout(_8B, 2, 8, 0),
    _layout(_8B, 2, 8, 7, KEEP),
    _layout(_8B, 2, 8, 0, FULL),
    _layout(_8B, 2, 8, 0, FULL, KEEP),
    _layout(_8B, 2, 8, 0, SELECTIVE, "student.recompute_modules=[core_attn]"),
    _layout(_8B, 2, 8, 0, FULL, SELECTIVE, "student.recompute_modules=[mlp]"),
    _layout(_8B, 2, 8, 0, "optimizer.distributed=false"),
    _layout(_8B, 2, 512, 511),
    _layout(_8B, 2, 8, 0, TP2, WHOLE),
    _layout(_8B, 2, 8, 0, TP2, WHOLE, KEEP),
    _layout(_8B, 2, 8, 0, TP2, WHOLE, FULL),
    _layout(_8B, 2, 8, 1, TP2, SP),
    _layout(_8B, 2, 8, 0, TP2, SP, KEEP),
    _layout(_8B, 2, 8, 0, TP2, SP, FULL, KEEP),
    _layout(_8B, 2, 8, 0, TP4, SP, FULL),
    _layout(_8B, 2, 16, 0, "parallel.tensor=8", SP),
    _layout(_8B, 2, 8, 0, CP2),
    _layout(_8B, 2, 8, 1, CP2, KEEP, FULL),
    _layout(_8B, 2, 8, 0, "parallel.context=4"),
    _layout(_8B, 2, 8, 5, CP2, TP2, SP, FULL),
    _layout(_8B, 2, 8, 3, CP2, TP2, SP),
    _layout(_8B, 4, 8, 0, PP2),
    _layout(_8B, 4, 8, 7, PP2),
    _layout(_8B, 4, 8, 0, PP2, KEEP),
    _layout(_8B, 4, 8, 2, PP4),
    _layout(_8B, 6, 8, 2, PP4, *UNEVEN),
    _layout(_8B, 6, 8, 7, PP4, FULL, *UNEVEN),
    _layout(_8B, 8, 8, 0, PP2, VPP2),
    _layout(_8B, 8, 8, 7, PP2, VPP2, FULL),
    _layout(_8B, 4, 8, 0, PP2, TP2, SP, FULL),
    _layout(_SMALL, 2, 8, 0, FULL),
    _layout(_SMALL, 4, 8, 0, PP2, TP2, WHOLE, FULL),
    _layout(_SMALL, 4, 8, 7, PP2, TP2, WHOLE, FULL),
    _layout(_MOE, 2, 8, 0, EP8, ATTENTION),
    _layout(_MOE, 2, 8, 0, EP8, ATTENTION, KEEP),
    _layout(_MOE, 2, 8, 7, EP8, FULL),
    _layout(_MOE, 2, 8, 0, EP4, TP2, SP, FULL),
    _layout(_MOE, 2, 8, 0, EP2, TP2, SP, ETP2, FULL),
    _layout(_MOE, 4, 8, 4, EP4, PP2, FULL),
    _layout(_MOE, 2, 8, 0, EP2, ATTENTION),
    _layout(_70B, 4, 64, 0, "parallel.tensor=8", SP, PP4, CP2, FULL),
    _layout(
        _70B, 4, 64, 56, "parallel.tensor=8", SP, PP4, CP2
    ),  # the last shard of the vocabulary is smaller than the mean
)

_FULL_70B = ("parallel.tensor=8", SP, PP4, CP2)
SIZES = (
    Layout(_8B, 36, 8, 0, ()),
    Layout(_8B, 36, 8, 0, (FULL,)),
    Layout(_8B, 36, 8, 0, (TP2, WHOLE)),
    Layout(_8B, 36, 8, 0, (TP2, WHOLE, FULL)),
    Layout("Qwen3-32B", 64, 32, 0, ("parallel.tensor=8", SP)),
    Layout("Qwen3-32B", 64, 32, 0, ("parallel.tensor=8", SP, FULL)),
    *(Layout(_70B, 80, 64, rank, _FULL_70B) for rank in (0, 16, 56)),
    *(Layout(_70B, 80, 64, rank, (*_FULL_70B, FULL)) for rank in (0, 16, 56)),
    Layout(_MOE, 48, 8, 0, (EP8, ATTENTION)),
    Layout(_MOE, 48, 8, 0, (EP8, FULL)),
    Layout(_8B, 36, 512, 0, ("training.prompts_per_step=512",)),
    Layout(_8B, 36, 512, 0, ("training.prompts_per_step=512", FULL)),
)


@dataclass(frozen=True)
class Row:
    """Ratios of measured to planned."""

    layout: Layout
    seconds: float
    """CPU seconds."""
    frozen_peak: float
    training_peak: float
    frozen_work: float
    training_work: float
    bytes_off: tuple[str, ...]
    """Collectives whose bytes are not those of the plan."""
    collectives: int
    """Kinds of collectives that are compared."""


def case_of(layout: Layout, lengths: tuple[str, ...], layers: str = "plain") -> tuple[Any, dict[str, Any]]:
    """The run as a case, and the content of its model's ``config.json``; arguments as `measure`."""
    from nemo_popsd.config.loading import load_config
    from nemo_popsd.planning.config import PlanConfig, WorkloadConfig
    from nemo_popsd.planning.sizes import read_model_file, read_sizes
    from nemo_popsd.planning.workload import Case
    from nemo_popsd.rehearsal.rank import as_rehearsed

    words = list(layout.words)
    if lengths and not any(word.startswith("training.prompts") for word in words):
        words.append(f"training.prompts_per_step={layout.world}")
    run = as_rehearsed(load_config(CONF, [f"student.source={layout.model}", *lengths, *words]))
    if layers == "fused":
        run.student.layers = "auto"
    sizes = dataclasses.replace(read_sizes(layout.model)[0], layers=layout.layers)
    content: dict[str, Any] = {**read_model_file(layout.model).content, "num_hidden_layers": layout.layers}
    plan = PlanConfig(gpus_per_node=8, workload=WorkloadConfig(layers=layers))
    case = Case(run, plan, sizes, layout.world // 8, device="cpu")
    if lengths:  # one question a replica
        case = case.replace({"training.prompts_per_step": case.layout.data})
    return case, content


def measure(layout: Layout, lengths: tuple[str, ...], layers: str = "plain") -> Row:
    """Rehearses one layout. The default process group must not exist.

    Args:
        layout: the run.
        lengths: settings of the lengths; without them those of the recipe.
        layers: `plain`, Megatron's local layers, or `fused`, those of Transformer Engine with emulated kernels.
    """
    from nemo_popsd.rehearsal.comparison import quantities, transfers
    from nemo_popsd.rehearsal.rank import rehearse

    case, content = case_of(layout, lengths, layers)
    begin = time.process_time()
    found = rehearse(case, content, layout.rank)
    ratios = {item.name: item.ratio for item in quantities(case, found)}
    for exact in ("weights", "gradients", "optimizer", "frozen copy", "checkpoint, shards"):
        assert abs(ratios.get(exact, 1.0) - 1) < 1e-3, (exact, ratios)
    assert [ratio for name, ratio in ratios.items() if name.endswith("for vLLM")] == [1.0], ratios
    moved = transfers(case, found)
    return Row(
        layout,
        time.process_time() - begin,
        ratios["frozen, peak"],
        ratios["training, peak"],
        ratios["frozen, work"],
        ratios["training, work"],
        tuple(f"{each.name}: {each.measured} of {each.planned}" for each in moved if not _equal(each.ratio)),
        len(moved),
    )


def _equal(ratio: float) -> bool:
    """Gradient buffers are padded to a multiple of their ranks, by less than a ten-thousandth."""
    return abs(ratio - 1) < 1e-4


def rows(layouts: tuple[Layout, ...], lengths: tuple[str, ...]) -> Iterator[Row]:
    """One after the other."""
    for layout in layouts:
        yield measure(layout, lengths)


def markdown(row: Row) -> str:
    """One line of the table."""
    layout = row.layout
    settings = " ".join(word.partition(".")[2] for word in layout.words) or "DP"
    name = f"{layout.model}, {layout.layers} layers, rank {layout.rank} of {layout.world}"
    numbers = (row.frozen_peak, row.training_peak, row.frozen_work, row.training_work)
    exact = f"{row.collectives - len(row.bytes_off)} of {row.collectives}"
    cells = (name, settings, *(f"{number:.3f}" for number in numbers), exact, f"{row.seconds:.0f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints a table."""
    chosen, lengths = (SIZES, ()) if sys.argv[1:] == ["sizes"] else (LAYOUTS, SHORT)
    print("| model | settings | frozen peak | training peak | frozen FLOPs | training FLOPs | bytes exact | s of CPU |")
    print("|---|---|---|---|---|---|---|---|")
    for layout in chosen:
        with contextlib.redirect_stdout(sys.stderr):
            row = measure(layout, lengths)
        print(markdown(row), flush=True)
        for line in row.bytes_off:
            print("  off:", line, file=sys.stderr)
    print(f"\nmost memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", file=sys.stderr)


if __name__ == "__main__":
    main()
