"""The problems on which learning rates are chosen: `python -m experiments.rows` writes experiments/data/tuning.jsonl.

256 rows of the same kind as the embedded ones, which are for training (`nemo_popsd:tiny_train`) and held out
(`nemo_popsd:tiny_validation`). No task is in two of these sets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_popsd.testbed.data import DATA_SEED
from nemo_popsd.testbed.problems import Problem, balanced, records

FILE = Path(__file__).parent / "data" / "tuning.jsonl"


def tuning_problems() -> list[Problem]:
    """Skipped problems of the training split, far more than the training rows use."""
    return balanced("train", 256, DATA_SEED, skip=4000)


def text() -> str:
    """The content of the file."""
    return "".join(json.dumps(row) + "\n" for row in records("tuning", tuning_problems()))


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
