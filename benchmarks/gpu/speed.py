"""Head, target, divergence and backward: time, TFLOP/s and peak memory; also of the products alone and of Liger's JSD.

Legend as in `benchmarks/README.md`: F = 2·T·V·H is one product; this package does 5 with the tanh and dW. The unit
of memory is an fp32 tensor [T, V]. Liger's fused linear JSD takes one teacher's states instead of three and does 4 F,
dW included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.forms import CudaProducts, PackageLoss, Problem, Products, make_problem
from benchmarks.gpu.journal import Report
from benchmarks.measure import interleaved, peak_bytes
from nemo_popsd.distillation.chunks import LARGEST_CHUNK

_HIDDEN = 4096
_SIZES = [(tokens, vocab) for vocab in (19000, 152000) for tokens in (1024, 8192, 32768)]
_PRODUCTS = {"nemo_popsd": 5, "its products alone": 5, "Liger, JSD of one teacher": 4}


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = 32 if rehearse else _HIDDEN
    for tokens, vocab in [(32, 200), (64, 400)] if rehearse else _SIZES:
        try:
            _measure(report, tokens, vocab, hidden, device)
        except torch.OutOfMemoryError:
            report("bf16", T=tokens, V=vocab, H=hidden, form="out of memory")
        if device == "cuda":
            torch.cuda.empty_cache()


def _measure(report: Report, tokens: int, vocab: int, hidden: int, device: str) -> None:
    problem = make_problem(tokens, vocab, hidden, device=device, dtype=torch.bfloat16)
    products = CudaProducts if device == "cuda" else Products
    actions: dict[str, Callable[[], Any]] = {
        "nemo_popsd": PackageLoss(problem),
        "its products alone": products(problem, LARGEST_CHUNK),
    }
    if device == "cuda" and (liger := _liger(problem)) is not None:
        try:
            liger()
            actions["Liger, JSD of one teacher"] = liger
        except Exception as error:  # must not prevent the other measurements
            report("bf16", T=tokens, V=vocab, H=hidden, form=f"Liger failed: {str(error).splitlines()[0]}")
    for action in actions.values():
        action()  # compiles
    taken = interleaved(actions, 5)
    for form, action in actions.items():
        seconds = taken[form]
        report(
            "bf16",
            T=tokens,
            V=vocab,
            H=hidden,
            form=form,
            ms=seconds * 1e3,
            over_products=seconds / taken["its products alone"],
            tflops=_PRODUCTS[form] * 2 * tokens * vocab * hidden / seconds / 1e12,
            peak_memory=peak_bytes(action) / (4 * tokens * vocab),
        )


def _liger(problem: Problem) -> Callable[[], Any] | None:
    """Forward and backward of Liger's fused linear JSD; None if it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return None
    jsd = LigerFusedLinearJSD(jsd_beta=0.5)

    def call() -> None:
        hidden, weight = problem.leaves()
        jsd(hidden, weight, problem.privileged, problem.weight, None).backward()

    return call
