"""`nemo_popsd.compat.megatron_core` on the installed version; files between versions: commands/test_other_stack.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.parallel.config import ParallelConfig
from tests.harness import run_ranks


def _save(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor, load

    from nemo_popsd.compat.megatron_core import stage_save
    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(), seed=3)
    value = torch.arange(6.0).reshape(2, 3) + 10 * rank
    shard = ShardedTensor.from_rank_offsets("weight", value.clone(), (0, rank, world_size))
    request = stage_save({"weight": shard}, folder)
    request.execute_sync()
    empty = ShardedTensor.from_rank_offsets("weight", torch.zeros(2, 3), (0, rank, world_size))
    loaded = load({"weight": empty}, str(folder))
    return {"equal": torch.equal(loaded["weight"], value), "keys": sorted(loaded)}


@pytest.mark.slow
def test_a_staged_save_has_the_files_that_both_versions_read_and_no_pickled_state(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    results = run_ranks(_save, 2, folder)
    assert results == [{"equal": True, "keys": ["weight"]}] * 2
    assert torch.load(folder / "common.pt", weights_only=True) == {}
    assert json.loads((folder / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert b"common_state" not in (folder / ".metadata").read_bytes()
