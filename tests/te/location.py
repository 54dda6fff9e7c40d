"""Where Transformer Engine's Python modules are: outside of the environment, in which they would break Megatron's
import."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = "TE_ENV"
"""Names the folder that Transformer Engine was installed into."""
PACKAGE = "transformer_engine"
_ROOT = Path(__file__).resolve().parents[2]


def folder() -> Path:
    """The folder to which the path of `PACKAGE` is relative."""
    return _ROOT / os.environ.get(ENVIRONMENT, ".te-site")


def available() -> bool:
    """Whether Transformer Engine is installed."""
    return (folder() / PACKAGE / "pytorch").is_dir()
