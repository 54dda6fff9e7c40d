"""Redirects irrelevant output and warnings of libraries to the logger `nemo_popsd.libraries` at level debug.

`POPSD_LOG_LEVEL=debug` shows them. Errors and unexpected warnings of libraries are not affected.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from typing import Any

logger = logging.getLogger("nemo_popsd.libraries")

_EXPECTED_WARNINGS = (
    ".*Apex.*not installed.*",  # megatron-core without CUDA falls back to torch, as `nemo_popsd.runtime.cpu` intends
    ".*legacy GroupedMLP.*",  # the same, without Transformer Engine
    ".*does not have many workers.*",  # batches are lists of token ids; nothing is loaded in the background
    ".*Only transformer-engine>=.* supports MoE experts.*",  # likewise, in 0.19
    ".*full scope is deprecated.*",  # megatron-core's own default for CUDA graphs, which are not used
    ".*`load_state_dict` is deprecated.*",  # called by megatron-core to read a distributed checkpoint
    ".*Please use DTensor instead.*",  # likewise
    ".*It is recommended to use `self.log.*",  # logged values are already reduced over all ranks
)

_EXPECTED_LINES = (
    "gradient_accumulation_fusion requires",  # megatron-core without apex: the spec disables the fusion
    # transformers warns of an "incorrect regex pattern" for every local tokenizer with a large vocabulary.
    "The tokenizer you are loading from",
    "Import of ",  # Megatron-Bridge 0.6 without Transformer Engine logs a traceback for each optional name
    "No CUDA runtime is found",  # torch, on a machine without a GPU
    "GPTModel IS DEPRECATED",  # megatron-core 0.19; the model families of this package have no other class there
    "MCore's async save is deprecated",  # megatron-core 0.19 about its own writer, which checkpoints use
    "`torch_dtype` is deprecated",  # Megatron-Bridge uses the old name of a key of Hugging Face configurations
)

_FILTERED_LOGGERS = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_model",
    "megatron.bridge.utils.fusions",
    "megatron.bridge.utils.import_utils",
    "torch.utils.cpp_extension",
    "transformers.configuration_utils",
    "transformers.tokenization_utils_base",
    "transformers.tokenization_utils_tokenizers",  # transformers 5
)

_QUIET_LOGGERS = (
    "lightning.pytorch",  # prints available and missing devices
    "lightning.pytorch.utilities.rank_zero",
    "nv_one_logger",  # NeMo's telemetry, which is not set up
    "nemo_logger",
)
"""Loggers of which only errors are shown."""

_PRINTER = "print_rank_0"
"""Megatron's print function, which its modules import by name; it prints the padded vocabulary and patches for PEFT."""
_LOADING = "megatron.bridge.models.conversion.model_bridge"
_SERIOUS = re.compile(r"warn|error|fail", re.IGNORECASE)


def catch_foreign_output() -> None:
    """Redirects the output and logs of the libraries imported so far. Idempotent."""
    if not logger.isEnabledFor(logging.DEBUG):
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for name in _QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("megatron").setLevel(logging.WARNING)  # 26.08 logs the setup of every component at info
    for name in _FILTERED_LOGGERS:
        library = logging.getLogger(name)
        if _is_unexpected not in library.filters:
            library.addFilter(_is_unexpected)
    for handler in logging.getLogger().handlers:
        # From Megatron's logging.basicConfig in 26.08, with or without its own handler. Other handlers are the user's.
        of_library = type(handler) is logging.StreamHandler or type(handler).__module__.startswith("megatron.")
        if isinstance(handler, logging.StreamHandler) and of_library and _is_serious not in handler.filters:
            handler.addFilter(_is_serious)
            if handler.stream is sys.stdout:
                handler.setStream(sys.stderr)  # a program may read the standard output of a command
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and _PRINTER in vars(module):
            setattr(module, _PRINTER, _log)
    loading = sys.modules.get(_LOADING)
    if loading is not None and "Progress" in vars(loading) and not sys.stdout.isatty():
        loading.Progress = _silent(loading.Progress)  # type: ignore[attr-defined]


def _is_unexpected(record: logging.LogRecord) -> bool:
    expected = record.getMessage().startswith(_EXPECTED_LINES)
    if expected:
        logger.debug("%s: %s", record.name, record.getMessage())
    return not expected


def _is_serious(record: logging.LogRecord) -> bool:
    serious = record.levelno >= logging.WARNING or record.name.startswith("nemo_popsd")
    if not serious:
        logger.debug("%s: %s", record.name, record.getMessage())
    return serious


def _log(message: object, *args: object, **kwargs: object) -> None:
    """Replaces a print function of a library."""
    text = " ".join(str(message).split())
    logger.log(logging.WARNING if _SERIOUS.search(text) else logging.DEBUG, "Megatron: %s", text)


def _silent(progress: Any) -> Any:
    """Rich's progress bar without output, for log files, where it would be one truncated line."""
    if getattr(progress, "silent", False):
        return progress

    class Silent(progress):  # type: ignore[misc]
        silent = True

        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **{**options, "disable": True})

    return Silent
