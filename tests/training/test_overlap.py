"""Communication that overlaps with compute: training is unchanged, and a missing wait is detected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.tiny_models import save_tiny_model
from tests.training.layouts import Settings, Variant, train
from tests.training.test_layouts import same_training

pytestmark = pytest.mark.slow

GRADIENTS = {"overlap_grad_reduce": True, "bucket_size": 3000}
WEIGHTS = {**GRADIENTS, "overlap_param_gather": True, "distributed": "auto"}
UPDATES = {"training": {"updates_per_step": 2}}
VARIANTS = {"full": Variant(), "lora": Variant(adaptation="lora", packing=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "qwen3", "qwen3", num_hidden_layers=4)
    save_tiny_model(folder / "qwen3_live", "qwen3", seed=1, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def one_update(folder: Path) -> dict[str, Any]:
    return run_ranks(train, 1, folder, {}, {}, VARIANTS)[0]


@pytest.fixture(scope="module")
def two_updates(folder: Path) -> dict[str, Any]:
    return run_ranks(train, 1, folder, {}, UPDATES, VARIANTS)[0]


TRANSFERS = {"pipeline": 2, "virtual_pipeline": 2, "overlap_transfers": True}


def test_transfers_that_end_when_awaited_change_nothing(folder: Path, one_update: dict[str, Any]) -> None:
    ranks = run_ranks(train, 2, folder, TRANSFERS, {}, VARIANTS, "slowest pipeline")
    for variant in VARIANTS:
        _compare(ranks, one_update, variant)


@pytest.mark.parametrize("fault", ["nobody waits for states", "nobody waits for gradients of states"])
def test_transfers_that_nobody_awaits_are_detected(folder: Path, one_update: dict[str, Any], fault: str) -> None:
    ranks = run_ranks(train, 2, folder, TRANSFERS, {}, {"full": VARIANTS["full"]}, fault)
    loss = one_update["full"]["metrics"][0].loss
    seen = ranks[0]["full"]["metrics"][0].loss
    assert (seen == pytest.approx(loss, rel=1e-6)) is (fault == "nobody waits for gradients of states")
    with pytest.raises(AssertionError):
        _compare(ranks, one_update, "full")


def _compare(ranks: list[dict[str, Any]], expected: dict[str, Any], variant: str) -> None:
    same_training([rank[variant] for rank in ranks], expected[variant])


@pytest.mark.parametrize("distributed", ["false", "auto"])
def test_reductions_that_end_when_awaited_change_nothing(
    folder: Path, one_update: dict[str, Any], distributed: str
) -> None:
    others: Settings = {"optimizer": {**GRADIENTS, "distributed": distributed}}
    ranks = run_ranks(train, 2, folder, {}, others, VARIANTS, "slowest network")
    for variant in VARIANTS:
        _compare(ranks, one_update, variant)


@pytest.mark.parametrize("distributed", ["false", "auto"])
def test_reductions_that_nobody_awaits_are_detected(folder: Path, one_update: dict[str, Any], distributed: str) -> None:
    others: Settings = {"optimizer": {**GRADIENTS, "distributed": distributed}}
    ranks = run_ranks(train, 2, folder, {}, others, VARIANTS, "nobody waits for gradients")
    for variant in VARIANTS:
        with pytest.raises(AssertionError):
            _compare(ranks, one_update, variant)


def test_a_rank_without_rows_takes_part_in_the_reductions(folder: Path, one_update: dict[str, Any]) -> None:
    """Its only micro-batch is empty: the loss does not use the output matrix, whose bucket the other ranks reduce."""
    others: Settings = {"optimizer": {**GRADIENTS, "distributed": "auto"}}
    variants = {"full": Variant(shares=((0, 1, 2, 3, 4, 5), ()))}
    ranks = run_ranks(train, 2, folder, {}, others, variants, timeout=100.0)
    _compare(ranks, one_update, "full")


@pytest.mark.parametrize("network", ["", "slowest network"])
def test_weights_gathered_by_the_next_update_are_those_of_one_process(
    folder: Path, two_updates: dict[str, Any], network: str
) -> None:
    ranks = run_ranks(train, 2, folder, {}, {"optimizer": WEIGHTS, **UPDATES}, VARIANTS, network)
    for variant in VARIANTS:
        _compare(ranks, two_updates, variant)


@pytest.mark.parametrize(
    "fault", ["nobody waits for weights", "output matrix not awaited", "last weights not gathered"]
)
def test_weights_that_nobody_awaits_are_detected(folder: Path, two_updates: dict[str, Any], fault: str) -> None:
    full = {"full": VARIANTS["full"]}  # with LoRA the output matrix is frozen
    ranks = run_ranks(train, 2, folder, {}, {"optimizer": WEIGHTS, **UPDATES}, full, fault)
    with pytest.raises(AssertionError):
        _compare(ranks, two_updates, "full")
