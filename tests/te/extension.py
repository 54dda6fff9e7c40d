"""The module ``transformer_engine_torch`` with the kernels of `kernels` and `attention`; the other kernels raise."""

from __future__ import annotations

import enum
import importlib.machinery
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.te import attention, kernels, versions

NAME = "transformer_engine_torch"
_CLASSES = (
    "CommOverlap CommOverlapP2P CommOverlapHelper CommOverlapCore CommOverlapBase CommOverlapP2PBase FP8TensorMeta"
)
_ENUMERATIONS = {
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT "
    "GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "CommOverlapType": "RS AG",
    "CommOverlapAlgo": "BULK_OVERLAP_AG",
    "Float8BlockScaleTensorFormat": "GEMM_READY COMPACT",
}
CUDNN, CUBLAS = 91500, 130100
"""The versions that the module reports: those of the container."""


def _public(module: types.ModuleType) -> Iterable[tuple[str, Any]]:
    return ((name, value) for name, value in vars(module).items() if callable(value) and not name.startswith("_"))


def _not_emulated(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{NAME}.{name} is not emulated; see tests/te")

    return call


class _Extension(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _not_emulated(name)


def build(package: Path, version: versions.Version) -> types.ModuleType:
    """A new module with every kernel that the sources below `package` name, since Transformer Engine looks up many.

    Args:
        package: the Python modules of Transformer Engine.
        version: their version.
    """
    module: Any = _Extension(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    sources = (path.read_text() for path in package.rglob("*.py"))
    for name in {name for source in sources for name in re.findall(r"\btex\.([a-z]\w+)", source)}:
        setattr(module, name, _not_emulated(name))
    for source in (kernels, attention):
        for name, value in _public(source):
            setattr(module, name, value)
    for name, members in _ENUMERATIONS.items():
        setattr(module, name, enum.IntEnum(name, {member: n for n, member in enumerate(members.split())}))
    for name in _CLASSES.split():
        setattr(module, name, type(name, (), {}))
    module.NVTE_QKV_Layout, module.NVTE_QKV_Format = attention.QKVLayout, attention.QKVFormat
    module.NVTE_Bias_Type, module.NVTE_Mask_Type = attention.Bias, attention.Mask
    module.NVTE_Softmax_Type, module.NVTE_Fused_Attn_Backend = attention.Softmax, attention.Backend
    module.get_cudnn_version = lambda: CUDNN
    module.get_cublasLt_version = lambda: CUBLAS
    module.get_num_cublas_streams = lambda: 4
    for name, value in versions.names_of(version).items():
        setattr(module, name, value)
    return module
