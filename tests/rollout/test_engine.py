"""Seeds of responses."""

from __future__ import annotations

import inspect

from nemo_popsd.rollout.engine import row_seed


def test_row_seed_is_fixed() -> None:
    assert row_seed(1234, "train", 1, "row7") == 1055189167963380629
    assert row_seed(1234, "evaluation", "row7", 0) == 4311654149391652600


def test_row_seed_depends_on_all_its_parts() -> None:
    parts = [
        (1, "train", 1, "a"),
        (2, "train", 1, "a"),
        (1, "evaluation", 1, "a"),
        (1, "train", 2, "a"),
        (1, "train", 1, "b"),
        (1, "train", 11, ""),
        (1, "train", "1", "a", ""),
    ]
    seeds = {row_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what a torch generator takes


def test_row_seed_does_not_depend_on_the_layout() -> None:
    assert list(inspect.signature(row_seed).parameters) == ["seed", "parts"]
