"""Requirements of each kind of context parallelism on heads, windows and precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.megatron.context_limits import refuse_context
from nemo_popsd.parallel.config import ParallelConfig

ARCHITECTURE = {"num_attention_heads": 8, "num_query_groups": 4, "hidden_size": 64, "kv_channels": 16}
WINDOWS = {"window_size": (4, 0)}


def _refuse(parallel: dict[str, Any], architecture: dict[str, Any], *, fused: bool = True, **student: Any) -> None:
    provider: Any = SimpleNamespace(**{**ARCHITECTURE, "window_size": None, **architecture})
    refuse_context(provider, StudentConfig(**student), ParallelConfig(**parallel), fused=fused)


@pytest.mark.parametrize(
    ("parallel", "architecture", "fused", "message"),
    [
        ({"context": 2, "context_type": "a2a"}, {}, False, r"context_type=a2a with local layers; need all_gather"),
        ({"context": 8, "context_type": "a2a"}, {}, True, r"4 key-value heads.*context_type=a2a over 8 ranks"),
        ({"context": 2, "context_type": "a2a", "tensor": 4}, {}, True, r"1 key-value heads"),
        (
            {"context": 16, "context_type": "a2a+p2p", "context_sizes": [8, 2]},
            {},
            True,
            r"4 key-value heads.*context_type=a2a\+p2p over 8 ranks",
        ),
        ({"context": 2}, WINDOWS, True, r"sliding windows.*context_type=p2p.*set parallel\.context_type=a2a"),
        ({"context": 4, "context_type": "a2a+p2p", "context_sizes": [2, 2]}, WINDOWS, True, r"sliding windows"),
        ({"context": 2, "context_type": "all_gather"}, {"kv_channels": 12}, True, r"heads of 12.*a multiple of 8"),
        ({"context": 2, "context_type": "a2a"}, {"kv_channels": None, "hidden_size": 96}, True, r"heads of 12"),
    ],
)
def test_what_a_kind_of_context_parallelism_lacks_is_refused(
    parallel: dict[str, Any], architecture: dict[str, Any], fused: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _refuse(parallel, architecture, fused=fused)


@pytest.mark.parametrize(
    ("parallel", "architecture", "fused"),
    [
        ({"context": 8}, {}, True),
        ({"context": 8}, WINDOWS, False),
        ({"context": 8, "context_type": "all_gather"}, WINDOWS, True),
        ({"context": 8, "context_type": "all_gather"}, WINDOWS, False),
        ({"context": 4, "context_type": "a2a"}, WINDOWS, True),
        ({"context": 8, "context_type": "a2a+p2p", "context_sizes": [4, 2]}, {}, True),
        ({"context": 1}, WINDOWS, True),
    ],
)
def test_the_others_are_accepted(parallel: dict[str, Any], architecture: dict[str, Any], fused: bool) -> None:
    _refuse(parallel, architecture, fused=fused)


def test_fp32_is_refused_on_transformer_engine_alone() -> None:
    with pytest.raises(UserError, match=r"precision=fp32 with parallel\.context=2"):
        _refuse({"context": 2}, {}, precision="fp32")
    _refuse({"context": 2}, {}, fused=False, precision="fp32")
