"""docs/support.md names the tests of each layout and architecture; `python -m tests.test_support` writes its tables."""

from __future__ import annotations

import contextlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import test_layouts as checkpoint_layouts
from tests.harness import LOCAL, TRANSFORMER_ENGINE
from tests.rollout import test_layouts as rollout_layouts
from tests.tiny_models import KINDS
from tests.training import test_layouts as training_layouts

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
GPU = "not run yet"

TRAINING = "training/test_layouts.py::test_every_layout_gives_the_same_training"
ROLLOUTS = "rollout/test_layouts.py::test_responses_are_those_of_one_process"
ROLLOUTS_OF_EXPERTS = "rollout/test_layouts.py::test_experts_on_several_ranks_generate_the_same_as_one_process"
CHECKPOINTS = (
    "checkpoint/test_layouts.py::test_one_process_and_the_layout_export_equal_weights_from_a_checkpoint_of_the_layout"
)
BY_ARCHITECTURE = {
    "conversion": "checkpoint/test_conversion.py::"
    "test_tensors_are_bit_equal_after_a_conversion_and_saves_of_any_layout",
    "conversion by TE layers": "checkpoint/test_conversion.py::test_te_layers_load_and_save_the_same_tensors",
    "logits": "te/test_layers.py::test_logits_are_those_of_transformers",
    "both forms of config.json": "checkpoint/test_rotary_embedding.py::"
    "test_both_forms_of_the_rotary_embedding_give_bit_equal_logits_that_agree_with_transformers",
    "gradients": "megatron/test_forward.py::test_gradients_of_every_parameter_equal_the_dense_ones",
    "gradients of OLMo-3": "megatron/test_olmo3.py::test_gradients_equal_those_of_transformers",
    "LoRA": "megatron/test_adapters.py::test_gradients_of_the_adapters_equal_the_dense_ones",
    "PEFT adapter": "checkpoint/test_peft_adapter.py::test_peft_on_the_original_model_gives_the_logits_of_the_student",
    "decoding": "megatron/test_decoding.py::test_decoding_equals_full_recomputation",
    "layouts": TRAINING,
}
NOT_BY_KIND = {
    "both forms of config.json": ("qwen3", "llama3", "olmo3", "smollm3", "mistral"),
    "gradients of OLMo-3": ("olmo3",),
}
"""Architectures of tests without a parameter for the architecture."""
BY_PROPERTY = {
    "bf16: losses, gradients, weights": ["te/test_bf16.py::test_training_in_bf16_is_close_to_fp32"],
    "optimizer, bf16 weights": ["megatron/test_optimizer.py::test_bf16_weights_follow_main_weights_in_fp32"],
    "guard against NaN": ["training/test_guard.py::test_nan_in_one_ranks_row_stops_every_rank_and_names_it"],
    "self-check at the start": ["training/test_self_check.py::test_zero_at_the_start_and_an_explanation_otherwise"],
    "killed and resumed": [
        "commands/test_resume.py::test_a_killed_run_ends_with_the_same_bits",
        "te/test_resume.py::test_a_killed_run_ends_with_the_same_bits_and_can_continue_on_local_layers",
    ],
    "optimizer state in another layout": [
        "checkpoint/test_training_state.py::test_state_that_another_layout_wrote_is_bit_equal"
    ],
    "diagnosis": ["diagnosis/test_run.py::test_two_ranks_give_the_figures_of_one"],
    "real sizes, without memory": [
        "megatron/test_real_sizes.py::test_names_shapes_counts_and_shards_are_those_of_transformers"
    ],
    "planned activations": [
        "planning/test_measured.py::test_activations_and_the_loss_take_the_planned_bytes",
        "te/test_planning.py::test_a_layer_keeps_the_planned_activations",
    ],
}


class Collected:
    """Parameters of every case of each test, by file and function."""

    def __init__(self) -> None:
        self.cases: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def pytest_itemcollected(self, item: Any) -> None:
        """Called by pytest."""
        test = f"{Path(item.path).relative_to(ROOT / 'tests')}::{item.originalname}"
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        self.cases[test].append({"layers": _layers(test, parameters), **parameters})


def _layers(test: str, parameters: dict[str, Any]) -> str:
    """Layers of a case without a parameter `layers`."""
    if test.startswith("te/"):
        return LOCAL if parameters.get("run") == LOCAL else TRANSFORMER_ENGINE
    return TRANSFORMER_ENGINE if test == BY_ARCHITECTURE["conversion by TE layers"] else LOCAL


def collected() -> dict[str, list[dict[str, Any]]]:
    """The test cases that pytest collects in this process; see `Collected`."""
    tests = [TRAINING, ROLLOUTS, ROLLOUTS_OF_EXPERTS, CHECKPOINTS, *BY_ARCHITECTURE.values()]
    tests += [test for several in BY_PROPERTY.values() for test in several]
    plugin = Collected()
    paths = sorted({str(ROOT / "tests" / test.split("::")[0]) for test in tests})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *paths], plugins=[plugin])
    assert status == 0, printed.getvalue()
    assert set(tests) <= plugin.cases.keys(), set(tests) - plugin.cases.keys()
    return plugin.cases


def _cell(tests: Iterable[str]) -> str:
    files = dict.fromkeys(test.split("::")[0] for test in tests)
    return ", ".join(f"`{file}`" for file in files) or "not tested"


def _table(head: str, rows: Iterable[tuple[str, Callable[[str], Iterable[str]]]]) -> str:
    lines = [f"| {head} | local layers | TE layers, emulated kernels | GPU |", "|---|---|---|---|"]
    for name, tests in rows:
        lines.append(f"| {name} | {_cell(tests(LOCAL))} | {_cell(tests(TRANSFORMER_ENGINE))} | {GPU} |")
    return "\n".join(lines) + "\n"


def _layouts(cases: dict[str, list[dict[str, Any]]]) -> str:
    parallel = {name: layout[1] for name, layout in training_layouts.LAYOUTS.items()}
    others = (
        (ROLLOUTS, {name: layout[1] for name, layout in rollout_layouts.LAYOUTS.items()}, False),
        (ROLLOUTS_OF_EXPERTS, {name: layout[1] for name, layout in rollout_layouts.EXPERTS.items()}, True),
        (CHECKPOINTS, checkpoint_layouts.LAYOUTS, False),
    )

    def row(layout: str) -> tuple[str, Callable[[str], Iterable[str]]]:
        variants = {layers: training_layouts.variants_of(layout, layers) for layers in (LOCAL, TRANSFORMER_ENGINE)}
        models = "experts" if layout.startswith("experts") else "dense and tied" if "pp" in layout else "dense"
        distinct = [variant for of_layers in variants.values() for variant in of_layers.values()]
        adaptations = " and ".join(sorted({variant.adaptation for variant in distinct}))

        def tests(layers: str) -> Iterable[str]:
            ran = {case["variant"] for case in cases[TRAINING] if (case["layout"], case["layers"]) == (layout, layers)}
            assert ran in (set(), set(variants[layers])), (layout, layers)
            if ran:
                yield TRAINING
            for test, layouts, experts in others:
                if layout.startswith("experts") == experts and not training_layouts.LAYOUTS[layout][2]:
                    here = [case["layout"] for case in cases[test] if case["layers"] == layers]
                    if any(layouts[name] == parallel[layout] for name in here):
                        yield test

        packings = " and ".join(sorted({"packed" if variant.packing else "padded" for variant in distinct}))
        return f"`{layout}`: {models}; {adaptations}; {packings}", tests

    return _table("layout", map(row, dict.fromkeys(case["layout"] for case in cases[TRAINING])))


def _architectures(cases: dict[str, list[dict[str, Any]]]) -> str:
    def kinds(label: str, layers: str) -> set[str]:
        of_layers = [case for case in cases[BY_ARCHITECTURE[label]] if case["layers"] == layers]
        if label in NOT_BY_KIND:
            return set(NOT_BY_KIND[label]) if of_layers else set()
        if label == "layouts":
            return {training_layouts.VARIANTS[case["variant"]].kind for case in of_layers}
        return {case["kind"] for case in of_layers}

    def tests(kind: str) -> Callable[[str], Iterable[str]]:
        return lambda layers: (test for label, test in BY_ARCHITECTURE.items() if kind in kinds(label, layers))

    return _table("architecture", [(f"`{kind}`", tests(kind)) for kind in (*KINDS, "qwen3_moe", "mistral")])


def _properties(cases: dict[str, list[dict[str, Any]]]) -> str:
    def tests(several: list[str]) -> Callable[[str], Iterable[str]]:
        return lambda layers: (test for test in several if any(case["layers"] == layers for case in cases[test]))

    return _table("property", [(name, tests(several)) for name, several in BY_PROPERTY.items()])


def rewritten(page: str, cases: dict[str, list[dict[str, Any]]]) -> str:
    """`page` with the tables generated from the tests."""
    tables = {"layout": _layouts(cases), "architecture": _architectures(cases), "property": _properties(cases)}
    for head, table in tables.items():
        page, count = re.subn(rf"\| {head} \|.*\n(\|.*\n)+", lambda _, table=table: table, page)
        assert count == 1, f"{PAGE.name} has {count} tables of each {head}"
    return page


def test_the_tables_match_the_tests() -> None:
    page = PAGE.read_text()
    assert rewritten(page, collected()) == page, "run python -m tests.test_support"
    assert "not tested | not tested" not in page


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)(?:::(\w+))?`", PAGE.read_text())
    assert len(named) > 40
    for file, function in named:
        path = ROOT / file if file.startswith(("nemo_popsd/", "tests/")) else ROOT / "tests" / file
        assert path.is_file(), file
        assert not function or f"def {function}(" in path.read_text(), function


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(), collected()))
