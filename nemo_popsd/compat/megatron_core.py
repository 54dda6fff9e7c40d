"""megatron-core 0.16 and 0.19."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def async_save_options() -> Mapping[str, Any]:
    """Arguments of `megatron.core.dist_checkpointing.save` for an asynchronous save that returns Megatron's own request.

    0.16 has no other kind. 0.19 has two, and prefers that of the package nvidia-resiliency-ext.
    """
    from megatron.core import dist_checkpointing

    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        return {"async_strategy": "mcore"}
    return {}
