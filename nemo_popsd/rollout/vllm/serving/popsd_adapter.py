"""LoRA in vLLM: each version of the adapters is a directory in PEFT's format, which vLLM applies to its base."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from popsd_buckets import read_bucket
from popsd_wire import Adapter as Config
from popsd_wire import Tensors
from safetensors.torch import save_file
from torch import Tensor
from vllm.lora.request import LoRARequest

if TYPE_CHECKING:
    from vllm import LLM

INTERFACE = "adapter"


class Adapter:
    """The adapters of a running `LLM`, replaced as `popsd_interfaces.Weights` replaces weights.

    Attributes:
        request: passed with each request so that vLLM applies the adapters; None before the first version.
    """

    def __init__(self, llm: LLM, config: Config) -> None:
        """Keeps references.

        Args:
            llm: created with `enable_lora`.
            config: `r` and `lora_alpha`.
        """
        self._engine = llm.llm_engine
        self._config = config
        self._tensors: dict[str, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0
        self.request: LoRARequest | None = None

    def begin(self) -> None:
        """Starts an update."""
        self._tensors = {}

    def bucket(self, path: str, tensors: Tensors) -> None:
        """Stores the tensors of a bucket; see `read_bucket`."""
        self._tensors |= read_bucket(path, tensors)

    def commit(self, version: int) -> None:
        """Ends an update: vLLM loads the adapters and removes those of the previous version.

        Raises:
            Exception: vLLM refuses the adapters.
        """
        folder = tempfile.TemporaryDirectory(prefix="popsd-adapter-")
        modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in self._tensors}
        config = {"peft_type": "LORA", "bias": "none", "lora_dropout": 0.0, "target_modules": sorted(modules)}
        (Path(folder.name) / "adapter_config.json").write_text(json.dumps(config | self._config))
        # Clones, because linears that share one A share its storage, which safetensors refuses.
        save_file(
            {name: tensor.clone() for name, tensor in self._tensors.items()}, f"{folder.name}/adapter_model.safetensors"
        )
        self._tensors = {}
        if self.request is not None:
            self._engine.remove_lora(self.request.lora_int_id)
        self._count += 1  # vLLM identifies adapters by an integer, which must not be reused
        self.request = LoRARequest(f"step-{version}", self._count, folder.name)
        if not self._engine.add_lora(self.request):
            raise RuntimeError(f"vLLM did not load the adapters of step {version}")
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = folder
