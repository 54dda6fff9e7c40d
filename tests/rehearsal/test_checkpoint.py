"""Compares a rehearsed rank with the real rank: files of its checkpoint and weights for vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.harness import run_ranks
from tests.planning import cases
from tests.tiny_models import save_tiny_model

RANKS = 4


def _real(rank: int, world_size: int, directory: Path, folder: Path, config: Any) -> dict[str, Any]:
    """Files, and bytes of a save; tensors and bytes of all weights."""
    from nemo_popsd.checkpoint.contents import STATE, WEIGHTS
    from nemo_popsd.checkpoint.training_state import StagedState
    from nemo_popsd.checkpoint.weights import StagedWeights, adapter_parameters, every_parameter
    from tests.training.runs import start

    run = start(directory, config)
    which = adapter_parameters if config.student.adaptation == "lora" else every_parameter
    if rank == 0:
        for name in (WEIGHTS, STATE):
            (folder / name).mkdir(parents=True)
    dist.barrier()
    models, optimizer = run.student.chunks, run.optimizer.megatron
    weights = StagedWeights(models, folder / WEIGHTS, which=which, copy=False)
    state = StagedState(models, optimizer, folder, random_state={})
    files = [path.relative_to(folder).as_posix() for path in [*weights.files, *state.files]]
    streamed = [tensor.numel() * tensor.element_size() for _, tensor in run.architecture.stream(models)]
    return {
        "files": tuple(name for name in files if "random" not in name),
        "written": weights.bytes + state.bytes,
        "tensors": len(streamed),
        "bytes": sum(streamed),
    }


def _rehearsed(rank: int, world_size: int, case: Any, content: dict[str, Any]) -> list[Any]:
    from nemo_popsd.rehearsal import storage_free
    from nemo_popsd.rehearsal.rank import rehearse

    storage_free._LARGE = 1 << 12  # Megatron's buffers of a small model have no memory either
    dist.destroy_process_group()
    return [rehearse(case, content, which) for which in range(RANKS)]


@pytest.mark.slow
def test_a_rehearsed_rank_writes_and_sends_what_the_real_one_does(tmp_path: Path) -> None:
    """Experts over two of four ranks: the four share the other weights, two each an expert."""
    from nemo_popsd.planning.sizes import read_model_file

    directory = save_tiny_model(tmp_path / "model", "qwen3_moe", hidden_size=64, moe_intermediate_size=160)
    config = cases.run_config(adaptation="full", distributed=True)
    config.student.layers, config.distillation.fused = "local", "never"
    config.parallel.expert = 2
    real = run_ranks(_real, RANKS, directory, tmp_path / "saved", config)
    case = cases.planned(directory, config, ranks=RANKS)
    [rehearsed] = run_ranks(_rehearsed, 1, case, dict(read_model_file(str(directory)).content))
    for one, other in zip(real, rehearsed, strict=True):
        assert other.checkpoint.files == one["files"]
        assert other.checkpoint.written == one["written"] > 0
        assert (other.handover.tensors, other.handover.bytes) == (one["tensors"], one["bytes"])
        assert not other.handover.adapters
