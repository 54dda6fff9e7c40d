"""Runs one part in this process: `python -m benchmarks.gpu.part NAME MODULE OUTPUT [--rehearse]`; see `runner`."""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

from benchmarks.gpu.journal import reporter


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    print(f"=== {options.name}", flush=True)
    work = options.output / "work"
    work.mkdir(exist_ok=True)
    module = importlib.import_module(options.module)
    module.run(reporter(options.output / "results.jsonl", options.name), rehearse=options.rehearse, work=work)


if __name__ == "__main__":
    main()
