"""Changes to the libraries for layers without Transformer Engine, on any device.

Megatron-Bridge imports Transformer Engine unconditionally, and both libraries support experts only in its grouped
layer. Every adaptation is one entry of `LOCAL_LAYERS`, as in `nemo_popsd.runtime.cpu`; the entries that replace
Transformer Engine do nothing where it can be imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import re
import sys
import types
from typing import Any

import torch

from nemo_popsd.runtime.adaptation import Adaptation


def transformer_engine_imports() -> bool:
    """Whether megatron-core could import Transformer Engine on this machine. Imports megatron-core."""
    return bool(importlib.import_module("megatron.core.models.gpt.gpt_layer_specs").HAVE_TE)


def _transformer_engine_names() -> None:
    """Makes Megatron-Bridge's LoRA importable with placeholder classes, which cannot be instantiated.

    The placeholders exist only during that import: megatron-core, imported before, probes for Transformer Engine and
    must not find it. An installed Transformer Engine is not replaced.
    """
    if transformer_engine_imports() or "megatron.bridge.peft.lora" in sys.modules:
        return

    def refuse(self: object, *_: object, **__: object) -> None:
        raise RuntimeError("Transformer Engine is not installed on this machine")

    names = ("Linear", "LayerNormLinear")
    pytorch = types.ModuleType("transformer_engine.pytorch")
    for name in names:
        setattr(pytorch, name, type(name, (torch.nn.Module,), {"__init__": refuse}))
    pytorch.ops = types.SimpleNamespace(Sequential=object)  # type: ignore[attr-defined]
    engine = types.ModuleType("transformer_engine")
    engine.pytorch = pytorch  # type: ignore[attr-defined]
    # importlib.util.find_spec, which other libraries probe with, refuses a module without a spec.
    engine.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    pytorch.__spec__ = importlib.machinery.ModuleSpec("transformer_engine.pytorch", None)
    sys.modules["transformer_engine"] = engine
    sys.modules["transformer_engine.pytorch"] = pytorch
    before = set(sys.modules)
    try:
        importlib.import_module("megatron.bridge.peft.lora")
    finally:
        del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]
    # Modules that probed for Transformer Engine during the import found the placeholders; peft/utils.py:129 would test
    # layers against them.
    for name in set(sys.modules) - before:
        if name.startswith("megatron.") and getattr(sys.modules[name], "HAVE_TE", False):
            sys.modules[name].HAVE_TE = False  # type: ignore[attr-defined]


def _expert_indices() -> None:
    mapping = importlib.import_module("megatron.bridge.models.conversion.param_mapping").MegatronParamMapping
    stock = mapping.gather_from_ep_ranks
    if getattr(stock, "numbered", False):
        return

    def gather_from_ep_ranks(self: Any, *args: object, **kwargs: object) -> object:
        name, number = self.megatron_param, re.search(r"\.local_experts\.(\d+)\.", self.megatron_param)
        self.megatron_param = f"{name}{number[1]}" if number else name
        try:
            return stock(self, *args, **kwargs)
        finally:
            self.megatron_param = name

    gather_from_ep_ranks.numbered = True  # type: ignore[attr-defined]
    mapping.gather_from_ep_ranks = gather_from_ep_ranks


def _router_without_transformer_engine() -> None:
    """Sets the name of a Transformer Engine kernel in the router's module to None, which means that it is missing."""
    module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if "te_general_gemm" not in inspect.getsource(module):
        raise RuntimeError(f"{module.__name__} does not use te_general_gemm; revise nemo_popsd/runtime/local_layers.py")
    if not transformer_engine_imports():
        module.te_general_gemm = None  # type: ignore[attr-defined]


def _names_of_local_experts() -> None:
    """Numbers the experts of `SequentialMLP` over all ranks, as the library does for those of the grouped layer."""
    module = importlib.import_module("megatron.bridge.models.conversion.model_bridge")
    stock = module._megatron_local_name_to_global
    if getattr(stock, "counts_local_experts", False):
        return

    def local_name_to_global(models: Any, config: Any, param_name: str, vp_stage: int | None = None) -> Any:
        from megatron.core import parallel_state

        name = stock(models, config, param_name, vp_stage)
        group = parallel_state.get_expert_model_parallel_group()
        if group.size() > 1 and ".adapter." not in name:
            first = config.num_moe_experts // group.size() * group.rank()
            name = re.sub(r"(?<=\.local_experts\.)\d+", lambda match: str(int(match[0]) + first), name)
        return name

    local_name_to_global.counts_local_experts = True  # type: ignore[attr-defined]
    module._megatron_local_name_to_global = local_name_to_global  # type: ignore[attr-defined]


LOCAL_LAYERS: tuple[Adaptation, ...] = (
    # First: importing anything of Megatron-Bridge needs it.
    Adaptation(
        "Transformer Engine's names for the import of LoRA",
        "megatron/bridge/peft/lora.py:21 and lora_layers.py:20 import transformer_engine.pytorch unconditionally",
        _transformer_engine_names,
    ),
    Adaptation(
        "router without Transformer Engine",
        "moe_utils.py:1192 a name that is imported only with Transformer Engine",
        _router_without_transformer_engine,
    ),
    Adaptation(
        "indices of experts that are separate modules",
        "megatron/bridge/models/conversion/param_mapping.py:677 reads the expert's index at the end of the name, "
        "where only Transformer Engine's grouped experts have it",
        _expert_indices,
    ),
    Adaptation(
        "names of a rank's experts",
        "model_bridge.py:148 numbers only those of the GPU's grouped layer over all ranks",
        _names_of_local_experts,
    ),
)
"""All changes for local layers, in the order of application."""
