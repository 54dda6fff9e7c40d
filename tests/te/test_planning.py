"""`popsd plan`'s activations of Transformer Engine's layers against what its modules keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.planning import memory
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import Case
from tests.harness import TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.planning import cases
from tests.te.attention_backend import attention_in_use, use_unfused_attention
from tests.tiny_models import save_tiny_model

pytestmark = [on_transformer_engine, pytest.mark.slow]

DEPTHS = (2, 4)
KINDS = ("qwen3", "llama")  # with and without norms of queries and keys
PRECISIONS = ("bf16", "fp32")
ADAPTATIONS = ("full", "lora")


def _peaks(rank: int, world_size: int, models: Path, precision: str) -> dict[tuple[str, str, int], int]:
    """Most bytes of tensors alive during forward and backward; fp32 with the attention that a GPU has for it."""
    if precision == "fp32":
        use_unfused_attention()
    return {
        (kind, adaptation, depth): _peak(models / f"{kind}-{depth}", adaptation, precision)
        for kind in KINDS
        for adaptation in ADAPTATIONS
        for depth in DEPTHS
    }


def _peak(directory: Path, adaptation: str, precision: str) -> int:
    from nemo_popsd.megatron.forward import forward_backward, student_batches
    from nemo_popsd.megatron.microbatches import ContextSequence
    from nemo_popsd.rehearsal.counters import LiveBytes
    from tests.training.runs import start

    config = cases.run_config(adaptation=adaptation, precision=precision)
    run = start(directory, config)
    rows = cases.rows(config.training.prompts_per_step)
    sequences = [ContextSequence(row.contexts.student, [3] * cases.RESPONSE) for row in rows]
    batches = student_batches(run.student.chunks, sequences, config.training.microbatch_tokens, packed=True)
    assert len(batches) == 1

    def train() -> None:
        forward_backward(run.optimizer.chunks, batches, lambda _, hidden: (hidden.sum(), None))

    train()
    assert attention_in_use() == ("fused" if precision == "bf16" else "unfused")
    with LiveBytes() as live:
        train()
    return live.peak


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        for depth in DEPTHS:
            sizes = cases.MODEL | {"num_hidden_layers": depth} | ({"head_dim": 16} if kind == "llama" else {})
            save_tiny_model(folder / f"{kind}-{depth}", kind, **sizes)
    return folder


@pytest.fixture(scope="module", params=PRECISIONS)
def measured(models: Path, request: pytest.FixtureRequest) -> tuple[str, dict[tuple[str, str, int], int]]:
    precision = str(request.param)
    return precision, run_ranks(_peaks, 1, models, precision, layers=TRANSFORMER_ENGINE, timeout=300.0)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_a_layer_keeps_the_planned_activations(models: Path, measured: Any, kind: str, adaptation: str) -> None:
    """Two depths differ by what their layers keep."""
    precision, peaks = measured
    config = cases.run_config(adaptation=adaptation, precision=precision)
    case = Case(config, PlanConfig(gpus_per_node=1), read_sizes(str(models / f"{kind}-2"))[0], 1)
    assert not case.plain
    deep, shallow = (peaks[kind, adaptation, depth] for depth in reversed(DEPTHS))
    kept = (deep - shallow) / (DEPTHS[1] - DEPTHS[0]) / case.element / case.microbatch_tokens
    # The plan leaves out the statistics of norms and softmax, a few numbers for each token.
    assert kept == pytest.approx(memory.kept_by_layer(case).per_rank(case), rel=0.03)
