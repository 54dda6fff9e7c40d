"""Megatron-core and Megatron-Bridge on a machine without CUDA. With CUDA, nothing in `ADAPTATIONS` is applied.

Both libraries are written for GPUs: they name the device literally, keep random state on it and compare tensor types
by their CUDA names. Every adaptation is one entry of `ADAPTATIONS`, with the lines of the libraries (megatron-core
0.16.1 and megatron-bridge 0.3.1) that need it. An entry whose code is no longer in the library raises, so that an
upgrade cannot pass unnoticed.

``torch`` itself is not patched. In the listed Megatron modules the *name* ``torch`` is bound to a view of torch
(`torch_on_cpu`) whose CUDA calls run on the CPU.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

import torch

from nemo_popsd.runtime.adaptation import Adaptation, apply_all
from nemo_popsd.runtime.local_layers import LOCAL_LAYERS
from nemo_popsd.runtime.torch_on_cpu import TORCH_ON_CPU


def _rebind_torch(module_name: str) -> Callable[[], None]:
    def apply() -> None:
        module = importlib.import_module(module_name)
        if getattr(module, "torch", None) not in (torch, TORCH_ON_CPU):
            raise RuntimeError(f"{module_name} no longer has the name 'torch'; revise nemo_popsd/runtime/cpu.py")
        module.torch = TORCH_ON_CPU  # type: ignore[attr-defined]

    return apply


def _cpu_tensor_types(module_name: str, qualified_name: str) -> Callable[[], None]:
    """Rewrites ``'torch.cuda.FloatTensor'`` and the like to their CPU names among a function's constants.

    The code object is changed in place, so that every reference to the function is affected.
    """

    def on_cpu(constant: object) -> object:
        if isinstance(constant, str) and re.fullmatch(r"torch\.cuda\.\w+Tensor", constant):
            return constant.replace("torch.cuda.", "torch.")
        if isinstance(constant, tuple):
            return tuple(map(on_cpu, constant))
        return constant

    def apply() -> None:
        function: Any = importlib.import_module(module_name)
        for part in qualified_name.split("."):
            function = getattr(function, part)
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not re.search(r"torch\.cuda\.\w+Tensor", inspect.getsource(function)):
            raise RuntimeError(
                f"{module_name}.{qualified_name} compares no tensor type; revise nemo_popsd/runtime/cpu.py"
            )
        function.__code__ = function.__code__.replace(co_consts=tuple(map(on_cpu, function.__code__.co_consts)))

    return apply


def _cpu_rng_state() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        if not hasattr(random, name):
            raise RuntimeError(f"megatron.core.tensor_parallel.random has no {name}; revise nemo_popsd/runtime/cpu.py")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]
    # random.py:264 warns that the CPU's random state changed in a region; here it is the state of the region itself.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _contiguous_scatter() -> None:
    mapping = importlib.import_module("megatron.bridge.models.conversion.param_mapping").MegatronParamMapping
    stock = mapping.scatter_to_tp_ranks
    if getattr(stock, "contiguous", False):
        return

    def scatter_to_tp_ranks(self: object, splits: list[torch.Tensor] | None, *args: object, **kwargs: object) -> object:
        return stock(self, [s.contiguous() for s in splits] if splits else splits, *args, **kwargs)

    scatter_to_tp_ranks.contiguous = True  # type: ignore[attr-defined]
    mapping.scatter_to_tp_ranks = scatter_to_tp_ranks


def _embedding_between_stages() -> None:
    """Replaces ``.cuda()`` of the copied embedding by ``.cpu()`` in the code object, which has no other ``cuda``."""
    module = importlib.import_module("megatron.core.models.common.language_module.language_module")
    code = module.LanguageModule.setup_embeddings_and_output_layer.__code__
    if "cuda" in code.co_names:
        names = tuple("cpu" if name == "cuda" else name for name in code.co_names)
        module.LanguageModule.setup_embeddings_and_output_layer.__code__ = code.replace(co_names=names)
    elif "cpu" not in code.co_names:
        raise RuntimeError(f"{module.__name__} moves no embedding; revise nemo_popsd/runtime/cpu.py")


def _rotary_embedding_of_a_context_rank() -> None:
    package = "megatron.core.models.common.embeddings"
    name = "get_pos_emb_on_this_cp_rank"
    for module_name in ("rope_utils", "rotary_pos_embedding", "yarn_rotary_pos_embedding"):
        module = importlib.import_module(f"{package}.{module_name}")
        if not hasattr(module, name):
            raise RuntimeError(f"{package}.{module_name} has no {name}; revise nemo_popsd/runtime/cpu.py")
        setattr(module, name, _chunks_of_context_rank)


def _chunks_of_context_rank(embedding: torch.Tensor, dimension: int, group: Any) -> torch.Tensor:
    """The two of 2·cp chunks along `dimension` that belong to this context-parallel rank, as in the library."""
    chunks = embedding.chunk(2 * group.size(), dim=dimension)
    return torch.cat([chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]], dim=dimension)


def _splits_of_dispatched_tokens() -> None:
    """Converts the splits of an all-to-all to numpy arrays, which the library does only for tensors on a GPU."""
    module = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    stock = module.maybe_move_tensor_to_cpu
    if getattr(stock, "numpy_on_cpu", False):
        return

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    maybe_move_tensor_to_cpu.numpy_on_cpu = True  # type: ignore[attr-defined]
    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]


_TORCH_MODULES = {
    "megatron.bridge.models.conversion.param_mapping": "param_mapping.py:986 torch.cuda.current_device()",
    "megatron.core.dist_checkpointing.strategies.filesystem_async": "filesystem_async.py:230 synchronize()",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "state_dict_saver.py:204,252",
    "megatron.core.distributed.distributed_data_parallel": "distributed_data_parallel.py:588 synchronize()",
    "megatron.core.distributed.param_and_grad_buffer": "param_and_grad_buffer.py:806 current_device()",
    "megatron.core.models.common.embeddings.rotary_pos_embedding": "rotary_pos_embedding.py:78,162 current_device()",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding": "yarn_rotary_pos_embedding.py:76,122,126",
    "megatron.core.optimizer.clip_grads": 'clip_grads.py:90,103,115,174,207 device="cuda"',
    "megatron.core.optimizer.distrib_optimizer": "distrib_optimizer.py:791,1077 current_device()",
    "megatron.core.optimizer.optimizer": 'optimizer.py:473,481,485,907,1141 device="cuda"',
    "megatron.core.parallel_state": "parallel_state.py:198,931,933 synchronize(), device_ids",
    "megatron.core.pipeline_parallel.p2p_communication": "p2p_communication.py:190-321 current_device(), 242,398",
    "megatron.core.pipeline_parallel.schedules": 'schedules.py:596,983,2138 device="cuda"',
    "megatron.core.tensor_parallel.layers": "layers.py:261,552,873,899,1197,1218 current_device()",
    "megatron.core.tensor_parallel.mappings": "mappings.py:91,141,148,181,442 current_device()",
    "megatron.core.tensor_parallel.random": "random.py:235-238,422 torch.cuda.get_rng_state(), manual_seed()",
    "megatron.core.utils": "utils.py:631,1207 GlobalMemoryBuffer, gradient norm",
    "megatron.core.transformer.moe.router": "router.py:90,92 current_device()",
    "megatron.core.transformer.moe.token_dispatcher": "token_dispatcher.py:445,871,873,874 Stream(), current_stream()",
    "megatron.core.transformer.attention": "attention.py:430 current_device() of the key and value cache",
}

ADAPTATIONS: tuple[Adaptation, ...] = (
    *(Adaptation(f"torch in {module}", line, _rebind_torch(module)) for module, line in _TORCH_MODULES.items()),
    Adaptation(
        "random state of tensor-parallel regions",
        "random.py:55,84 torch.cuda.random.get_rng_state and torch._C._cuda_setRNGState",
        _cpu_rng_state,
    ),
    *(
        Adaptation(
            f"tensor types in {function}",
            f"{lines}: type() is compared with 'torch.cuda.FloatTensor' and the like",
            _cpu_tensor_types(module, function),
        )
        for module, function, lines in (
            ("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32", "clip_grads.py:167"),
            (
                "megatron.core.optimizer.distrib_optimizer",
                "DistributedOptimizer._build_model_and_main_param_groups",
                "distrib_optimizer.py:361,420",
            ),
            ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.__init__", "distrib_optimizer.py:582"),
            (
                "megatron.core.optimizer.optimizer",
                "Float16OptimizerWithFloat16Params.__init__",
                "optimizer.py:671,690",
            ),
        )
    ),
    Adaptation(
        "tied embedding of the last pipeline stage",
        "language_module.py:244 .cuda() of a weight that two stages share",
        _embedding_between_stages,
    ),
    Adaptation(
        "rotary embedding of a context-parallel rank",
        "rope_utils.py:64 .cuda() of an index in pinned memory",
        _rotary_embedding_of_a_context_rank,
    ),
    Adaptation(
        "splits of dispatched tokens",
        "moe_utils.py:1098 converts tensors to arrays only if they are on a GPU",
        _splits_of_dispatched_tokens,
    ),
    Adaptation(
        "contiguous shards in Megatron-Bridge's scatter",
        "megatron/bridge/models/conversion/param_mapping.py:504 scatters views; gloo sends wrong bytes for them",
        _contiguous_scatter,
    ),
)
"""All changes on a machine without CUDA, in the order of application."""


def adapt_megatron() -> None:
    """Adapts Megatron to local layers (`LOCAL_LAYERS`) and, without CUDA, to the CPU (`ADAPTATIONS`).

    Idempotent; imports megatron-core and Megatron-Bridge.

    Raises:
        RuntimeError: a library no longer has the code that an adaptation changes.
    """
    # First: any import of Megatron-Bridge needs it.
    apply_all(LOCAL_LAYERS, listed_in="nemo_popsd/runtime/local_layers.py")
    if not torch.cuda.is_available():
        apply_all(ADAPTATIONS, listed_in="nemo_popsd/runtime/cpu.py")
