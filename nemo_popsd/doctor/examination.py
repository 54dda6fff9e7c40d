"""The examination that `popsd doctor` makes: all sections together."""

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
    """The scope of an examination.

    Attributes:
        conf: configuration of a run; None to examine packages and machine only.
        overrides: its ``key=value`` overrides.
        evaluates: whether the run is an evaluation.
        checkpoint: checkpoint that the run evaluates; None for `student.source`.
        world_size: number of ranks of the run.
        gpus: CUDA devices that the run needs on this machine.
        free_gib: free space in GiB that the run needs at its output.
        imports: whether to import the packages (takes about a minute).
        sharing: index of this node, number of nodes, and a token of the start, to check that all nodes see one output.
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
    """Findings of all requested sections. Does not raise for anything missing or broken."""
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
        node, nodes, token = question.sharing
        run.append(examine_sharing(output, node=node, nodes=nodes, token=token))
    return findings + run
