"""Chooses vLLM's interface for weights. Only this module depends on vLLM's version.

interface            description
-------------------  --------------------------------------------------------------------------------------------------
`weight-transfer`    `LLM.start_weight_update`, `update_weights`, `finish_weight_update`, with the back end
                     `popsd_host`, registered in vLLM's `WeightTransferEngineFactory`. vLLM has a weight-transfer API
                     since 0.16.0; an external back end needs a version whose engines also own start and finish.
                     Tested with 0.25.0 and 0.32.0.
`worker-extension`   `worker_extension_cls` and `collective_rpc`, as in vLLM's older RLHF examples. Tested with
                     0.14.1, 0.17.1, 0.20.1 and 0.32.0.

LoRA adapters need neither: `popsd_adapter` uses `LLMEngine.add_lora`, which is the same in all of these versions.

The choice depends on the methods that vLLM has, not on its version number. Both interfaces pass the same buckets to the
same loader (`popsd_weights`), which reloads layer by layer where vLLM supports it, and else in place (0.14.1).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from popsd_wire import Tensors
    from vllm import LLM

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
"""Methods of `popsd_host`, which must include all abstract methods of the installed version."""
BACKEND = "popsd_host"
"""Name of the back end in vLLM's registry."""


def choose(wanted: str) -> str:
    """The interface to use: `wanted`, or for `auto` the newest that this vLLM has.

    Raises:
        ValueError: this vLLM does not have the requested interface.
    """
    if wanted == WORKER_EXTENSION or (wanted == "auto" and not has_weight_transfer()):
        return WORKER_EXTENSION
    if not has_weight_transfer():
        raise ValueError(f"this vLLM has no {WEIGHT_TRANSFER} interface that takes a back end from outside")
    return WEIGHT_TRANSFER


def has_weight_transfer() -> bool:
    """Whether weight-transfer engines receive the model and have start, update and finish, to which `LLM` forwards."""
    try:
        from vllm import LLM
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
    except ImportError:
        return False
    names = ("start_weight_update", "update_weights", "finish_weight_update")
    parameters = inspect.signature(WeightTransferEngine.__init__).parameters
    complete = all(hasattr(owner, name) for owner in (LLM, WeightTransferEngine) for name in names)
    # If a version has further abstract methods, `popsd_host` cannot be instantiated.
    return (
        complete and {"vllm_config", "model"} <= set(parameters) and WeightTransferEngine.__abstractmethods__ <= METHODS
    )


def arguments(interface: str) -> dict[str, object]:
    """Arguments of `LLM`, in addition to the worker extension, whose import registers the back end in each worker."""
    if interface == WORKER_EXTENSION:
        return {}
    from vllm.config import WeightTransferConfig

    return {"weight_transfer_config": WeightTransferConfig(backend=BACKEND)}


class Weights:
    """Weights of a running `LLM`, replaced through one interface."""

    def __init__(self, llm: LLM, interface: str) -> None:
        """Keeps references."""
        self._llm = llm
        self._interface = interface
        if interface == WEIGHT_TRANSFER:
            llm.init_weight_transfer_engine({"init_info": {}})

    def begin(self) -> None:
        """Starts an update."""
        if self._interface == WEIGHT_TRANSFER:
            self._llm.start_weight_update()
        else:
            self._llm.collective_rpc("popsd_begin")

    def bucket(self, path: str, tensors: Tensors) -> None:
        """Loads a bucket; when this returns, every worker has mapped or read the file at `path`.

        Args:
            path: of the file.
            tensors: name, dtype, shape and offset of each.
        """
        if self._interface == WEIGHT_TRANSFER:
            self._llm.update_weights({"update_info": {"path": path, "tensors": tensors}})
        else:
            self._llm.collective_rpc("popsd_bucket", args=(path, tensors))

    def commit(self, version: int) -> None:
        """Ends an update.

        Raises:
            Exception: a worker did not receive all weights.
        """
        if self._interface == WORKER_EXTENSION:
            self._llm.collective_rpc("popsd_commit")
        elif "weight_version" in inspect.signature(self._llm.finish_weight_update).parameters:
            self._llm.finish_weight_update(weight_version=str(version))
        else:
            self._llm.finish_weight_update()
