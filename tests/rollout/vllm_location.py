"""Where the tests find the Python of vLLM's environment."""

from __future__ import annotations

import os
from pathlib import Path

PYTHON = os.environ.get("POPSD_VLLM_PYTHON", str(Path(__file__).parents[2] / ".vllm-venv" / "bin" / "python"))
