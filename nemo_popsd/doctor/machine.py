"""Devices, NCCL and disk space. Imports torch if it is installed, and no larger package."""

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
    except Exception:  # a broken installation may raise anything; examine_machine reports it
        return []
    return [f"{entry.name} ({entry.total_memory / _GIB:.0f} GiB)" for entry in properties]


def examine_machine(devices: Sequence[str], *, gpus: int, output: str, free_gib: float) -> list[Finding]:
    """Findings on devices, layers, NCCL, shared memory and the output directory.

    Args:
        devices: from `cuda_devices`.
        gpus: CUDA devices that the run needs on this machine; 0 for a run on the CPU or on any number of devices.
        output: directory that must be writable, or that it must be possible to create; it is not created.
        free_gib: free space in GiB that is needed there.
    """
    return [
        _examine_devices(devices, gpus),
        _examine_layers(devices),
        _examine_fp8(devices),
        _examine_nccl(devices),
        _examine_shared_memory(devices),
        *_disk(output, free_gib),
    ]


def _examine_devices(devices: Sequence[str], gpus: int) -> Finding:
    counts = {device: devices.count(device) for device in dict.fromkeys(devices)}
    found = ", ".join(f"{count} x {device}" for device, count in counts.items()) or _without_devices()
    if len(devices) < gpus:
        note = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return Finding("machine", "CUDA devices", "failed", found, str(gpus), note)
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
    """The layers that `student.layers=auto` selects; `examine_imports` tests the import of Transformer Engine."""
    if not devices:
        return Finding("machine", "layers", "ok", "local", note="plain torch on the CPU")
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding("machine", "layers", "ok", "local", note="plain torch: Transformer Engine is not installed")
    return Finding("machine", "layers", "ok", "transformer_engine")


def _examine_fp8(devices: Sequence[str]) -> Finding:
    """The values of `fp8.recipe` that the first device computes; only runs with `fp8.*` need any."""
    if not devices:
        return Finding("machine", "FP8", "optional", note="needs a GPU; popsd diagnose --fp8 emulates it")
    try:
        import torch

        recipes = fp8_recipes(torch.cuda.get_device_capability(0), torch.version.cuda or "0.0")
    except Exception as error:  # a broken installation may raise anything
        return Finding("machine", "FP8", "optional", note=f"{type(error).__name__}: {_first_line(error)}")
    note = "" if recipes else "needs compute capability 8.9"
    return Finding("machine", "FP8", "ok" if recipes else "optional", ", ".join(recipes), note=note)


def fp8_recipes(capability: tuple[int, int], toolkit: str) -> list[str]:
    """The values of `fp8.recipe` that Transformer Engine 2.12 to 2.20 has kernels for.

    Args:
        capability: compute capability of the device.
        toolkit: version of CUDA, `major.minor`.
    """
    major, minor, *_ = toolkit.split(".")
    recipes = ["tensorwise", "delayed"] if capability >= (8, 9) else []
    recipes += ["blockwise"] if capability >= (9, 0) and (int(major), int(minor)) >= (12, 9) else []
    return [*recipes, *(["mxfp8"] if (10, 0) <= capability < (12, 0) else [])]


def _examine_nccl(devices: Sequence[str]) -> Finding:
    version, note = "", "ranks on the CPU use gloo"
    try:
        import torch

        if torch.distributed.is_nccl_available():
            version, note = ".".join(map(str, torch.cuda.nccl.version())), ""
    except Exception as error:  # a broken installation may raise anything
        note = f"{type(error).__name__}: {error}"
    state: State = "ok" if version else "missing" if devices else "optional"
    return Finding("machine", "NCCL", state, version, note=note)


def _examine_shared_memory(devices: Sequence[str]) -> Finding:
    if not _SHARED_MEMORY.is_dir():
        return Finding("machine", "/dev/shm", "failed" if devices else "optional", need="1 GiB")
    total = shutil.disk_usage(_SHARED_MEMORY).total / _GIB
    # Docker's default of 64 MiB is too small for NCCL's transport between the GPUs of a node.
    state: State = "ok" if total >= 1 else "failed" if devices else "optional"
    note = "" if state == "ok" else "docker run --shm-size=16g"
    return Finding("machine", "/dev/shm", state, f"{total:.1f} GiB", "1 GiB", note)


def _disk(output: str, free_gib: float) -> list[Finding]:
    directory = Path(output).expanduser().absolute()
    nearest = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(nearest).free / _GIB
    return [
        Finding(
            "machine",
            "disk",
            "ok" if free >= free_gib else "failed",
            f"{free:.1f} GiB free at {nearest}",
            f"{free_gib:g} GiB",
            "" if free >= free_gib else "free space there, or set output; a job requires POPSD_MIN_FREE_GIB",
        ),
        _examine_writing(directory, nearest),
    ]


def _examine_writing(directory: Path, nearest: Path) -> Finding:
    try:
        # Permission bits do not reveal read-only mounts and full quotas.
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
