"""The imports of a server of `tests.fork_servers`, which ranks then share. Does not initialize anything."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

from tests.silence import silence

os.environ["JE_ARROW_MALLOC_CONF"] = (
    "background_thread:false"  # pyarrow's allocator: a server that forks has one thread
)

gc.disable()  # imported objects are never freed
with silence():
    for _name in (
        "torch",
        "torch.distributed",
        "pytest",
        "hypothesis",
        "megatron.core",
        "transformers.models.qwen3.modeling_qwen3",
        "nemo_popsd.model.purified_opsd",
    ):
        # A package that cannot be imported is reported by the tests that need it.
        with contextlib.suppress(Exception):
            importlib.import_module(_name)
# Garbage collection in a rank then neither visits nor copies objects that all ranks share.
gc.freeze()
gc.enable()
