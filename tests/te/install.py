"""The real Transformer Engine (its Python modules) on a CPU, with the emulated extension, in this process.

    install()        # before anything of Megatron is imported; the whole process then has the layers of a GPU

Nothing on disk is changed. In Transformer Engine's modules, as they are imported, the name ``torch`` is a view of
torch whose one CUDA device is the CPU, ``is_cuda`` is ``is_cpu``, the device "cuda" is "cpu", and fused attention
supports fp32. In the project `nemo_popsd.megatron.spec.chosen_layers` returns what it does on a GPU, and kernels that
are written in CUDA or Triton stay off (`KERNELS_THAT_STAY_OFF`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import re
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tests.environment import environment
from tests.te import extension
from tests.te.location import PACKAGE, folder
from tests.te.versions import Version

_HALF_PRECISION_ALONE = (
    "torch.float16, torch.bfloat16",
    "torch.bfloat16, torch.float16, torch.float8_e4m3fn",
)
"""Lists of the dtypes that fused attention supports. The emulated one also supports fp32, because layouts are compared
in fp32 with the attention that a GPU uses in bf16. NVTE_FUSED_ATTN=0 selects the one that a GPU uses in fp32."""

KERNELS_THAT_STAY_OFF = ("moe_permute_fusion",)
"""Settings of a model whose kernels are sources in Triton."""


def version() -> Version:
    """Major and minor version of the installed package."""
    [distribution] = importlib.metadata.distributions(name=PACKAGE, path=[str(folder())])
    major, minor, *_ = distribution.version.split(".")
    return int(major), int(minor)


class _Done:
    """A stream, or an event, of a device whose calls are complete when they return."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self


class _Once:
    """A request on which `wait` may be called again, as with NCCL; gloo would wait for another message."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def wait(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.wait()


class _Cuda(types.ModuleType):
    """``torch.cuda`` of a Hopper card that is the CPU."""

    def __init__(self, view: Any) -> None:
        super().__init__("torch.cuda")
        self._view = view
        self.is_available = lambda: True
        self.is_current_stream_capturing = lambda: False
        self.nvtx = types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda: None)
        self.Stream = self.Event = _Done
        self.current_stream = _Done
        self.stream = lambda _: contextlib.nullcontext()
        self.get_device_capability = lambda *_: (9, 0)
        card = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100 (emulated)")
        self.get_device_properties = lambda *_: card

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view.cuda, name)


class _Torch(types.ModuleType):
    def __init__(self) -> None:
        from nemo_popsd.runtime.torch_on_cpu import TORCH_ON_CPU

        super().__init__("torch")
        self._view = TORCH_ON_CPU
        self.cuda = _Cuda(TORCH_ON_CPU)
        self.version = types.SimpleNamespace(**{**vars(torch.version), "cuda": "13.1"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


class _Loader(importlib.machinery.SourceFileLoader):
    """Imports a module of Transformer Engine as it is on a machine whose card is the CPU."""

    view: types.ModuleType

    def get_code(self, fullname: str) -> Any:
        source = self.get_data(self.path).decode()
        changed = source.replace('"cuda", torch.cuda.current_device()', '"cuda"').replace('"cuda"', '"cpu"')
        changed = re.sub(r"\.is_cuda\b", ".is_cpu", changed).replace(".cuda()", ".cpu()")
        for dtypes in _HALF_PRECISION_ALONE:
            changed = changed.replace(f"[{dtypes}]", f"[{dtypes}, torch.float32]")
        return self.source_to_code(changed.encode(), self.path) if changed != source else super().get_code(fullname)

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == f"{PACKAGE}.common":
            module.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        if getattr(module, "torch", None) is torch:
            module.torch = self.view  # type: ignore[attr-defined]


class _Finder(importlib.metadata.DistributionFinder):
    """Finds Transformer Engine's modules and its version, without an entry on the path, which ranks would inherit."""

    def __init__(self, view: types.ModuleType) -> None:
        self._view = view

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        if context is None or (context.name or "").replace("-", "_") != PACKAGE:
            return []
        here = importlib.metadata.DistributionFinder.Context(name=context.name, path=[str(folder())])
        return importlib.metadata.MetadataPathFinder.find_distributions(here)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path or [str(folder())])
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
            spec.loader.view = self._view
        return spec


def install() -> None:
    """Imports Transformer Engine, Megatron on it, and the project on both. Once in a process."""
    if "megatron.core" in sys.modules or PACKAGE in sys.modules:
        raise RuntimeError("install Transformer Engine before Megatron is imported")
    sys.modules[extension.NAME] = extension.build(folder() / PACKAGE / "pytorch", version())
    view = _Torch()
    sys.meta_path.insert(0, _Finder(view))
    # Compiling functions would take longer than the tests run them.
    torch._dynamo.config.disable = True
    sys.path.append(str(folder()))  # Transformer Engine imports onnxscript, which is installed beside it
    # With NVTE_PROJECT_BUILDING it does not look for its CUDA library, which the wheel does not contain.
    with environment(NVTE_PROJECT_BUILDING="1", NVTE_TORCH_COMPILE="0"):
        importlib.import_module(f"{PACKAGE}.pytorch")
    sys.path.remove(str(folder()))
    bridge: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    assert bridge.HAVE_TE
    bridge.torch = view
    ring: Any = importlib.import_module(f"{PACKAGE}.pytorch.attention.dot_product_attention.context_parallel")
    exchange = ring.flash_attn_p2p_communicate
    ring.flash_attn_p2p_communicate = lambda *arguments: [_Once(request) for request in exchange(*arguments)]
    _select_transformer_engine()


def _select_transformer_engine() -> None:
    from nemo_popsd.megatron import context_limits, spec

    right = spec.choose_layer_spec

    def choose(provider: Any, setting: str) -> None:
        right(provider, setting)
        for kernel in KERNELS_THAT_STAY_OFF:
            setattr(provider, kernel, False)

    build: Any = importlib.import_module("nemo_popsd.megatron.build")
    spec.chosen_layers = lambda setting: "transformer_engine"
    context_limits.PRECISIONS_OF_CONTEXT = ("bf16", "fp32")  # those of the emulated attention
    build.choose_layer_spec = choose
