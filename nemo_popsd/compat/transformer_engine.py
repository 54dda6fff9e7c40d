"""Transformer Engine 2.9 to 2.20. Import only where it is installed."""

from __future__ import annotations


def fp8_obstacle(recipe: str) -> str:
    """Why this GPU and CUDA cannot compute with a recipe of `fp8.recipe`, in Transformer Engine's words; "" if they
    can.
    """
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as State

    checks = {"mxfp8": State.is_mxfp8_available, "blockwise": State.is_fp8_block_scaling_available}
    available, reason = checks.get(recipe, State.is_fp8_available)()
    return "" if available else str(reason)
