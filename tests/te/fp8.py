"""Transformer Engine's FP8 on the emulated extension: products of rounded operands, by the recipe that is entered.

Kernels on FP8 tensors are not emulated. Megatron enters Transformer Engine's autocast for a layer or a model;
`recorded_autocast` puts a context in its place, in which the emulated product rounds both operands as the recipe scales
them. It records each entry, and the shapes of all products in it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nemo_popsd.diagnosis.fp8_rounding import ROUNDINGS

NAMES = {
    "DelayedScaling": "delayed",
    "Float8CurrentScaling": "tensorwise",
    "Float8BlockScaling": "blockwise",
    "MXFP8BlockScaling": "mxfp8",
}


@dataclass
class Entries:
    """Records the FP8 contexts that were entered.

    Attributes:
        recipes: class of the recipe, by entry.
        recipe: the last one.
        group: over which it reduces scales.
        rows: tokens of the products in FP8.
    """

    recipes: list[str] = field(default_factory=list)
    recipe: Any = None
    group: Any = None
    rows: list[int] = field(default_factory=list)


@contextlib.contextmanager
def recorded_autocast() -> Iterator[Entries]:
    """Context in which autocasts are recorded and their products rounded."""
    import transformer_engine.pytorch as te

    extension: Any = sys.modules["transformer_engine_torch"]
    entries, stack = Entries(), []
    right, exact = te.fp8_autocast, extension.generic_gemm

    @contextlib.contextmanager
    def autocast(*, enabled: bool, fp8_recipe: Any, fp8_group: Any) -> Iterator[None]:
        assert enabled
        name = next(kind.__name__ for kind in type(fp8_recipe).__mro__ if kind.__name__ in NAMES)
        entries.recipes.append(name)
        entries.recipe, entries.group = fp8_recipe, fp8_group
        stack.append(NAMES[name])
        try:
            yield
        finally:
            stack.pop()

    def product(weight: Tensor, transa: bool, x: Tensor, transb: bool, *rest: Any, **options: Any) -> Any:
        if stack:
            assert transa
            assert not transb, "a forward product"
            entries.rows.append(x.numel() // x.shape[-1])
            inputs, weights = ROUNDINGS[stack[-1]]()
            weight, x = weights(weight).to(weight.dtype), inputs(x).to(x.dtype)
        return exact(weight, transa, x, transb, *rest, **options)

    te.fp8_autocast, extension.generic_gemm = autocast, product
    try:
        yield entries
    finally:
        te.fp8_autocast, extension.generic_gemm = right, exact
