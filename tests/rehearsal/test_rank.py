"""A rehearsed step against the same step on real tensors, and against the plan at a real model's widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks
from tests.planning import cases
from tests.tiny_models import save_tiny_model


def _real(rank: int, world_size: int, directory: Path, config: Any) -> dict[str, Any]:
    from nemo_popsd.model.training import build_weights
    from nemo_popsd.rehearsal.counters import Meter, MeteredStopwatch
    from nemo_popsd.rehearsal.rank import UNREAD, LongestRollouts
    from nemo_popsd.training.step import OnPolicyStep
    from tests.training.runs import start

    run = start(directory, config)
    meter = Meter()
    step = OnPolicyStep(
        config.training,
        config.distillation,
        run.student,
        LongestRollouts(cases.planned(directory, config, ranks=1).limits),
        UNREAD,
        build_weights(config.distillation, run.student),
        stopwatch=lambda: MeteredStopwatch(meter),
    )
    run.optimizer.zero_grad()
    run.optimizer.prepare()
    run.update()  # creates the optimizer's state
    with meter.measuring():
        step(2, cases.rows(cases.ROWS), run.optimizer, run.update)
    return dict(meter.phases)


def _rehearsed(rank: int, world_size: int, case: Any, content: dict[str, Any], which: int) -> Any:
    from nemo_popsd.rehearsal.rank import rehearse

    dist.destroy_process_group()
    found = rehearse(case, content, which)
    assert not dist.is_initialized()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", "lora, recompute"])
def test_a_rehearsed_step_takes_what_the_real_one_takes(tmp_path: Path, variant: str) -> None:
    from nemo_popsd.planning.sizes import read_model_file

    directory = save_tiny_model(tmp_path / "model", "qwen3", num_hidden_layers=3, **cases.MODEL)
    config = cases.run_config(**cases.VARIANTS[variant])
    config.student.layers, config.distillation.fused = "local", "never"
    config.training.microbatch_tokens = 2 * (cases.PROMPT + cases.RESPONSE)
    [real] = run_ranks(_real, 1, directory, config)
    case = cases.planned(directory, config, ranks=1)
    [rehearsed] = run_ranks(_rehearsed, 1, case, dict(read_model_file(str(directory)).content), 0)
    for phase in ("frozen", "train"):
        one, other = real[phase], rehearsed.phases[phase]
        assert one.flops == other.flops > 0
        assert one.calls == other.calls
        # The rehearsal's peak has what exists between steps.
        assert other.peak - rehearsed.standing == pytest.approx(one.peak, rel=0.05)


def test_peers_are_copies_of_this_rank() -> None:
    from nemo_popsd.rehearsal.peers import one_rank

    with one_rank(5, 512):
        group = dist.new_group([4, 5, 6, 7], group_desc="four")
        assert (dist.get_world_size(), dist.get_rank(), group.size(), group.rank()) == (512, 5, 4, 1)
        assert group.group_desc == "four"
        gathered: list[Any] = [None] * 4
        dist.all_gather_object(gathered, {"a": 1}, group=group)
        assert gathered == [{"a": 1}] * 4
        summand = torch.ones(2)
        dist.all_reduce(summand, group=group)
        assert summand.tolist() == [1.0, 1.0]
    assert not dist.is_initialized()
