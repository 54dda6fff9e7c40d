"""All sections together: what `popsd doctor` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_popsd.doctor.findings import Finding
from nemo_popsd.doctor.imports import examine_imports
from nemo_popsd.doctor.machine import cuda_devices, examine_machine
from nemo_popsd.doctor.packages import examine_packages
from nemo_popsd.doctor.run import examine_run, examine_sharing


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        conf: a run's configuration; None to look at packages and machine alone.
        overrides: its ``key=value``.
        evaluates: the run is an evaluation.
        checkpoint: what it evaluates.
        world_size: its ranks.
        gpus: CUDA devices that it needs on this machine.
        free_gib: GiB that it needs free at its output.
        imports: import the packages, too (a minute or so).
        sharing: number of this node, number of nodes, and a mark, to prove that all see one output.
    """

    conf: str | None = None
    overrides: Sequence[str] = ()
    evaluates: bool = False
    checkpoint: str | None = None
    world_size: int = 1
    gpus: int = 0
    free_gib: float = 0.0
    imports: bool = False
    sharing: tuple[int, int, str] | None = None


def examine(question: Question) -> list[Finding]:
    """Findings of all sections that `question` asks for. Never raises for what is missing or broken."""
    devices = cuda_devices()
    findings = examine_packages()
    run: list[Finding] = []
    output: str | None = None
    if question.conf is not None:
        run, output = examine_run(
            question.conf,
            question.overrides,
            world_size=question.world_size,
            evaluates=question.evaluates,
            checkpoint=question.checkpoint,
        )
    findings += examine_machine(devices, gpus=question.gpus, output=output or ".", free_gib=question.free_gib)
    if question.imports:
        findings += examine_imports(devices)
    if question.sharing is not None and output is not None:
        node, nodes, mark = question.sharing
        run.append(examine_sharing(output, node=node, nodes=nodes, mark=mark))
    return findings + run
