"""How a vLLM server is started."""

from __future__ import annotations

from pathlib import Path

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.model.engines import server_launch


def test_a_server_is_told_what_only_transformers_5_reads_in_the_files() -> None:
    told = {"rope_theta": 1000000.0, "rope_scaling": None}
    launch = server_launch(PopsdConfig(), Path("/model"), 10, 0, None, adapter=True, overrides=told)
    assert launch.settings["arguments"]["hf_overrides"] == told
    launch = server_launch(PopsdConfig(), Path("/model"), 10, 0, None, adapter=True, overrides={})
    assert "hf_overrides" not in launch.settings["arguments"]
