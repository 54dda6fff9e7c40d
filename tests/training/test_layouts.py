"""Every layout yields the same training: loss, the gradient of every parameter, the weights after two steps.

The reference is one process with padded micro-batches, which `test_objective` compares with the paper's equations on
dense models. Packed runs are also compared with this reference, so packing equals padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import LOCAL, TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.tiny_models import save_tiny_model
from tests.training.layouts import Settings, Variant, deviations, train

GRADIENT_TOLERANCE = 2e-5
"""Relative to the largest entry of the same gradient. Layouts sum in different orders in fp32, which causes 1e-7 per
sum; up to 4e-6 was measured through four layers and a softmax. A wrong gradient has an error of its own magnitude.
"""
WEIGHT_TOLERANCE = 1e-4
"""Relative to the largest entry of the same weight, after two steps of Adam at 1e-2; up to 2e-5 was measured."""

DENSE = ("linear_qkv", "linear_proj")
VARIANTS = {
    "full, padded": Variant(),
    "full, packed": Variant(packing=True),
    "lora, padded": Variant(adaptation="lora"),
    "lora, packed": Variant(adaptation="lora", packing=True),
    # Token weights and gates; the layout determines the rank that owns a token and its weight.
    "weighted, padded": Variant(weighted=True),
    "weighted, packed": Variant(weighted=True, packing=True),
    # Teachers that follow the student; each rank has their shards.
    "moving, full, padded": Variant(moving=True),
    "moving, full, packed": Variant(moving=True, packing=True),
    "moving, lora, padded": Variant(moving=True, adaptation="lora"),
    "moving, lora, packed": Variant(moving=True, adaptation="lora", packing=True),
    # Transformer Engine gathers and exchanges heads in multiples of eight.
    "wide heads, padded": Variant(kind="qwen3_wide"),
    "wide heads, packed": Variant(kind="qwen3_wide", packing=True),
    "wide heads, lora, padded": Variant(kind="qwen3_wide", adaptation="lora"),
    "wide heads, lora, packed": Variant(kind="qwen3_wide", adaptation="lora", packing=True),
    # Three of four layers attend within five tokens.
    "windows, padded": Variant(kind="olmo3"),
    # Output matrix and embedding are one parameter, with a copy on the last stage of a pipeline.
    "tied, padded": Variant(kind="qwen3_tied"),
    "tied, packed": Variant(kind="qwen3_tied", packing=True),
    # Four experts, two per token.
    "experts, padded": Variant(kind="qwen3_moe"),
    "experts, packed": Variant(kind="qwen3_moe", packing=True),
    "experts, lora, padded": Variant(kind="qwen3_moe", adaptation="lora"),
    "experts, dense lora, padded": Variant(kind="qwen3_moe", adaptation="lora", targets=DENSE),
    "experts, dense lora, packed": Variant(kind="qwen3_moe", adaptation="lora", targets=DENSE, packing=True),
}
SELECTIVE = {"student": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}}
SELECTIVE_EXPERTS = {"student": {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]}}
BLOCK = {"student": {"recompute": "full", "recompute_method": "block", "recompute_layers": 1}}
UNITS = {"student": {"recompute": "full", "recompute_layers": 2}}
FIELDS = {
    "megatron": {
        "model": {"moe_router_dtype": "fp64"},
        "ddp": {"pad_buckets_for_high_nccl_busbw": "true"},
        "optimizer": {"log_num_zeros_in_grad": "true"},
    }
}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 3000}
LAYOUTS: dict[str, tuple[int, dict[str, Any], Settings]] = {
    "one": (1, {}, {}),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2 sp": (2, {"tensor": 2, "sequence": "true"}, {}),
    "pp2": (2, {"pipeline": 2}, {}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "cp2": (2, {"context": 2}, {}),
    "cp2 all_gather": (2, {"context": 2, "context_type": "all_gather"}, {}),
    "cp2 a2a": (2, {"context": 2, "context_type": "a2a"}, {}),
    "dp2": (2, {}, {}),
    "dp2 distributed": (2, {}, {"optimizer": {"distributed": "auto"}}),
    "dp2 overlap": (2, {}, {"optimizer": OVERLAP}),
    "dp2 distributed overlap": (2, {}, {"optimizer": {"distributed": "auto", **OVERLAP}}),
    "one, selective recomputation": (1, {}, SELECTIVE),
    "tp2 sp, selective recomputation": (2, {"tensor": 2, "sequence": "true"}, SELECTIVE),
    "one, recomputation in units": (1, {}, UNITS),
    "one, recomputation of a block": (1, {}, BLOCK),
    "pp2 uneven": (2, {"pipeline": 2, "last_stage_layers": 1}, {}),
    "pp2 vpp2 overlapped transfers": (2, {"pipeline": 2, "virtual_pipeline": 2, "overlap_transfers": True}, {}),
    "tp2 sp dp2 distributed": (4, {"tensor": 2, "sequence": "true"}, {"optimizer": {"distributed": "auto"}}),
    "pp2 vpp2 dp2 distributed overlap": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2},
        {"optimizer": {"distributed": "auto", **OVERLAP}},
    ),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}, {}),
    "tp2 cp2": (4, {"tensor": 2, "context": 2}, {}),
    "tp2 sp cp2": (4, {"tensor": 2, "sequence": "true", "context": 2}, {}),
    "experts: tp2 sp": (2, {"tensor": 2, "sequence": "true"}, {}),
    "experts: ep2": (2, {"expert": 2}, {}),
    "experts: ep2, fields of Megatron": (2, {"expert": 2}, FIELDS),
    "experts: ep2 overlap, selective recomputation": (
        2,
        {"expert": 2},
        {"optimizer": {"distributed": "auto", **OVERLAP}, **SELECTIVE_EXPERTS},
    ),
    "experts: tp2 sp ep2": (2, {"tensor": 2, "sequence": "true", "expert": 2}, {}),
    "experts: tp2 sp ep2 etp2": (4, {"tensor": 2, "sequence": "true", "expert": 2, "expert_tensor": 2}, {}),
    "cp4 a2a+p2p": (4, {"context": 4, "context_type": "a2a+p2p", "context_sizes": [2, 2]}, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("qwen3", "qwen3_tied", "qwen3_moe", "olmo3"):
        save_tiny_model(folder / kind, kind, num_hidden_layers=4)
        save_tiny_model(folder / f"{kind}_live", kind, seed=1, num_hidden_layers=4)
    save_tiny_model(folder / "qwen3_wide", num_hidden_layers=4, head_dim=16)
    save_tiny_model(folder / "qwen3_wide_live", seed=1, num_hidden_layers=4, head_dim=16)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    padded = {name: variant for name, variant in VARIANTS.items() if not variant.packing}
    return run_ranks(train, 1, folder, {}, {}, padded, timeout=300.0)[0]


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Cache of results by layout and kind of layers, so that each runs once."""
    return {}


FUSED_ALONE = ("cp2 all_gather", "cp2 a2a", "cp4 a2a+p2p")
"""Layouts that only TE layers have; local layers always gather keys and values with context parallelism."""
SOME = ("tp2 sp", "pp2 vpp2", "cp2", "dp2 distributed")
"""Layouts with token weights and moving teachers: one for each kind of parallelism."""
ADAPTED = ("experts: tp2 sp ep2", "experts: tp2 sp ep2 etp2")
"""Layouts in which a mixture of experts has adapters."""
SINGLE = ("one", "tp2", "pp2", "dp2", "experts: tp2 sp", "experts: ep2", *SOME)
"""Layouts with at most one kind of parallelism. The others combine several or add an option."""


def variants_of(layout: str, layers: str) -> dict[str, Variant]:
    """The variants to train in `layout` on `layers`.

    Dense models, with tied embeddings only in pipelines and with wide heads or windows in `FUSED_ALONE`; or mixtures of
    experts. Weighted and moving variants in `SOME`. Transformer Engine gathers keys and values, and combines exchange
    and ring, only for padded sequences; its ring does not support windows. Adapters of experts require whole experts of
    local layers.

    In a layout that is not in `SINGLE`, each variant runs on one kind of layers: full fine-tuning is packed on one kind
    and padded on the other, and vice versa for LoRA.
    """
    if layout in FUSED_ALONE and layers == LOCAL:
        return {}
    experts = layout.startswith("experts")
    kinds = {"qwen3_moe"} if experts else {"qwen3", "qwen3_tied"} if "pp" in layout else {"qwen3"}
    kinds = {"qwen3_wide", "olmo3"} if layout in FUSED_ALONE else kinds
    kinds -= {"olmo3"} if "p2p" in layout else set()
    half = [*LAYOUTS].index(layout) + (layers == TRANSFORMER_ENGINE)
    return {
        name: variant
        for name, variant in VARIANTS.items()
        if variant.kind in kinds
        and (not (variant.weighted or variant.moving) or (layout in SOME and variant.packing))
        and (variant.kind != "qwen3_moe" or variant.adaptation == "full" or layout in ADAPTED)
        and (name != "experts, lora, padded" or (layers == LOCAL and "etp" not in layout))
        and not (variant.packing and layout in ("cp2 all_gather", "cp4 a2a+p2p"))
        and (
            layout in (*SINGLE, *FUSED_ALONE)
            or name == "experts, lora, padded"
            or (half + variant.packing + (variant.adaptation == "lora")) % 2 == 0
        )
    }


CASES = [
    pytest.param(layout, variant, layers, marks=[on_transformer_engine] if layers == TRANSFORMER_ENGINE else [])
    for layers in (LOCAL, TRANSFORMER_ENGINE)
    for layout in LAYOUTS
    for variant in variants_of(layout, layers)
]


def seen_in(layout: str, layers: str, folder: Path, runs: dict[tuple[str, str], Any]) -> list[dict[str, Any]]:
    key = layout, layers
    if key not in runs:
        world_size, parallel, others = LAYOUTS[layout]
        arguments = world_size, folder, parallel, others, variants_of(layout, layers)
        runs[key] = run_ranks(train, *arguments, timeout=300.0, layers=layers)
    return runs[key]


def logged(seen: dict[str, Any]) -> list[dict[str, float]]:
    return [metrics.as_dict() for metrics in seen["metrics"]]


def same_training(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Every rank has the metrics of the complete step, and its part of the model matches `expected`."""
    seen: set[str] = set()
    for rank in ranks:
        for measured, wanted in zip(logged(rank), logged(expected), strict=True):
            for name in ("loss", "forward_kl", "reverse_kl", "student_entropy", "target_entropy", "grad_norm"):
                assert measured[f"train/{name}"] == pytest.approx(wanted[f"train/{name}"], rel=2e-5), name
            for name in ("norm_ratio", "cosine_question", "cosine_reference"):
                assert measured[f"train/{name}"] == pytest.approx(wanted[f"train/{name}"], rel=1e-4, abs=1e-5), name
            exact = ("response_tokens", "cut_share", "marker_rate", "learning_rate", "weighted_share")
            for name in (*exact, *({"accuracy"} if "train/accuracy" in wanted else ())):
                assert measured[f"train/{name}"] == pytest.approx(wanted[f"train/{name}"], rel=1e-12), name
        for what, tolerance in (("gradients", GRADIENT_TOLERANCE), ("weights", WEIGHT_TOLERANCE)):
            errors = dict(deviations(rank[what], expected[what]))
            assert {name: error for name, error in errors.items() if not error < tolerance} == {}, what
        seen |= rank["gradients"].keys()
    assert seen >= expected["gradients"].keys(), "every parameter is on some rank"


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "variant", "layers"), CASES)
def test_every_layout_gives_the_same_training(
    layout: str, variant: str, layers: str, folder: Path, reference: dict[str, Any], runs: dict[tuple[str, str], Any]
) -> None:
    expected = reference[variant.replace("packed", "padded")]
    assert expected["metrics"][0].loss > 0.01
    assert (0.2 < expected["metrics"][0].weighted_share < 0.8) is VARIANTS[variant].weighted
    same_training([rank[variant] for rank in seen_in(layout, layers, folder, runs)], expected)


SIBLINGS = {adaptation: Variant(adaptation=adaptation, siblings=True) for adaptation in ("full", "lora")}


@pytest.fixture(scope="module")
def of_siblings(folder: Path) -> dict[str, Any]:
    return run_ranks(train, 1, folder, {}, {}, SIBLINGS)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("one", LOCAL),
        ("tp2 sp", LOCAL),
        pytest.param("tp2 sp", TRANSFORMER_ENGINE, marks=on_transformer_engine),
        ("pp2 vpp2", LOCAL),
        pytest.param("pp2 vpp2", TRANSFORMER_ENGINE, marks=on_transformer_engine),
        ("dp2", LOCAL),
        pytest.param("dp2", TRANSFORMER_ENGINE, marks=on_transformer_engine),
        ("cp2", LOCAL),
    ],
)
def test_shared_prefixes_give_the_same_training(
    layout: str, layers: str, folder: Path, of_siblings: dict[str, Any]
) -> None:
    """Context parallelism computes each sequence separately."""
    world_size, parallel, others = LAYOUTS[layout]
    shared = {name: replace(variant, shared=True, packing=True) for name, variant in SIBLINGS.items()}
    ranks = run_ranks(train, world_size, folder, parallel, others, shared, layers=layers)
    for name in SIBLINGS:
        same_training([rank[name] for rank in ranks], of_siblings[name])


SHARES = {
    "one long row against five": ((3,), (0, 1, 2, 4, 5)),
    "one rank empty": ((0, 1, 2, 3, 4, 5), ()),
    "the other rank empty": ((), (0, 1, 2, 3, 4, 5)),
}


@pytest.mark.slow
def test_unequal_shares_and_an_empty_rank_train_like_one_process(folder: Path, reference: dict[str, Any]) -> None:
    variants = {
        f"{name}, {adaptation}": Variant(adaptation=adaptation, packing=adaptation == "full", shares=shares)
        for name, shares in SHARES.items()
        for adaptation in ("full", "lora")
    }
    ranks = run_ranks(train, 2, folder, {}, {}, variants)
    for name, variant in variants.items():
        same_training([rank[name] for rank in ranks], reference[f"{variant.adaptation}, padded"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "layout", "variant", "layers"),
    [
        ("gather that sums", "tp2 sp", "full, padded", LOCAL),
        ("gather that sums", "tp2 sp", "lora, packed", LOCAL),
        ("exchange that stays", "cp2", "full, packed", LOCAL),
        ("exchange that stays", "cp2", "lora, padded", LOCAL),
        ("mean over context", "cp2", "lora, padded", LOCAL),
        ("embedding of one stage", "pp2", "tied, padded", LOCAL),
        pytest.param(
            *("norm output without gradient", "tp2 sp", "lora, packed", TRANSFORMER_ENGINE),
            marks=on_transformer_engine,
        ),
    ],
)
def test_planted_faults_that_the_loss_does_not_show_are_detected(
    folder: Path, reference: dict[str, Any], fault: str, layout: str, variant: str, layers: str
) -> None:
    world_size, parallel, others = LAYOUTS[layout]
    chosen = {variant: VARIANTS[variant]}
    ranks = run_ranks(train, world_size, folder, parallel, others, chosen, fault, layers=layers)
    expected = reference[variant.replace("packed", "padded")]
    assert ranks[0][variant]["metrics"][0].loss == pytest.approx(expected["metrics"][0].loss, rel=1e-6)
    errors = [dict(deviations(rank[variant]["gradients"], expected["gradients"])) for rank in ranks]
    assert max(max(of_rank.values()) for of_rank in errors) > 0.05
    with pytest.raises(AssertionError):
        same_training([rank[variant] for rank in ranks], expected)


def test_a_missing_scale_is_refused_where_the_loss_adds_the_matrix_gradient(folder: Path) -> None:
    """Full fine-tuning: the loss receives the factor of the backward pass, and backward refuses a different factor."""
    world_size, parallel, others = LAYOUTS["cp2"]
    chosen = {"full, padded": VARIANTS["full, padded"]}
    with pytest.raises(AssertionError, match=r"main_gradient\.upstream"):
        run_ranks(train, world_size, folder, parallel, others, chosen, "mean over context")
