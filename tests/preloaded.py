"""What a server of `tests.fork_servers` imports once, so that no rank has to: imports, nothing initialised."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import warnings
from collections.abc import Iterator

os.environ["JE_ARROW_MALLOC_CONF"] = (
    "background_thread:false"  # pyarrow's allocator: a server that forks has one thread
)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Context in which nothing is printed, neither by handlers of logging that keep the standard streams."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(os.devnull, "w") as nothing:
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
    try:
        yield
    finally:
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


gc.disable()  # what is imported stays
with _silence(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
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
