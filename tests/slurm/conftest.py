"""One Slurm for all tests of this folder, which are skipped if it is not installed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Three idle nodes with eight simulated GPUs each."""
    absent = missing_programs()
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed; `make slurm` installs them, as root")
    # Not pytest's directory: the path of a socket must be short, and munge refuses a directory that others can write.
    place = Path(tempfile.mkdtemp(prefix="popsd_slurm_", dir="/tmp"))
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{before}:/usr/sbin:/sbin"
    cluster = Cluster(place, nodes=3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        os.environ["PATH"] = before
        shutil.rmtree(place, ignore_errors=True)
