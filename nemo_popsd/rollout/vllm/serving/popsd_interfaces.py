"""Which of vLLM's interfaces takes the weights, in which version. All that depends on vLLM's version is decided here.

interface            what it is
-------------------  --------------------------------------------------------------------------------------------------
`weight-transfer`    `LLM.start_weight_update`, `update_weights`, `finish_weight_update`, with a back end of ours,
                     registered in vLLM's `WeightTransferEngineFactory`. vLLM has had a weight-transfer API since
                     0.16.0; later its engines came to own start and finish too, which a back end from outside needs.
                     Seen at work: 0.25.0, 0.32.0.
`worker-extension`   `worker_extension_cls` and `collective_rpc`, as vLLM's own RLHF examples did before there was
                     anything else. Seen at work: 0.14.1, 0.17.1, 0.20.1, 0.32.0.

LoRA adapters need neither: `popsd_adapter` uses `LLMEngine.add_lora`, the same in all of them.

The choice asks for the methods, not for version numbers. Both hand the same buckets to the same loader
(`popsd_weights`), which reloads layer by layer where vLLM can, and loads in place where it cannot (0.14.1).
"""

from __future__ import annotations

import inspect
from typing import Any

WEIGHT_TRANSFER = "weight-transfer"
WORKER_EXTENSION = "worker-extension"
METHODS = {
    "init_transfer_engine",
    "start_weight_update",
    "receive_weights",
    "finish_weight_update",
    "shutdown",
    "trainer_send_weights",
}
"""What our back end has of what a version may demand."""
BACKEND = "popsd_host"
"""Name of our back end in vLLM's registry."""


def choose(wanted: str) -> str:
    """The interface to use: `wanted`, or for `auto` the newest that this vLLM has.

    Raises:
        ValueError: this vLLM does not have the one that is wanted.
    """
    if wanted == WORKER_EXTENSION or (wanted == "auto" and not has_weight_transfer()):
        return WORKER_EXTENSION
    if not has_weight_transfer():
        raise ValueError(f"this vLLM has no {WEIGHT_TRANSFER} interface that takes a back end from outside")
    return WEIGHT_TRANSFER


def has_weight_transfer() -> bool:
    """Whether weight-transfer engines know their model and own start, update and finish, which `LLM` passes on."""
    try:
        from vllm import LLM
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
    except ImportError:
        return False
    names = ("start_weight_update", "update_weights", "finish_weight_update")
    given = inspect.signature(WeightTransferEngine.__init__).parameters
    complete = all(hasattr(owner, name) for owner in (LLM, WeightTransferEngine) for name in names)
    # An engine of a version that asks for more than ours has could not even be made.
    return complete and {"vllm_config", "model"} <= set(given) and WeightTransferEngine.__abstractmethods__ <= METHODS


def arguments(interface: str) -> dict[str, Any]:
    """What `LLM` needs for it, beside the worker extension, whose import registers the back end in each worker."""
    if interface == WORKER_EXTENSION:
        return {}
    from vllm.config import WeightTransferConfig

    return {"weight_transfer_config": WeightTransferConfig(backend=BACKEND)}


class Weights:
    """Weights of a running `LLM`, replaced through one interface."""

    def __init__(self, llm: Any, interface: str) -> None:
        """Keeps references."""
        self._llm = llm
        self._interface = interface
        if interface == WEIGHT_TRANSFER:
            llm.init_weight_transfer_engine({"init_info": {}})

    def begin(self) -> None:
        """Before the first bucket."""
        if self._interface == WEIGHT_TRANSFER:
            self._llm.start_weight_update()
        else:
            self._llm.collective_rpc("popsd_begin")

    def bucket(self, path: str, tensors: list[list[Any]]) -> None:
        """One bucket; when this returns, the file at `path` has been mapped or read by every worker.

        Args:
            path: file with the bytes.
            tensors: name, dtype, shape and offset of each.
        """
        if self._interface == WEIGHT_TRANSFER:
            self._llm.update_weights({"update_info": {"path": path, "tensors": tensors}})
        else:
            self._llm.collective_rpc("popsd_bucket", args=(path, tensors))

    def commit(self, version: int) -> None:
        """After the last bucket.

        Raises:
            Exception: a worker misses weights.
        """
        if self._interface == WORKER_EXTENSION:
            self._llm.collective_rpc("popsd_commit")
        elif "weight_version" in inspect.signature(self._llm.finish_weight_update).parameters:
            self._llm.finish_weight_update(weight_version=str(version))
        else:
            self._llm.finish_weight_update()
