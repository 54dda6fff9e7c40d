"""Runs in vLLM's workers and loads buckets of weights into the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

import torch
from popsd_buckets import read_bucket
from popsd_interfaces import BACKEND, has_weight_transfer
from popsd_wire import Tensors
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class _Model(Protocol):
    """The methods used of vLLM's model."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]: ...


class _QuantMethod(Protocol):
    """The method used of vLLM's quantisation method of a layer."""

    def process_weights_after_loading(self, layer: object) -> None: ...


class _Layer(Protocol):
    """A layer of vLLM with a method."""

    quant_method: _QuantMethod


class _ModelRunner(Protocol):
    model: _Model


class _Worker(Protocol):
    """The attributes used of vLLM's worker, and the loader of the current update."""

    vllm_config: VllmConfig
    model_runner: _ModelRunner
    popsd_loader: BucketLoader


class BucketLoader:
    """One update of one worker's model from full tensors under Hugging Face's names, which vLLM shards and fuses."""

    def __init__(self, model: _Model, model_config: ModelConfig) -> None:
        """Prepares the model.

        If vLLM supports it, a layer is assembled separately and processed when its weights are complete: kernels
        receive the packed matrices that they need, and captured graphs keep their addresses.
        """
        self._model = model
        self._model_config = model_config
        self._missing = {name for name, _ in model.named_parameters()}
        self._tied = _tied_layers(model)
        try:
            from vllm.model_executor.model_loader import reload
        except ImportError:
            self._reload: ModuleType | None = None
        else:
            self._reload = reload
            reload.initialize_layerwise_reload(model)

    @torch.no_grad()
    def bucket(self, path: str, tensors: Tensors) -> None:
        """Loads the tensors of one bucket, or keeps them until their layer is complete."""
        self._missing -= self._model.load_weights(iter(read_bucket(path, tensors)))

    @torch.no_grad()
    def finish(self) -> None:
        """Ends the update.

        Raises:
            ValueError: some parameters got no new weights.
        """
        if self._missing:
            raise ValueError(f"no weights came for {len(self._missing)} parameters: {sorted(self._missing)[:4]}")
        if self._reload is not None:
            self._reload.finalize_layerwise_reload(self._model, self._model_config)
            # Only layers that were loaded are processed. An output layer that is tied to the embedding was not, and on
            # CPUs would use the packed copy of the old matrix.
            for layer in self._tied:
                layer.quant_method.process_weights_after_loading(layer)
            if current_platform.is_cpu():
                _pack_experts(self._model)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _pack_experts(model: _Model) -> None:
    """Packs the experts' matrices for kernels on CPUs, which vLLM does only at the first load."""
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def _tied_layers(model: _Model) -> list[_Layer]:
    """Layers with a parameter that an earlier layer also has."""
    seen: set[int] = set()
    tied: list[_Layer] = []
    for layer in model.modules():
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if own & seen and hasattr(layer, "quant_method"):
            tied.append(cast(_Layer, layer))
        seen |= own
    return tied


class WorkerExtension:
    """Methods for `collective_rpc` in every worker; vLLM makes the worker's class inherit from this one."""

    def popsd_begin(self: _Worker) -> None:
        """Starts an update."""
        with set_current_vllm_config(self.vllm_config):
            self.popsd_loader = BucketLoader(self.model_runner.model, self.vllm_config.model_config)

    def popsd_bucket(self: _Worker, path: str, tensors: Tensors) -> None:
        """See `BucketLoader.bucket`."""
        with set_current_vllm_config(self.vllm_config):
            self.popsd_loader.bucket(path, tensors)

    def popsd_commit(self: _Worker) -> None:
        """See `BucketLoader.finish`."""
        with set_current_vllm_config(self.vllm_config):
            self.popsd_loader.finish()
        del self.popsd_loader


if has_weight_transfer():
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    @dataclass
    class HostInitInfo(WeightTransferInitInfo):
        """No arguments."""

    @dataclass
    class HostUpdateInfo(WeightTransferUpdateInfo):
        """One bucket."""

        path: str
        tensors: Tensors = field(default_factory=list)

    class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
        """Back end `popsd_host`: buckets in host memory. Needs neither a GPU nor the trainer's version of torch."""

        init_info_cls = HostInitInfo
        update_info_cls = HostUpdateInfo
        _loader: BucketLoader | None = None

        def init_transfer_engine(self, init_info: HostInitInfo) -> None:
            """Does nothing."""

        def start_weight_update(self) -> None:
            """Starts an update."""
            self._loader = BucketLoader(self.model, self.model_config)

        def receive_weights(self, update_info: HostUpdateInfo) -> None:
            """One bucket."""
            assert self._loader is not None
            self._loader.bucket(update_info.path, update_info.tensors)

        def finish_weight_update(self) -> None:
            """Ends an update."""
            assert self._loader is not None
            self._loader.finish()
            self._loader = None

        def shutdown(self) -> None:
            """Nothing to close."""
            self._loader = None

        @staticmethod
        def trainer_send_weights(*arguments: object, **named: object) -> None:
            """Abstract in some versions; the trainer does not use it."""
            raise NotImplementedError("the trainer sends buckets without vLLM")

    WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransferEngine)
