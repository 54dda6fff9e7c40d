"""Output on the terminal: the package's own messages from rank 0, without expected warnings of libraries."""

from __future__ import annotations

import logging
import sys
import warnings

from nemo_popsd.observability.rank import is_rank_zero

_EXPECTED_WARNINGS = (
    ".*Apex.*not installed.*",  # megatron-core without CUDA falls back to torch, as `nemo_popsd.runtime.cpu` intends
    ".*legacy GroupedMLP.*",  # the same, where Transformer Engine is absent
    ".*does not have many workers.*",  # batches are lists of token ids; nothing is loaded in the background
    ".*full scope is deprecated.*",  # megatron-core's own default for CUDA graphs, which are not used
    ".*`load_state_dict` is deprecated.*",  # called by megatron-core to read a distributed checkpoint
    ".*Please use DTensor instead.*",  # likewise
    ".*It is recommended to use `self.log.*",  # what is logged is already over all ranks
)

_EXPECTED_LINES = (
    "gradient_accumulation_fusion requires",  # megatron-core without apex: the fusion is off, as set in the spec
    # transformers 4.57 warns about every local tokenizer with a large vocabulary, of any family.
    "The tokenizer you are loading from",
    "`torch_dtype` is deprecated",  # Megatron-Bridge uses the old name of a key of Hugging Face configurations
)

_FILTERED_LOGGERS = (
    "megatron.bridge.utils.fusions",
    "transformers.configuration_utils",
    "transformers.tokenization_utils_base",
)

_QUIET_LOGGERS = (
    "lightning.pytorch",  # prints the devices that it finds and does not find
    "lightning.pytorch.utilities.rank_zero",
    "nv_one_logger",  # NeMo's telemetry, which is not set up
    "nemo_logger",
)


def set_up_console() -> None:
    """Shows the package's log on rank 0 and hides expected warnings of libraries.

    Call it before Megatron and NeMo are imported, since they print at import, and again afterwards, since they set up
    their loggers at import. Errors and unexpected warnings are still shown.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in _FILTERED_LOGGERS:
        logger = logging.getLogger(name)
        if _is_unexpected not in logger.filters:
            logger.addFilter(_is_unexpected)
    log = logging.getLogger("nemo_popsd")
    log.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_EXPECTED_LINES)
