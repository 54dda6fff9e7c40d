"""Checks one run: its configuration, its paths, and whether all nodes see its output."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_popsd.doctor.findings import Finding
from nemo_popsd.errors import UserError

if TYPE_CHECKING:
    from nemo_popsd.config.schema import PopsdConfig


def examine_run(
    conf: str, overrides: Sequence[str], *, world_size: int, evaluates: bool, checkpoint: str | None
) -> tuple[list[Finding], str | None]:
    """The checks that `popsd train` or `popsd evaluate` makes at its start, and the run's output directory.

    Args:
        conf: configuration file.
        overrides: ``key=value`` overrides.
        world_size: number of ranks of the run.
        evaluates: whether the run is an evaluation.
        checkpoint: checkpoint to evaluate; None for `student.source`.

    Returns:
        The findings, and `output`, which is None if the configuration could not be read.
    """
    try:
        from nemo_popsd.config.consistency import check_evaluation_run, check_training_run
        from nemo_popsd.config.loading import load_config
    except ImportError as error:
        return [Finding("run", "configuration", "failed", f"cannot be read: {error}")], None
    output = None
    try:
        config = load_config(conf, overrides)
        output = config.output
        if evaluates:
            check_evaluation_run(config, world_size=world_size, checkpoint=checkpoint)
        else:
            check_training_run(config, world_size=world_size)
    except UserError as error:
        return [Finding("run", error.what, "failed", str(error.got), error.need, error.fix)], output
    for setting, value, off, module in _needed_libraries(config):
        if importlib.util.find_spec(module) is None:
            got, fix = f"{value}, which needs {module}, not installed", f"install it, or set {setting}={off}"
            return [Finding("run", setting, "failed", got, "libraries that are installed", fix)], output
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    return [Finding("run", "configuration", "ok", f"{conf} for {ranks}")], output


def _needed_libraries(config: PopsdConfig) -> Iterator[tuple[str, object, object, str]]:
    """For each setting that needs a library: its name, its value, a value that needs none, and the module."""
    student, optimizer = config.student, config.optimizer
    engine = "transformer_engine"
    if student.layers == engine:
        yield "student.layers", student.layers, "auto", engine
    if student.gradient_accumulation_fusion == "true":
        yield "student.gradient_accumulation_fusion", "true", "auto", "fused_weight_gradient_mlp_cuda"
    if optimizer.state_dtype != "fp32":
        yield "optimizer.state_dtype", optimizer.state_dtype, "fp32", engine
    if optimizer.host_share:
        yield "optimizer.host_share", optimizer.host_share, 0, engine


def examine_sharing(
    output: str,
    *,
    node: int,
    nodes: int,
    token: str,
    seconds: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Finding:
    """Whether all nodes see the same `output`: each node writes a file there and waits for those of the others.

    All nodes call this at the same time. A directory on a node's local disk exists and is writable on every node, and
    would fail only when a checkpoint is read.

    Args:
        output: directory; created if missing.
        node: index of this node.
        nodes: number of nodes.
        token: the same text on all nodes, different at each start.
        seconds: time limit for a file system that shows new files late.
        sleep: waits for a number of seconds.
    """
    folder = Path(output).expanduser() / ".nodes" / token
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"here_{node}").touch()
        seen = _wait_for([folder / f"here_{other}" for other in range(nodes)], seconds, sleep)
        (folder / f"seen_{node}").touch()
        if node == 0:
            # The other nodes may still be waiting for the file of this node.
            _wait_for(
                [folder / f"seen_{other}" for other in range(nodes)],
                seconds if seen == nodes else min(seconds, 5.0),
                sleep,
            )
            with contextlib.suppress(OSError):  # a directory with other files stays
                for other in range(nodes):
                    (folder / f"here_{other}").unlink(missing_ok=True)
                    (folder / f"seen_{other}").unlink(missing_ok=True)
                folder.rmdir()
    except OSError as error:
        return Finding(
            "run", "shared output", "failed", str(error), "a directory that every node can write", "set output"
        )
    if seen < nodes:
        need = f"all {nodes} nodes"
        return Finding(
            "run", "shared output", "failed", f"{output} seen by {seen}", need, "set output to shared storage"
        )
    return Finding("run", "shared output", "ok", f"seen by {nodes} nodes")


def _wait_for(files: Sequence[Path], seconds: float, sleep: Callable[[float], None]) -> int:
    """Waits until all `files` exist, at most `seconds`, and returns how many do."""
    deadline = time.monotonic() + seconds
    while True:
        present = sum(file.exists() for file in files)
        if present == len(files) or time.monotonic() > deadline:
            return present
        sleep(0.2)
