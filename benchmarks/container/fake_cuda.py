"""Runs loss, sampling and local layers on fake CUDA tensors, which reveal wrong devices and dtypes without a driver.

    python -m benchmarks.container.fake_cuda MODEL      torch's CUDA build; MODEL is a small Hugging Face directory

A fake tensor has a device, a dtype and a shape, but no values. Autograd's engine needs a driver for CUDA tensors, so
only the backward pass of the loss is called, directly.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.tables import table

GPU = torch.device("cuda:0")
_VOCABULARY, _HIDDEN, _TOKENS = 151936, 64, 700
_RANK = 8


def loss(kind: str, full: bool, cap: float | None) -> str:
    """Forward and backward of the loss in bf16; returns a description of the results."""
    from nemo_popsd.distillation import (
        Divergence,
        MainGradient,
        Target,
        hidden,
        hidden_pair,
        loss_from_hidden,
    )
    from nemo_popsd.parallel.vocabulary import VocabShard

    with FakeTensorMode(), patch.object(torch, "addmm", _addmm):
        weight = torch.empty(_VOCABULARY, _HIDDEN, dtype=torch.bfloat16, device=GPU).requires_grad_(full)
        teacher = torch.empty_like(weight).detach() if full else weight.detach()
        states = [torch.empty(_TOKENS, _HIDDEN, dtype=torch.bfloat16, device=GPU) for _ in range(4)]
        target = Target.purified(cap=cap)
        main = MainGradient(torch.empty(_VOCABULARY, _HIDDEN, device=GPU), 1.0) if full else None
        result = loss_from_hidden(
            states[0].requires_grad_(),
            weight,
            hidden_pair(target, base=states[1], privileged=states[2], reference=states[3]),
            teacher,
            target=target,
            divergence=Divergence(kind),
            shard=VocabShard(_VOCABULARY - 100, _VOCABULARY),
            token_weights=torch.empty(_TOKENS, device=GPU),
            chunk_tokens=256,
            main_gradient=main,
            fused="never",
        )
        context: Any = result.total.grad_fn
        upstream = torch.ones((), device=GPU)
        dh = hidden._HiddenLossFunction.backward(context, upstream, None, None, None)[0]
        assert isinstance(dh, Tensor)
        return _described(result.total, result.per_token, dh)


def _addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Any = None, **options: Any) -> Tensor:
    """`torch.addmm` with `out_dtype`, which fake tensors do not support; checks what its CUDA kernel checks."""
    if out_dtype is None:
        return torch.ops.aten.addmm.default(total, a, b, **options)
    assert a.dtype == b.dtype
    assert a.shape[1] == b.shape[0]
    assert out_dtype == a.dtype or (out_dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16))
    assert out.dtype == out_dtype
    assert total.dtype in (out_dtype, a.dtype)
    assert total.device == a.device == b.device == out.device
    return out


def sampling(top_k: int, top_p: float, temperature: float) -> str:
    """Samples one token from bf16 logits; returns a description of the results."""
    from nemo_popsd.parallel.vocabulary import VocabShard
    from nemo_popsd.rollout.engine import SamplingParams
    from nemo_popsd.rollout.sampling import sample_tokens

    with FakeTensorMode():
        logits = torch.empty(4, 1024, dtype=torch.bfloat16, device=GPU)
        uniform = torch.empty(4, dtype=torch.float64, device=GPU)
        params = SamplingParams(temperature, top_p, top_k, 8, frozenset())
        return _described(*sample_tokens(logits, params, uniform, VocabShard(1000, 1024)))


def layers(architecture: Any, precision: str, adapted: bool) -> str:
    """A model with local layers, as on a GPU without Transformer Engine: packed and padded forward, and decoding."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from nemo_popsd.megatron.adapters import Adapters
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.megatron.config import LoRAConfig, StudentConfig
    from nemo_popsd.megatron.decoding import SlotDecoder
    from nemo_popsd.megatron.forward import hidden_states_only
    from nemo_popsd.parallel.config import ParallelConfig

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        config = StudentConfig(precision=precision, layers="local")
        with GPU:
            chunks = build_chunks(architecture.provider(), config, ParallelConfig())
            if adapted:
                Adapters(chunks, LoRAConfig(rank=_RANK), seed=1)
        ids = torch.zeros(1, 12, dtype=torch.long, device=GPU)
        bounds = torch.empty(4, dtype=torch.int32, device=GPU)
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=6, max_seqlen_kv=6)
        outputs = []
        # In fp32, attention processes packed sequences one by one, which needs their lengths.
        for bound in (packed, None) if precision == "bf16" else (None,):
            with hidden_states_only(chunks[0]):
                outputs.append(chunks[0](input_ids=ids, position_ids=ids, attention_mask=None, packed_seq_params=bound))
        decoder = SlotDecoder(chunks, 4, 40)
        with decoder.open():
            decoder.prefill(torch.zeros(2, dtype=torch.long, device=GPU), ids.view(2, 6))
            logits = decoder.next_logits(ids[0, :4], ids[0, :4], 32)
        assert logits is not None
        return _described(*outputs, logits)


def _described(*tensors: Tensor) -> str:
    assert {tensor.device for tensor in tensors} == {GPU}
    return ", ".join(f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors)


def cases(model: Path) -> list[tuple[str, Callable[[], str]]]:
    """Name and check of each case. Creates the process groups of one rank."""
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel

    found: list[tuple[str, Callable[[], str]]] = []
    choices = itertools.product(("jsd", "forward_kl", "reverse_kl"), (False, True), (10.0, None))
    for kind, full, cap in choices:
        name = f"loss, {kind}, {'full' if full else 'LoRA'}, cap {cap}"
        found.append((name, lambda a=(kind, full, cap): loss(*a)))
    for top_k, top_p, temperature in ((0, 1.0, 1.0), (20, 0.95, 1.1), (0, 0.9, 1.0), (20, 1.0, 1.0), (0, 1.0, 0.0)):
        name = f"sampling, top_k {top_k}, top_p {top_p}, temperature {temperature}"
        found.append((name, lambda a=(top_k, top_p, temperature): sampling(*a)))
    architecture = HuggingFaceModel(model)
    for precision, adapted in itertools.product(("bf16", "fp32"), (True, False)):
        name = f"local layers, {precision}, {'LoRA' if adapted else 'plain'}"
        found.append((name, lambda a=(precision, adapted): layers(architecture, *a)))
    return found


@contextlib.contextmanager
def _as_on_a_gpu() -> Any:
    """Replaces functions that need a driver or that fake parameters do not support."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from nemo_popsd.megatron import adapters

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with contextlib.ExitStack() as stack:
        for owner, name, other in (
            (CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext()),
            (adapters, "_sample_full", lambda *_: None),  # copies values from the host
            (rope_utils, "_apply_rotary_pos_emb_thd", lambda t, *_, **__: t),  # reads the lengths on the host
            (nn.Module, "_apply", _apply),
        ):
            stack.enter_context(patch.object(owner, name, other))
        yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters, since fake ones cannot be swapped."""
    for child in module.children():
        _apply(child, function)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            new = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)
            module._parameters[name] = new
    return module


def pretend_driver() -> None:
    """Makes torch report one CUDA device for the rest of the process. Call it before Megatron is imported."""
    torch._C._ensureCUDADeviceGuardSet()  # C++ switches devices without a driver, as fake tensors need it
    for name, answer in (
        ("is_available", True),
        ("is_initialized", False),
        ("current_device", 0),
        ("device_count", 1),
        ("get_device_capability", (9, 0)),
        ("synchronize", None),
        ("_lazy_init", None),
    ):
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    fake_tensor.init_gpu_context = lambda *_: None  # type: ignore[attr-defined]


def main() -> int:
    """Runs the command; returns 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    pretend_driver()
    from nemo_popsd.runtime.cpu import adapt_megatron

    adapt_megatron()  # with a device: installs what local layers need and skips the CPU substitutes
    rows, failed = [], 0
    with _as_on_a_gpu():
        for name, check in cases(options.model):
            try:
                rows.append([name, check()])
            except Exception as error:
                failed += 1
                traceback.print_exc()
                rows.append([name, f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"])
    print(table(["case", "out, all on cuda:0"], rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
