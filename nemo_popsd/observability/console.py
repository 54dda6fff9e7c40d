"""What appears on the terminal: our own lines from rank 0, and no library's complaint about what we chose."""

from __future__ import annotations

import logging
import sys
import warnings

from nemo_popsd.observability.rank import is_rank_zero

_EXPECTED_WARNINGS = (
    ".*Apex.*not installed.*",  # megatron-core without CUDA falls back to torch, as `nemo_popsd.runtime.cpu` intends.
    ".*legacy GroupedMLP.*",  # the same, where Transformer Engine is absent
    ".*does not have many workers.*",  # batches are lists of token ids; nothing is loaded in the background
    ".*`torch_dtype` is deprecated.*",  # Megatron-Bridge reads a Hugging Face configuration by its old name
)


def set_up_console() -> None:
    """Shows the package's log on rank 0 and silences what libraries say of expected conditions. Call before imports
    of Megatron and NeMo; errors and unexpected warnings stay.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    log = logging.getLogger("nemo_popsd")
    log.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric", "nv_one_logger"):
        logging.getLogger(name).setLevel(logging.ERROR)
