"""Ranks with the same weights share the writing and the reading of a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.checkpoint.shares import Share, summary
from nemo_popsd.errors import UserError
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model


def _round_trip(rank: int, world_size: int, source: Path, folder: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Writes random weights, loads them into others, and what this rank wrote and read for it."""
    import torch.distributed as dist

    from nemo_popsd.checkpoint import weights

    student = build_student(source, parallel=parallel)
    parameters = [parameter for chunk in student.chunks for parameter in chunk.parameters()]
    folder.mkdir(exist_ok=True)
    dist.barrier()
    staged = weights.StagedWeights(student.chunks, folder, which=weights.every_parameter, copy=False)
    staged.write()
    staged.finish()
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.detach().fill_(torch.nan)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    weights.logger.addHandler(handler)
    weights.logger.setLevel(logging.INFO)
    weights.load_weights(student.chunks, folder)
    equal = all(p.equal(before) for p, before in zip(parameters, kept, strict=True))

    dist.barrier()
    if rank == 1:
        for path in staged.files:
            path.write_bytes(path.read_bytes()[:64])
    dist.barrier()
    with pytest.raises(UserError, match="an unreadable distributed checkpoint"):
        weights.load_weights(student.chunks, folder)
    return {
        "equal": equal,
        "written": staged.bytes,
        "files": [path.name for path in staged.files],
        "whole": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "log": records[0],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "parallel"),
    [
        ("qwen3", 2, {}),
        ("qwen3_moe", 4, {"expert": 2}),
        ("qwen3_moe", 4, {"tensor": 2, "sequence": "true", "expert": 2}),
        ("qwen3_moe", 4, {"tensor": 2, "sequence": "true", "expert": 2, "expert_tensor": 2}),
    ],
    ids=["dp2", "dp4 ep2", "tp2 sp dp2 ep2", "tp2 sp dp2 ep2 etp2"],
)
def test_each_rank_writes_and_reads_its_part(kind: str, ranks: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", kind, vocab_size=64)
    results = run_ranks(_round_trip, ranks, tmp_path / "source", tmp_path / "weights", parallel)
    assert all(result["equal"] for result in results)
    written = [result["written"] for result in results]
    if not parallel:
        assert sum(written) == results[0]["whole"]
    assert min(written) > 0.5 * max(written)
    files = [name for result in results for name in result["files"]]
    assert sorted(files) == sorted(path.name for path in (tmp_path / "weights").glob("*.distcp"))
    [log] = {result["log"] for result in results}
    assert f"by {ranks} of {ranks} ranks" in log
    if "tensor" not in parallel:  # what tensor-parallel ranks have in common, each of them reads
        assert log.split(": ")[1].startswith(f"{summary([Share(sum(written))]).split(';')[0]} by "), "once"


def test_a_summary_names_the_extremes() -> None:
    shares = [Share(0, {"written": 1.0}), Share(3_000_000_000, {"written": 2.0}), Share(1_500_000, {"written": 6.0})]
    assert summary(shares) == "3.0 GB by 2 of 3 ranks, 1.5 MB to 3.0 GB each; written in 3.0 s, rank 2 in 6.0 s"
    assert summary([Share(10, {"read": 0.25, "hashed": 1.0})]) == "0.0 kB; read in 0.2 s, hashed in 1.0 s"
    share = Share()
    with share.timed("read"):
        pass
    with pytest.raises(ZeroDivisionError), share.timed("read"):
        1 / 0  # noqa: B018
    assert share.seconds["read"] > 0
