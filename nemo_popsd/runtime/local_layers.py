"""Library changes for layers without Transformer Engine, on any device.

Megatron-Bridge imports Transformer Engine unconditionally, and both libraries support only the experts of its grouped
layer. Every adaptation is one entry of `LOCAL_LAYERS`, as in `nemo_popsd.runtime.cpu`. If Transformer Engine can be
imported, the entries that replace it change nothing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import re
import sys
import types
from typing import Protocol

import torch

from nemo_popsd.runtime.adaptation import MEGATRON_BRIDGE, MEGATRON_BRIDGE_0_3, MEGATRON_CORE, Adaptation


class _NamedMapping(Protocol):
    megatron_param: str


class _ExpertConfig(Protocol):
    num_moe_experts: int


def transformer_engine_imports() -> bool:
    """Whether Transformer Engine can be imported, according to megatron-core (which this function imports)."""
    return bool(importlib.import_module("megatron.core.models.gpt.gpt_layer_specs").HAVE_TE)


def _transformer_engine_names() -> None:
    """Make Megatron-Bridge's LoRA importable with placeholder classes that cannot be instantiated.

    Does nothing if Transformer Engine can be imported. megatron-core looks for Transformer Engine at import and must
    not find the placeholder, so it is imported first; afterwards the placeholder is removed from `sys.modules`.
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
    engine.__version__ = "0.0.0"  # type: ignore[attr-defined]  # Megatron-Bridge 0.6 has megatron-core compare it
    engine.pytorch = pytorch  # type: ignore[attr-defined]
    # Other libraries probe with importlib.util.find_spec, which raises for a module without a spec.
    engine.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    pytorch.__spec__ = importlib.machinery.ModuleSpec("transformer_engine.pytorch", None)
    sys.modules["transformer_engine"] = engine
    sys.modules["transformer_engine.pytorch"] = pytorch
    before = set(sys.modules)
    try:
        importlib.import_module("megatron.bridge.peft.lora")
    finally:
        del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]
    # Modules that found the placeholder must not use it:
    # `megatron.bridge.peft.utils.get_adapter_attributes_from_linear` would test layers against its classes.
    for name in set(sys.modules) - before:
        if name.startswith("megatron.") and getattr(sys.modules[name], "HAVE_TE", False):
            sys.modules[name].HAVE_TE = False  # type: ignore[attr-defined]


def _expert_indices() -> None:
    """Append the index of a `SequentialMLP` expert to the name in which the library looks for it."""
    mapping = importlib.import_module("megatron.bridge.models.conversion.param_mapping").MegatronParamMapping
    stock = mapping.gather_from_ep_ranks
    if getattr(stock, "numbered", False):
        return

    def gather_from_ep_ranks(self: _NamedMapping, *args: object, **kwargs: object) -> object:
        name, expert = self.megatron_param, re.search(r"\.local_experts\.(\d+)\.", self.megatron_param)
        self.megatron_param = f"{name}{expert[1]}" if expert else name
        try:
            return stock(self, *args, **kwargs)
        finally:
            self.megatron_param = name

    gather_from_ep_ranks.numbered = True  # type: ignore[attr-defined]
    mapping.gather_from_ep_ranks = gather_from_ep_ranks


def _router_without_transformer_engine() -> None:
    """Define `te_general_gemm`, which the router uses, as None without Transformer Engine."""
    module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if "te_general_gemm" not in inspect.getsource(module):
        raise RuntimeError(f"{module.__name__} does not use te_general_gemm; revise nemo_popsd/runtime/local_layers.py")
    if not transformer_engine_imports():
        module.te_general_gemm = None  # type: ignore[attr-defined]


def _names_of_local_experts() -> None:
    """Number the experts of `SequentialMLP` over all expert-parallel ranks, as the library does for a grouped layer."""
    module = importlib.import_module("megatron.bridge.models.conversion.model_bridge")
    stock = module._megatron_local_name_to_global
    if getattr(stock, "counts_local_experts", False):
        return

    def local_name_to_global(
        models: object, config: _ExpertConfig, param_name: str, vp_stage: int | None = None
    ) -> str:
        from megatron.core import parallel_state

        name: str = stock(models, config, param_name, vp_stage)
        group = parallel_state.get_expert_model_parallel_group()
        if group.size() > 1 and ".adapter." not in name:
            first = config.num_moe_experts // group.size() * group.rank()
            name = re.sub(r"(?<=\.local_experts\.)\d+", lambda match: str(int(match[0]) + first), name)
        return name

    local_name_to_global.counts_local_experts = True  # type: ignore[attr-defined]
    module._megatron_local_name_to_global = local_name_to_global  # type: ignore[attr-defined]


LOCAL_LAYERS: tuple[Adaptation, ...] = (
    # This comes first: every import from Megatron-Bridge needs it.
    Adaptation(
        "Transformer Engine's names for the import of LoRA",
        ("megatron.bridge.peft.lora_layers",),
        "imports transformer_engine.pytorch unconditionally",
        MEGATRON_BRIDGE,
        _transformer_engine_names,
    ),
    Adaptation(
        "router without Transformer Engine",
        ("megatron.core.transformer.moe.moe_utils.RouterGatingLinearFunction.forward",),
        "uses te_general_gemm, a name that is defined only where Transformer Engine imports",
        MEGATRON_CORE,
        _router_without_transformer_engine,
    ),
    Adaptation(
        "indices of experts that are separate modules",
        ("megatron.bridge.models.conversion.param_mapping.MegatronParamMapping.gather_from_ep_ranks",),
        "looks for the expert's index at the end of the name, where only Transformer Engine's grouped experts have it",
        MEGATRON_BRIDGE_0_3,
        _expert_indices,
    ),
    Adaptation(
        "names of a rank's experts",
        ("megatron.bridge.models.conversion.model_bridge._megatron_local_name_to_global",),
        "counts only the experts of the grouped layer over all ranks",
        MEGATRON_BRIDGE_0_3,
        _names_of_local_experts,
    ),
)
"""All changes for local layers, in order of application."""
