"""The device, the versions, and the findings of `popsd doctor`."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu.journal import Report
from benchmarks.measure import machine
from nemo_popsd.doctor.examination import Question, examine

_PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "megatron-bridge",
    "transformer-engine",
    "transformers",
    "nemo-toolkit",
    "liger-kernel",
    "vllm",
)


def run(report: Report, *, rehearse: bool, work: Path) -> None:
    """See the module."""
    report("card", machine=machine(), system=platform.platform())
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        report(
            "device",
            name=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            free_gib=free / 2**30,
            total_gib=total / 2**30,
        )
    for name in _PACKAGES:
        try:
            report("versions", package=name, version=metadata.version(name))
        except metadata.PackageNotFoundError:
            report("versions", package=name, version="not installed")
    for finding in examine(Question(gpus=0 if rehearse else 1)):
        if finding.section != "packages" or finding.state != "ok":
            report("doctor", state=finding.state, name=finding.name, found=finding.found, note=finding.note)
