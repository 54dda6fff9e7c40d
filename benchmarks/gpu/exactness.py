"""Compares loss, gradients and the attention of local layers on this device with float64 on the CPU.

Errors are ‖got − want‖ / ‖want‖. Rounding in the precision stays below the limits; a larger error is a wrong result.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.forms import PackageLoss, UnderAutograd, make_problem
from benchmarks.gpu.journal import Report

_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_LENGTHS = [37, 1, 130, 64]


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _loss(report, device, (64, 500, 64) if rehearse else (1024, 19000, 512))
    _attention(report, device)


def _loss(report: Report, device: torch.device, sizes: tuple[int, int, int]) -> None:
    tokens, vocab, hidden = sizes
    for dtype in (torch.bfloat16, torch.float32):
        for kind, cap in (("jsd", 10.0), ("jsd", None), ("forward_kl", 10.0), ("reverse_kl", 10.0)):
            problem = make_problem(tokens, vocab, hidden, cap=cap, kind=kind, dtype=dtype)
            want = UnderAutograd(problem.to(torch.float64))()
            for fused in ("never", "always") if device.type == "cuda" else ("never",):
                got = PackageLoss(problem.on(device), fused=fused)()
                errors = {"value": _error(got.total, want.total), "dh": _error(got.dh, want.dh)}
                if got.dw is not None and want.dw is not None:
                    errors["dW"] = _error(got.dw, want.dw)
                report(
                    f"loss, T={tokens}, V={vocab}, H={hidden}",
                    precision=_name(dtype),
                    divergence=kind,
                    cap=cap,
                    fused=fused,
                    **errors,
                    verdict=_verdict(max(errors.values()), dtype),
                )


def _attention(report: Report, device: torch.device) -> None:
    """Packed sequences with grouped heads through the local core attention."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_popsd.megatron.kernels import packed_kernel
    from nemo_popsd.megatron.layers import LocalCoreAttention

    heads, groups, width, total = 8, 2, 64, sum(_LENGTHS)
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(device, torch.int32)
    longest = max(_LENGTHS)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for window in (None, 16):
            config = TransformerConfig(
                num_layers=1,
                hidden_size=heads * width,
                num_attention_heads=heads,
                num_query_groups=groups,
                attention_dropout=0.0,
                normalization="RMSNorm",
                window_size=None if window is None else (window - 1, 0),
            )
            collection = ProcessGroupCollection(cp=None, tp=None)
            core = LocalCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=collection)
            inputs = [torch.randn(total, n, width, generator=generator).to(dtype) for n in (heads, groups, groups)]
            upstream = torch.randn(total, heads * width, generator=generator).to(dtype)
            leaves = [x.clone().to(device).requires_grad_() for x in inputs]
            output = core(*leaves, packed_seq_params=packed)
            output.backward(upstream.to(device))
            wide = [x.double().requires_grad_() for x in inputs]
            expected = _dense_attention(*wide, window)
            expected.backward(upstream.double())
            errors = {"output": _error(output, expected)}
            for name, leaf, other in zip("qkv", leaves, wide, strict=True):
                assert leaf.grad is not None
                assert other.grad is not None
                errors[f"d{name}"] = _error(leaf.grad, other.grad)
            kernel = packed_kernel(leaves[0], width**-0.5, window)
            report(
                "attention of packed sequences, local layers",
                precision=_name(dtype),
                window=window,
                at_once="yes" if kernel is not None else "one by one",
                **errors,
                verdict=_verdict(max(errors.values()), dtype),
            )


def _dense_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    sequence = torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS))
    distance = torch.arange(len(sequence))[:, None] - torch.arange(len(sequence))[None]
    visible = (sequence[:, None] == sequence[None]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    scores = torch.einsum("snd,tnd->nst", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("nst,tnd->snd", weights, value).flatten(1)


def _error(got: Tensor, want: Tensor) -> float:
    got, want = (x.detach().cpu().double() for x in (got, want))
    return float((got - want).norm() / want.norm())


def _verdict(error: float, dtype: torch.dtype) -> str:
    return "right" if error < _LIMITS[dtype] else f"WRONG: above {_LIMITS[dtype]:g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
