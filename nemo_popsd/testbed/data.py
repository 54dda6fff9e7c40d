"""Writes the embedded data sets: `python -m nemo_popsd.testbed.data` reproduces the shipped files byte for byte."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_popsd.embedded.names import FOLDER
from nemo_popsd.testbed.problems import Split, balanced, records

DATA_SEED = 11
"""Seed of the shipped rows."""

SIZES: dict[Split, int] = {"train": 1600, "validation": 384}
"""Rows of each shipped file."""


def shipped_text(split: Split) -> str:
    """The content of `tiny_train.jsonl` or `tiny_validation.jsonl`."""
    rows = records(split, balanced(split, SIZES[split], DATA_SEED))
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_data(folder: Path) -> None:
    """Write both files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        (folder / f"tiny_{split}.jsonl").write_text(shipped_text(split), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the embedded training and validation rows.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the two files")
    write_data(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
