"""Adaptations of megatron-core and Megatron-Bridge for machines without CUDA. With CUDA, none is applied.

Both libraries are written for GPUs: they hard-code the device, keep random state on it, and compare tensor types
with their CUDA names. Every adaptation is one entry of `ADAPTATIONS`, with the functions that need it. An entry raises
if the library no longer has the adapted part, so that library upgrades are noticed.

``torch`` itself is not patched. In the listed Megatron modules the *name* ``torch`` is bound to a view of torch
(`torch_on_cpu`) whose CUDA calls run on the CPU.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import cast

import torch
import torch.distributed as dist

from nemo_popsd.runtime.adaptation import MEGATRON_BRIDGE, MEGATRON_BRIDGE_0_3, MEGATRON_CORE, Adaptation, apply_all
from nemo_popsd.runtime.local_layers import LOCAL_LAYERS
from nemo_popsd.runtime.torch_on_cpu import TORCH_ON_CPU


def _rebind_torch(module_name: str) -> Callable[[], None]:
    def apply() -> None:
        module = importlib.import_module(module_name)
        if getattr(module, "torch", None) not in (torch, TORCH_ON_CPU):
            raise RuntimeError(f"{module_name} no longer holds the name 'torch'; revise nemo_popsd/runtime/cpu.py")
        module.torch = TORCH_ON_CPU  # type: ignore[attr-defined]

    return apply


def _cpu_tensor_types(module_name: str, qualified_name: str) -> Callable[[], None]:
    """Replace ``'torch.cuda.FloatTensor'`` and similar constants of a function by their CPU names.

    The code object is replaced on the function itself, so the change applies to every reference to the function.
    """

    def on_cpu(constant: object) -> object:
        if isinstance(constant, str) and re.fullmatch(r"torch\.cuda\.\w+Tensor", constant):
            return constant.replace("torch.cuda.", "torch.")
        if isinstance(constant, tuple):
            return tuple(map(on_cpu, constant))
        return constant

    def apply() -> None:
        function = attrgetter(qualified_name)(importlib.import_module(module_name))
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
    # `megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork` warns if the CPU's random state changes within a
    # region. Here the region uses that state.
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
    """Change ``.cuda()`` of the copied embedding to ``.cpu()`` in the function's code; the name occurs once."""
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


def _chunks_of_context_rank(embedding: torch.Tensor, dimension: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this context-parallel rank's two of the 2·cp chunks along `dimension`, like the library's function."""
    chunks = embedding.chunk(2 * group.size(), dim=dimension)
    return torch.cat([chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]], dim=dimension)


def _splits_of_dispatched_tokens() -> None:
    """Convert the splits of an all-to-all to NumPy arrays, which the library does only for GPU tensors."""
    module = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    stock = module.maybe_move_tensor_to_cpu
    if getattr(stock, "numpy_on_cpu", False):
        return

    def maybe_move_tensor_to_cpu(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    maybe_move_tensor_to_cpu.numpy_on_cpu = True  # type: ignore[attr-defined]
    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]


def _unequal_parts() -> None:
    """Gather and scatter parts of unequal lengths padded to the longest, because gloo rejects unequal lengths."""
    module = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim
    if getattr(gather, "pads_parts", False):
        return

    def padded(part: torch.Tensor, length: int) -> torch.Tensor:
        return torch.cat([part, part.new_zeros(length - len(part), *part.shape[1:])])

    def gather_parts(
        x: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, *options: bool, **named: bool
    ) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return cast(torch.Tensor, gather(x, group, sizes, *options, **named))
        whole = gather(padded(x, max(sizes)), group)
        return torch.cat([part[:size] for part, size in zip(whole.split(max(sizes)), sizes, strict=True)])

    def scatter_parts(
        x: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, *options: bool, **named: bool
    ) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return cast(torch.Tensor, scatter(x, group, sizes, *options, **named))
        parts = [padded(part, max(sizes)) for part in x.split(list(sizes))]
        return cast(torch.Tensor, scatter(torch.cat(parts), group))[: sizes[group.rank()]]

    gather_parts.pads_parts = True  # type: ignore[attr-defined]
    module._gather_along_first_dim = gather_parts  # type: ignore[attr-defined]
    module._reduce_scatter_along_first_dim = scatter_parts  # type: ignore[attr-defined]


_DEVICE = "torch.cuda.current_device()"
_TORCH_MODULES: dict[str, tuple[tuple[str, ...], str]] = {
    "megatron.bridge.models.conversion.param_mapping": (("ReplicatedMapping.hf_to_megatron",), _DEVICE),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        ("FileSystemWriterAsync.preload_tensors",),
        "torch.cuda.synchronize()",
    ),
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": (
        ("verify_global_md_reuse", "save_state_dict_async_finalize"),
        'device="cuda"',
    ),
    "megatron.core.distributed.distributed_data_parallel": (
        ("DistributedDataParallel.offload_grad_buffers",),
        "torch.cuda.synchronize()",
    ),
    "megatron.core.distributed.param_and_grad_buffer": (("_ParamAndGradBuffer.__init__",), _DEVICE),
    "megatron.core.models.common.embeddings.rotary_pos_embedding": (
        ("RotaryEmbedding.__init__", "RotaryEmbedding.get_emb"),
        _DEVICE,
    ),
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding": (
        ("YarnRotaryEmbedding.__init__", "YarnRotaryEmbedding.get_emb"),
        _DEVICE,
    ),
    "megatron.core.optimizer.clip_grads": (
        ("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32", "count_zeros_fp32"),
        'device="cuda"',
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        ("DistributedOptimizer.load_state_dict", "DistributedOptimizer.get_parameter_state_dp_zero"),
        _DEVICE,
    ),
    "megatron.core.optimizer.optimizer": (
        ("MixedPrecisionOptimizer.__init__", "FP32Optimizer.__init__", "ChainedOptimizer.get_loss_scale"),
        'device="cuda"',
    ),
    "megatron.core.parallel_state": (
        ("update_pg_timeout", "initialize_model_parallel"),
        "torch.cuda.synchronize() and the device of a barrier",
    ),
    "megatron.core.pipeline_parallel.p2p_communication": (
        ("P2PCommunicator._communicate_shapes", "P2PCommunicator._communicate"),
        f"{_DEVICE} and torch.cuda.synchronize()",
    ),
    "megatron.core.pipeline_parallel.schedules": (
        (
            "forward_backward_no_pipelining",
            "forward_backward_pipelining_with_interleaving",
            "forward_backward_pipelining_without_interleaving",
        ),
        'device="cuda"',
    ),
    "megatron.core.tensor_parallel.layers": (
        (
            "VocabParallelEmbedding.__init__",
            "LinearWithGradAccumulationAndAsyncCommunication.backward",
            "ColumnParallelLinear.__init__",
            "RowParallelLinear.__init__",
        ),
        _DEVICE,
    ),
    "megatron.core.tensor_parallel.mappings": (
        (
            "_gather_along_last_dim",
            "_gather_along_first_dim",
            "_reduce_scatter_along_first_dim",
            "_AllToAll.forward",
        ),
        _DEVICE,
    ),
    "megatron.core.tensor_parallel.random": (
        ("CudaRNGStatesTracker.add", "model_parallel_cuda_manual_seed"),
        "torch.cuda.get_rng_state() and torch.cuda.manual_seed()",
    ),
    "megatron.core.utils": (
        ("GlobalMemoryBuffer.get_tensor", "local_multi_tensor_l2_norm"),
        "a buffer and a gradient norm on the GPU",
    ),
    "megatron.core.transformer.moe.router": (("Router.gating",), _DEVICE),
    "megatron.core.transformer.moe.token_dispatcher": (
        ("MoEAlltoAllTokenDispatcher.__init__", "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize"),
        "torch.cuda.Stream() and torch.cuda.current_stream()",
    ),
    "megatron.core.transformer.attention": (("Attention._allocate_memory",), f"{_DEVICE} of the key and value cache"),
}
_OPTIMIZER = "megatron.core.optimizer"

ADAPTATIONS: tuple[Adaptation, ...] = (
    *(
        Adaptation(
            f"torch in {module}",
            tuple(f"{module}.{name}" for name in names),
            reason,
            MEGATRON_BRIDGE if module.startswith("megatron.bridge.") else MEGATRON_CORE,
            _rebind_torch(module),
        )
        for module, (names, reason) in _TORCH_MODULES.items()
    ),
    Adaptation(
        "random state of tensor-parallel regions",
        (
            "megatron.core.tensor_parallel.random._get_cuda_rng_state",
            "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        ),
        "torch.cuda.random.get_rng_state and torch._C._cuda_setRNGState",
        MEGATRON_CORE,
        _cpu_rng_state,
    ),
    *(
        Adaptation(
            f"tensor types in {function}",
            (f"{module}.{function}",),
            "type() is compared with 'torch.cuda.FloatTensor' and the like",
            MEGATRON_CORE,
            _cpu_tensor_types(module, function),
        )
        for module, function in (
            (f"{_OPTIMIZER}.clip_grads", "clip_grad_by_total_norm_fp32"),
            (f"{_OPTIMIZER}.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
            (f"{_OPTIMIZER}.distrib_optimizer", "DistributedOptimizer.__init__"),
            (f"{_OPTIMIZER}.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
        )
    ),
    Adaptation(
        "tied embedding of the last pipeline stage",
        (
            "megatron.core.models.common.language_module.language_module"
            ".LanguageModule.setup_embeddings_and_output_layer",
        ),
        ".cuda() of a weight that two stages share",
        MEGATRON_CORE,
        _embedding_between_stages,
    ),
    Adaptation(
        "rotary embedding of a context-parallel rank",
        ("megatron.core.models.common.embeddings.rope_utils.get_pos_emb_on_this_cp_rank",),
        ".cuda() of an index in pinned memory",
        MEGATRON_CORE,
        _rotary_embedding_of_a_context_rank,
    ),
    Adaptation(
        "splits of dispatched tokens",
        ("megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",),
        "only tensors on a GPU become arrays",
        MEGATRON_CORE,
        _splits_of_dispatched_tokens,
    ),
    Adaptation(
        "parts of split experts",
        (
            "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
            "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        ),
        "torch.distributed.all_gather and reduce_scatter of parts of unequal lengths, which only NCCL supports",
        MEGATRON_CORE,
        _unequal_parts,
    ),
    Adaptation(
        "contiguous shards in Megatron-Bridge's scatter",
        ("megatron.bridge.models.conversion.param_mapping.MegatronParamMapping.scatter_to_tp_ranks",),
        "scatters views, for which gloo sends wrong bytes",
        MEGATRON_BRIDGE_0_3,
        _contiguous_scatter,
    ),
)
"""All changes on a machine without CUDA, in order of application."""


def adapt_megatron() -> None:
    """Apply `LOCAL_LAYERS` and, without CUDA, `ADAPTATIONS`.

    Idempotent; imports megatron-core and Megatron-Bridge.

    Raises:
        RuntimeError: a library no longer has the part that an adaptation changes.
    """
    # These come first: every import from Megatron-Bridge needs them.
    apply_all(LOCAL_LAYERS, listed_in="nemo_popsd/runtime/local_layers.py")
    if not torch.cuda.is_available():
        apply_all(ADAPTATIONS, listed_in="nemo_popsd/runtime/cpu.py")
