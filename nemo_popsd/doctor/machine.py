"""Devices, NCCL and room on disk. torch is imported where it is installed, and nothing heavier."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemo_popsd.doctor.findings import Finding, State

_GIB = 1024**3
_SHARED_MEMORY = Path("/dev/shm")


def cuda_devices() -> list[str]:
    """Name and memory of every CUDA device that torch sees; empty without torch or without a working driver."""
    try:
        import torch

        if not torch.cuda.is_available():
            return []
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception:  # an installation may be broken in any way; examine_machine tells how
        return []
    return [f"{entry.name} ({entry.total_memory / _GIB:.0f} GiB)" for entry in properties]


def examine_machine(devices: Sequence[str], *, gpus: int, output: str, free_gib: float) -> list[Finding]:
    """Findings on devices, layers, NCCL, shared memory and the output directory.

    Args:
        devices: what `cuda_devices` returned.
        gpus: CUDA devices that the run needs on this machine; 0 for a run on the CPU, or to take what is there.
        output: directory that must be writable, or be creatable; it is not made.
        free_gib: GiB that must be free there.
    """
    return [
        _examine_devices(devices, gpus),
        _examine_layers(devices),
        _examine_nccl(devices),
        _examine_shared_memory(devices),
        *_disk(output, free_gib),
    ]


def _examine_devices(devices: Sequence[str], gpus: int) -> Finding:
    kinds = {kind: devices.count(kind) for kind in dict.fromkeys(devices)}
    found = ", ".join(f"{number} x {kind}" for kind, number in kinds.items()) or _without_devices()
    if len(devices) < gpus:
        return Finding("machine", "CUDA devices", "failed", found, str(gpus), "see nvidia-smi and CUDA_VISIBLE_DEVICES")
    return Finding("machine", "CUDA devices", "ok" if devices else "optional", found, note="" if devices else "CPU run")


def _without_devices() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    except Exception as error:
        return f"torch cannot be imported ({_first_line(error)})"
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is built without CUDA"
    return f"none: torch {torch.__version__} for CUDA {torch.version.cuda} sees no device"


def _examine_layers(devices: Sequence[str]) -> Finding:
    """Which layers `student.layers=auto` takes here; that Transformer Engine imports is seen by `examine_imports`."""
    if not devices:
        return Finding("machine", "layers", "ok", "local", note="plain torch, on the CPU")
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding("machine", "layers", "ok", "local", note="plain torch: Transformer Engine is not installed")
    return Finding("machine", "layers", "ok", "transformer_engine")


def _examine_nccl(devices: Sequence[str]) -> Finding:
    version, note = "", "ranks on the CPU speak gloo"
    try:
        import torch

        if torch.distributed.is_nccl_available():
            version, note = ".".join(map(str, torch.cuda.nccl.version())), ""
    except Exception as error:  # whatever a broken installation raises is the finding
        note = f"{type(error).__name__}: {error}"
    state: State = "ok" if version else "missing" if devices else "optional"
    return Finding("machine", "NCCL", state, version, note=note)


def _examine_shared_memory(devices: Sequence[str]) -> Finding:
    if not _SHARED_MEMORY.is_dir():
        return Finding("machine", "/dev/shm", "failed" if devices else "optional", need="1 GiB")
    total = shutil.disk_usage(_SHARED_MEMORY).total / _GIB
    # Docker's default is 64 MiB, in which NCCL's transport between the GPUs of a node finds no room.
    state: State = "ok" if total >= 1 else "failed" if devices else "optional"
    note = "" if state == "ok" else "docker run --shm-size=16g"
    return Finding("machine", "/dev/shm", state, f"{total:.1f} GiB", "1 GiB", note)


def _disk(output: str, free_gib: float) -> list[Finding]:
    directory = Path(output).expanduser().absolute()
    nearest = next(place for place in (directory, *directory.parents) if place.exists())
    free = shutil.disk_usage(nearest).free / _GIB
    return [
        Finding(
            "machine",
            "disk",
            "ok" if free >= free_gib else "failed",
            f"{free:.1f} GiB free at {nearest}",
            f"{free_gib:g} GiB",
            "" if free >= free_gib else "make room there, or set output; a job asks for POPSD_MIN_FREE_GIB",
        ),
        _examine_writing(directory, nearest),
    ]


def _examine_writing(directory: Path, nearest: Path) -> Finding:
    try:
        # Permission bits do not tell of read-only mounts and full quotas.
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".popsd_doctor_") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            "machine", "output", "failed", f"{directory}: {_first_line(error)}", "a writable directory", "set output"
        )
    return Finding("machine", "output", "ok", str(directory))


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
