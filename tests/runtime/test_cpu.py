"""Megatron without CUDA: every adaptation is applied, needed by the functions it names, and has no other effect."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.runtime import cpu, local_layers
from nemo_popsd.runtime.adaptation import MEGATRON_CORE, Adaptation
from nemo_popsd.runtime.cpu import ADAPTATIONS, adapt_megatron
from nemo_popsd.runtime.local_layers import LOCAL_LAYERS
from nemo_popsd.runtime.torch_on_cpu import TORCH_ON_CPU
from tests.citations import cited_source
from tests.harness import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="adaptations are for machines without CUDA")

PACKAGE = Path(cpu.__file__).parents[1]
TENSOR_TYPES = re.compile(r"torch\.cuda\.\w+Tensor")
NEEDED = [adaptation for adaptation in LOCAL_LAYERS + ADAPTATIONS if adaptation.needed]
"""Those of the installed versions."""
FUNCTIONS = {
    "clip_grads": ("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
    "groups": ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
    "distributed": ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),
    "bf16": ("megatron.core.optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
}


@pytest.fixture(scope="module", autouse=True)
def _adapted():
    adapt_megatron()


def _constants(code: types.CodeType) -> list[Any]:
    result = []
    for constant in code.co_consts:
        result += constant if isinstance(constant, tuple) else [constant]
    return result


def test_torch_is_replaced_only_in_the_listed_modules():
    listed = {a.name.removeprefix("torch in ") for a in ADAPTATIONS if a.name.startswith("torch in ")}
    assert len(listed) > 10
    holders = {
        name
        for name, module in list(sys.modules.items())
        if name.startswith("megatron.") and vars(module).get("torch") is TORCH_ON_CPU
    }
    assert holders == listed


@pytest.mark.parametrize("key", FUNCTIONS)
def test_tensor_types_are_those_of_the_cpu(key):
    module, qualified = FUNCTIONS[key]
    assert any(qualified in adaptation.name for adaptation in ADAPTATIONS)
    function: Any = importlib.import_module(module)
    for part in qualified.split("."):
        function = getattr(function, part)
    constants = _constants(function.__code__)
    assert any(isinstance(c, str) and re.fullmatch(r"torch\.\w+Tensor", c) for c in constants)
    assert not any(isinstance(c, str) and TENSOR_TYPES.fullmatch(c) for c in constants)


def test_the_view_of_torch_replaces_cuda_only():
    for name in ("empty", "ones", "zeros", "rand", "randn"):
        assert getattr(TORCH_ON_CPU, name)(2, device="cuda").device.type == "cpu"
        assert getattr(TORCH_ON_CPU, name)(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert TORCH_ON_CPU.tensor([1.0], device="cuda").tolist() == [1.0]
    assert TORCH_ON_CPU.full((2,), 3.0, device="cuda").tolist() == [3.0, 3.0]
    assert TORCH_ON_CPU.arange(3, device="meta").device.type == "meta"
    assert TORCH_ON_CPU.cuda.current_device() == torch.device("cpu")
    assert TORCH_ON_CPU.cuda.synchronize() is None
    assert not TORCH_ON_CPU.cuda.is_available()
    assert TORCH_ON_CPU.nn is torch.nn
    assert TORCH_ON_CPU.Tensor is torch.Tensor
    with pytest.raises(AttributeError):
        TORCH_ON_CPU.no_such_name  # noqa: B018


def test_torch_itself_is_untouched():
    assert torch.zeros.__module__ != "nemo_popsd.runtime.cpu"
    for use in (torch.cuda.current_device, torch.cuda.synchronize, lambda: torch.zeros(1, device="cuda")):
        with pytest.raises((AssertionError, RuntimeError)):
            use()
    assert sys.modules["torch"] is torch
    assert sys.modules["torch.cuda"] is torch.cuda
    for owner in (torch, torch.cuda, torch.random, torch.distributed, torch.Tensor):
        patched = [n for n, v in vars(owner).items() if getattr(v, "__module__", "") == "nemo_popsd.runtime.cpu"]
        assert patched == []


def test_the_stand_in_for_transformer_engine_is_removed():
    """Libraries that look for Transformer Engine later must not find the stand-in."""
    importlib.import_module("megatron.bridge.peft.lora")
    assert "transformer_engine" not in sys.modules
    assert importlib.util.find_spec("transformer_engine") is None
    modules_with_te = {
        n for n, m in list(sys.modules.items()) if n.startswith("megatron.") and getattr(m, "HAVE_TE", False)
    }
    # This module sets HAVE_TE by itself: what it imports from megatron-core exists without Transformer Engine too.
    assert modules_with_te <= {"megatron.core.transformer.multi_latent_attention"}
    layers = importlib.import_module("megatron.bridge.peft.lora_layers")
    with pytest.raises(RuntimeError, match="not installed"):
        layers.te.Linear(2, 2)


def test_applying_twice_changes_nothing():
    scatter = importlib.import_module("megatron.bridge.models.conversion.param_mapping").MegatronParamMapping
    clip = importlib.import_module("megatron.core.optimizer.clip_grads").clip_grad_by_total_norm_fp32
    before = (scatter.scatter_to_tp_ranks, clip.__code__.co_consts)
    adapt_megatron()
    assert scatter.scatter_to_tp_ranks is before[0]
    assert clip.__code__.co_consts == before[1]


def test_with_cuda_nothing_is_applied_but_what_local_layers_need(monkeypatch):
    applied = []
    cuda_free, local = (
        Adaptation(name, (), "", MEGATRON_CORE, lambda name=name: applied.append(name)) for name in ("cpu", "local")
    )
    monkeypatch.setattr(cpu, "ADAPTATIONS", (cuda_free,))
    monkeypatch.setattr(cpu, "LOCAL_LAYERS", (local,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    adapt_megatron()
    assert applied == ["local"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    adapt_megatron()
    assert applied == ["local", "local", "cpu"]


def test_an_installed_transformer_engine_is_not_replaced(monkeypatch):
    moe = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    adaptations = {a.name: a for a in LOCAL_LAYERS}
    monkeypatch.setattr(local_layers, "transformer_engine_imports", lambda: True)
    monkeypatch.setattr(moe, "te_general_gemm", "its own", raising=False)
    monkeypatch.delitem(sys.modules, "megatron.bridge.peft.lora", raising=False)
    for name in ("router without Transformer Engine", "Transformer Engine's names for the import of LoRA"):
        adaptations[name].apply()
    assert moe.te_general_gemm == "its own"
    assert "transformer_engine" not in sys.modules
    assert "megatron.bridge.peft.lora" not in sys.modules, "LoRA was imported with the stand-in"


def test_a_missing_target_is_an_error(monkeypatch):
    hollow = types.ModuleType("hollow")
    hollow.function = lambda: "torch.FloatTensor"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hollow", hollow)
    failing = {
        "no torch": cpu._rebind_torch("hollow"),
        "no module": cpu._rebind_torch("megatron.core.no_such_module"),
        "no tensor type": cpu._cpu_tensor_types("hollow", "function"),
        "no function": cpu._cpu_tensor_types("hollow", "Class.method"),
    }
    for name, apply in failing.items():
        monkeypatch.setattr(cpu, "ADAPTATIONS", (Adaptation(name, (), "", MEGATRON_CORE, apply),))
        with pytest.raises(RuntimeError, match=r"revise nemo_popsd/runtime/cpu\.py"):
            adapt_megatron()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    mapping = importlib.import_module("megatron.bridge.models.conversion.param_mapping").MegatronParamMapping
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    bridge = importlib.import_module("megatron.bridge.models.conversion.model_bridge")
    language = importlib.import_module("megatron.core.models.common.language_module.language_module")
    rope = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    for owner, attribute, apply in (
        (random, "_set_cuda_rng_state", cpu._cpu_rng_state),
        (mapping, "scatter_to_tp_ranks", cpu._contiguous_scatter),
        (rope, "get_pos_emb_on_this_cp_rank", cpu._rotary_embedding_of_a_context_rank),
        (dispatcher, "maybe_move_tensor_to_cpu", cpu._splits_of_dispatched_tokens),
        (bridge, "_megatron_local_name_to_global", local_layers._names_of_local_experts),
        (language.LanguageModule, "setup_embeddings_and_output_layer", cpu._embedding_between_stages),
    ):
        with monkeypatch.context() as patch:
            patch.delattr(owner, attribute)
            patch.setattr(cpu, "ADAPTATIONS", (Adaptation(attribute, (), "", MEGATRON_CORE, apply),))
            with pytest.raises(RuntimeError, match=r"revise nemo_popsd/runtime/(cpu|local_layers)\.py"):
                adapt_megatron()


@pytest.mark.parametrize("adaptation", NEEDED, ids=lambda a: a.name)
def test_the_functions_that_need_it_still_do(adaptation):
    wanted = re.compile(
        r"\.cuda\(|torch\.cuda|['\"]cuda['\"]|_cuda_setRNGState|import transformer_engine|distributed\.scatter"
        r"|distributed\.all_gather|distributed\.reduce_scatter"
        r"|experts\.linear_fc|te_general_gemm|global_expert_number = int"
    )
    assert adaptation.needed_by
    for name in adaptation.needed_by:
        assert wanted.search(cited_source(name)), name


def test_nothing_else_in_the_package_patches_a_library():
    """Except two lines with their reasons: the queue of a checkpoint's writers, and the unpickler of its readers."""
    patched = set()
    for file in PACKAGE.rglob("*.py"):
        if file not in (Path(cpu.__file__), Path(local_layers.__file__)):
            patched |= {(str(file.relative_to(PACKAGE)), target) for target in _patched(ast.parse(file.read_text()))}
    assert patched == {
        ("checkpoint/weights.py", "filesystem_async._results_queue"),
        ("checkpoint/trust.py", "filesystem.pickle"),
    }
    assert _patched(ast.parse("import torch.nn as nn\nnn.x.y = 1\nsetattr(nn, 'z', 2)")) == {"nn.x.y", "nn"}


def _patched(tree: ast.AST) -> set[str]:
    """Attributes that are set on objects imported from other packages."""
    imported = set()
    for node in ast.walk(tree):
        outside = isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and "popsd" not in str(node.module))
        if outside and isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += [t for t in node.targets if isinstance(t, ast.Attribute)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            targets.append(node.target)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            targets.append(node.args[0])
    return {ast.unparse(t) for t in targets if ast.unparse(t).split(".")[0] in imported}


def _random_state(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from nemo_popsd.parallel.distributed import initialize

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler)

    initialize(ParallelConfig(tensor=world_size), seed=3)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(4)
    restored = torch.equal(before, torch.get_rng_state())
    outside = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    return {"restored": restored, "first": first, "second": second, "outside": outside, "records": records}


def _scatter(rank: int, world_size: int) -> dict[str, Any]:
    """Scatters columns of a matrix, which are not contiguous: with the adaptation, and with the library's method."""
    from megatron.bridge.models.conversion.param_mapping import ColumnParallelMapping

    from nemo_popsd.parallel.distributed import initialize

    initialize(ParallelConfig(tensor=world_size), seed=3)
    matrix = torch.arange(12.0).reshape(3, 4)
    mapping = ColumnParallelMapping("a.weight", "b.weight")
    used = type(mapping).scatter_to_tp_ranks
    [stock] = [c.cell_contents for c in used.__closure__ or () if callable(c.cell_contents)] or [used]
    result = {"expected": matrix.chunk(world_size, dim=1)[rank].clone(), "is adapted": stock is not used}
    for name, scatter in (("used", used), ("stock", stock)):
        splits = list(matrix.chunk(world_size, dim=1)) if rank == 0 else None
        try:
            result[name] = scatter(mapping, splits, torch.Size([3, 2]), torch.float32, torch.device("cpu"))
        except Exception as error:
            result[name] = str(error)
    return result


def test_regions_have_their_own_random_state_and_restore_the_outer_one():
    [alone] = run_ranks(_random_state, 1)
    assert alone["restored"]
    assert alone["records"] == []
    assert not torch.equal(alone["first"], alone["second"]), "a region continues its own random numbers"
    assert not torch.equal(alone["first"], alone["outside"])
    two = run_ranks(_random_state, 2)
    assert all(result["restored"] for result in two)
    assert torch.equal(two[0]["outside"], two[1]["outside"])
    assert not torch.equal(two[0]["first"], two[1]["first"])


def test_scattered_views_arrive_intact():
    results = run_ranks(_scatter, 2)
    for result in results:
        assert torch.equal(result["used"], result["expected"])
    # Megatron-Bridge 0.6 copies the views itself. If this fails with 0.3, the adaptation is no longer needed.
    intact = all(torch.is_tensor(r["stock"]) and torch.equal(r["stock"], r["expected"]) for r in results)
    assert intact != results[0]["is adapted"]


PARTS = [3, 1]


def _unequal_parts(rank: int, world_size: int) -> dict[str, Any]:
    """Rows of unequal number from each rank, and the gradient of their gather, summed over the ranks."""
    from megatron.core.tensor_parallel import mappings

    adapt_megatron()
    group = torch.distributed.group.WORLD
    own = torch.arange(4.0).reshape(4, 1).split(PARTS)[rank].clone().requires_grad_()
    whole = mappings.gather_from_sequence_parallel_region(own, group=group, output_split_sizes=PARTS)
    (whole * torch.arange(1.0, 5.0)[:, None] * (rank + 1)).sum().backward()
    cells = [cell.cell_contents for cell in mappings._gather_along_first_dim.__closure__]
    [stock] = [function for function in cells if function.__module__ == mappings.__name__]
    try:
        refused = stock(own.detach(), group, PARTS) is None
    except RuntimeError:
        refused = True
    return {"whole": whole.detach().flatten(), "gradient": own.grad.flatten(), "refused": refused}


def test_parts_of_unequal_lengths_are_gathered_and_their_gradients_scattered():
    for rank, seen in enumerate(run_ranks(_unequal_parts, 2)):
        assert torch.equal(seen["whole"], torch.arange(4.0))
        assert torch.equal(seen["gradient"], 3 * torch.arange(1.0, 5.0).split(PARTS)[rank])
        assert seen["refused"], "gloo gathers unequal parts: the adaptation is no longer needed"
