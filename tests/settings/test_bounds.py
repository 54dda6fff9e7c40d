"""Every number of every section has finite bounds, which files, overrides and objects must meet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.config.keys import known_keys
from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.settings import split_settings
from nemo_popsd.settings.bounds import Bounds, check_numbers, declared_rules

NUMBERS = (int, float, int | None, float | None, list[int], list[float])
SETTINGS = [
    (schema, key) for schema in (PopsdConfig, PlanConfig) for key, kind in known_keys(schema).items() if kind in NUMBERS
]


@pytest.mark.parametrize(("schema", "key"), SETTINGS, ids=[key for _, key in SETTINGS])
def test_every_number_is_bounded(schema: type, key: str, tmp_path: Path) -> None:
    bounds = dict(declared_rules(schema)).get(key)
    assert isinstance(bounds, Bounds), f"declare the bounds of {key}: Annotated[..., Bounds(low, high)]"
    assert -math.inf < bounds.low < bounds.high < math.inf
    kind = known_keys(schema)[key]
    beyond: list[Any] = [bounds.high + max(1, abs(bounds.high) * 0.5), bounds.low - 1 - abs(bounds.low), 10**18]
    beyond += [] if kind in (int, int | None, list[int]) else [math.inf, -math.inf, math.nan]
    for value in beyond:
        text = str(int(value)) if math.isfinite(value) else f"{value}".replace("inf", ".inf").replace("nan", ".nan")
        with pytest.raises(UserError, match=f"set {key}$") as raised:
            load(schema, f"{key}=[{text}]" if kind in (list[int], list[float]) else f"{key}={text}", tmp_path)
        assert str(bounds) in str(raised.value)


def load(schema: type, word: str, folder: Path) -> None:
    (folder / "conf.yaml").write_text("")
    if schema is PlanConfig:
        split_settings([word])
    else:
        load_config(folder / "conf.yaml", [word])


def test_the_defaults_are_within_bounds() -> None:
    check_numbers(PopsdConfig())
    check_numbers(PlanConfig())


@pytest.mark.parametrize(
    ("bounds", "words", "good", "bad"),
    [
        (Bounds(1, 10**6), "from 1 to 1,000,000", [1, 1.5, 10**6], [0, -1, 10**6 + 1, math.nan, math.inf]),
        (Bounds(0, 1, above=True), "above 0 and at most 1", [1e-300, 1], [0, 1.1, math.nan]),
        (Bounds(0, 1, below=True), "from 0 and below 1", [0, 0.999], [1, -1e-9]),
        (Bounds(1e-3, 2, or_zero=True), "from 0.001 to 2, or 0", [0, 0.0, 1e-3], [1e-4, -1, math.nan]),
    ],
)
def test_bounds(bounds: Bounds, words: str, good: list[float], bad: list[float]) -> None:
    assert str(bounds) == words
    assert all(map(bounds.contains, good))
    assert not any(map(bounds.contains, bad))


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.lr=.inf",
        "optimizer.lr=1e400",
        "optimizer.lr=1e30",
        "optimizer.lr=nan",
        "training.collective_timeout=.inf",
        "training.collective_timeout=1e18",
        "training.collective_timeout=1e-9",
        "training.prompts_per_step=1000000000",
        "seed=4294967296",
        "seed=18446744073709551616",
        "rollout.temperature=1e-30",
    ],
)
def test_absurd_values_are_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"set {word.partition('=')[0]}$"):
        load(PopsdConfig, word, tmp_path)
