"""Imports that a server of `tests.fork_servers` makes once for all ranks; initialises nothing."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

from tests.silence import silence

os.environ["JE_ARROW_MALLOC_CONF"] = (
    "background_thread:false"  # pyarrow's allocator: a server that forks has one thread
)

gc.disable()  # what is imported stays
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
# A collection in a rank neither visits nor copies what all ranks share.
gc.freeze()
gc.enable()
