"""The problems on which learning rates are selected: `python -m experiments.rows` writes experiments/data/tuning.jsonl.

These are 256 rows of the same kind as the embedded rows for training (`nemo_popsd:tiny_train`) and evaluation
(`nemo_popsd:tiny_validation`). No task is in two of these sets.

Rows for individual tables (`experiments.tables`) are written to runs/experiments/rows when needed: the embedded
training rows with parts of their references as columns or with wrong references, and problems for the larger model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_popsd.embedded.names import asset
from nemo_popsd.files.atomic import write_lines
from nemo_popsd.testbed.data import DATA_SEED
from nemo_popsd.testbed.problems import Difficulty, Problem, Split, balanced, records
from nemo_popsd.testbed.reasoner import LARGER, LONG

FILE = Path(__file__).parent / "data" / "tuning.jsonl"
MADE = Path("runs/experiments/rows")
Row = dict[str, str]


def tuning_problems() -> list[Problem]:
    """Problems of the training split, after skipping far more than the training rows use."""
    return balanced("train", 256, DATA_SEED, skip=4000)


def text() -> str:
    """The content of the file."""
    return "".join(_line(row) for row in records("tuning", tuning_problems()))


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def with_parts(rows: Sequence[Row]) -> list[Row]:
    """Rows with two more columns: `sheet`, the reference without its answer, and `stated`, its answer alone."""
    found = []
    for row in rows:
        sheet, _, answer = row["reference"].rpartition(" Answer ")
        found.append({**row, "sheet": sheet, "stated": f"Answer {answer}"})
    return found


def with_mistakes(rows: Sequence[Row], share: float, seed: int = DATA_SEED) -> list[Row]:
    """Rows of which a fraction has references whose last value and answer are wrong by some tens.

    Rows with mistakes at a smaller fraction also have them at a larger one.
    """
    found = []
    for row in rows:
        rng = random.Random(f"{seed}/noise/{row['id']}")
        reference = row["reference"]
        if rng.random() < share:
            wrong = str((int(row["answer"]) + 10 * rng.randint(1, 9)) % 100)
            version = row["question"].rpartition(" ")[2].rstrip(".")
            sheet, _, _ = reference.rpartition(" Answer ")
            before, named, value = sheet.rpartition(f" {version} ")
            reference = f"{before}{named}{re.sub(r'^[0-9]+', wrong, value)} Answer {wrong}."
        found.append({**row, "reference": reference})
    return found


def _embedded() -> list[Row]:
    return [json.loads(line) for line in asset("nemo_popsd:tiny_train").read_text(encoding="utf-8").splitlines()]


def _problems(name: str, split: Split, count: int, difficulty: Difficulty, skip: int = 0) -> Callable[[], list[Row]]:
    return lambda: records(name, balanced(split, count, DATA_SEED, difficulty, skip=skip))


_HARD = replace(LARGER, shortest=5)
_MAKERS: dict[str, Callable[[], list[Row]]] = {
    "views": lambda: with_parts(_embedded()),
    "tuning-views": lambda: with_parts(records("tuning", tuning_problems())),
    "noise-10": lambda: with_mistakes(_embedded(), 0.1),
    "noise-30": lambda: with_mistakes(_embedded(), 0.3),
    "larger-train": _problems("train", "train", 1200, _HARD),
    "larger-tuning": _problems("tuning", "train", 192, _HARD, skip=4000),
    "larger-held-out": _problems("validation", "validation", 384, _HARD),
    "long-train": _problems("train", "train", 360, LONG),
    "long-held-out": _problems("validation", "validation", 48, LONG),
}


def made(name: str) -> Path:
    """Path to which `make` writes the rows of this name."""
    if name not in _MAKERS:
        raise KeyError(name)
    return MADE / f"{name}.jsonl"


def make(name: str) -> Path:
    """Writes the rows of a name, unless they exist."""
    path = made(name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, map(_line, _MAKERS[name]()))
    return path


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
