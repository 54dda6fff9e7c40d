"""Rollouts on disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.rollout.engine import Rollout
from nemo_popsd.rollout.storage import RolloutStore, StoredRollout


def row(name: str, version: int = 6, *, truncated: bool = False) -> StoredRollout:
    (value,) = struct.unpack("f", struct.pack("f", -0.1234567))  # a float32, as tensors give it
    return StoredRollout(name, 2**62 + 1, [5, 6], Rollout([7, 8, 9], [value, -0.0, -1e-7], truncated, version))


def test_rollouts_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.write(7, [row("a"), row("b", truncated=True)], part=0, parts=2)
    assert store.complete(7, {6}) is None  # a part is missing
    store.write(7, [row("c")], part=1, parts=2)
    complete = store.complete(7, {6})
    seed = row("a").seed
    assert complete == {("a", seed): row("a"), ("b", seed): row("b", truncated=True), ("c", seed): row("c")}
    assert str(complete["a", seed].rollout.log_probs) == str(row("a").rollout.log_probs)
    assert [line.row_id for line in store.read(7)] == ["a", "b", "c"]
    assert [line.finish_reason for line in store.read(7)] == ["stop", "length", "stop"]
    assert store.complete(7, range(3, 6)) is None  # by other weights
    assert store.complete(8, {7}) is None
    assert not list(tmp_path.rglob("*.partial"))


def test_unfinished_responses_of_a_step(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    assert store.unfinished(7) is None
    left = StoredRollout("z", 5, [5, 6], Rollout([7], [-0.5], False, 6, unfinished=True))
    without_tokens = StoredRollout("a", 9, [5], Rollout([], [], False, 6, unfinished=True))
    continued = StoredRollout("b", 3, [5], Rollout([7, 8, 9], [-1.0] * 3, True, 6, segments=((5, 2), (6, 1))))
    store.write(7, [left, continued], part=0, parts=2)
    assert store.unfinished(7) is None  # a part is missing
    store.write(7, [row("c"), without_tokens], part=1, parts=2)
    assert store.unfinished(7) == [without_tokens, left]
    rows = list(store.read(7))
    assert rows == [left, continued, row("c"), without_tokens]
    assert [line.finish_reason for line in rows] == ["unfinished", "length", "stop", "unfinished"]
    assert rows[1].rollout.parts == ((5, 2), (6, 1))
    assert rows[0].rollout.parts == ((6, 1),)


def test_parts_of_another_layout_do_not_mix(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.write(1, [row("a", 0)], part=0, parts=2)
    store.write(1, [row("a", 0), row("b", 0)], part=0, parts=1)
    assert {name for name, _ in store.complete(1, {0}) or {}} == {"a", "b"}


def test_later_steps_can_be_removed(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    assert store.steps() == []
    for step in (1, 2, 3):
        store.write(step, [row("a", step - 1)], part=0, parts=1)
    store.remove_after(2)
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing row"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    store = RolloutStore(tmp_path)
    store.write(1, [row("a", 0), row("b", 0)], part=0, parts=1)
    file = tmp_path / "rollouts" / "step-000001" / "part-0000-of-0001.jsonl"
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    file.write_text({"cut": text[:-9], "garbage": "[]\n", "missing row": "".join(lines[:-1])}[damage])
    with pytest.raises(UserError, match=r"part-0000-of-0001\.jsonl"):
        list(store.read(1))


def test_the_first_line_describes_the_file(tmp_path: Path) -> None:
    RolloutStore(tmp_path).write(1, [row("a", 0)], part=0, parts=1)
    first, second = (tmp_path / "rollouts" / "step-000001" / "part-0000-of-0001.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 1, "weights_version": 0, "rows": 1}
    assert json.loads(second)["finish_reason"] == "stop"
