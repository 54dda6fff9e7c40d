"""The record of the container's check."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.container.__main__ import merge_sections
from nemo_popsd.megatron import adapters


def test_a_check_replaces_only_its_own_section() -> None:
    old = "# Title\n\nIntroduction.\n\n## `an older form`: passed\n\nx\n"
    first = merge_sections(old, {"kernels for sm_90": "## kernels for sm_90: passed\n\n| a | b |"})
    both = merge_sections(first, {"fast tests": "## fast tests: FAILED (exit status 1)\n\n```\n1 failed\n```"})
    again = merge_sections(both, {"fast tests": "## fast tests: passed\n\n```\n9 passed\n```"})
    assert again == (
        "# Results of `make container-check`\n\n"
        "## fast tests: passed\n\n```\n9 passed\n```\n\n"
        "## kernels for sm_90: passed\n\n| a | b |\n"
    )


def test_the_functions_that_fake_parameters_need_replaced_exist() -> None:
    """The check itself needs torch's CUDA build, so its names are compared here."""
    source = (Path(__file__).resolve().parents[2] / "benchmarks" / "container" / "fake_cuda.py").read_text()
    names = re.findall(r'\(adapters, "(\w+)"', source)
    assert names
    assert all(hasattr(adapters, name) for name in names)
