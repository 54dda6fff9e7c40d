"""Devices, disk and imports. The tests pass with and without a GPU."""

from __future__ import annotations

import builtins
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_popsd.doctor import imports, machine
from nemo_popsd.doctor.findings import Finding
from nemo_popsd.doctor.imports import examine_imports
from nemo_popsd.doctor.machine import cuda_devices, examine_machine, fp8_recipes

H100 = "NVIDIA H100 80GB HBM3 (79 GiB)"


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_devices_are_counted_by_name(tmp_path: Path) -> None:
    found = by_name(examine_machine([H100] * 8, gpus=8, output=str(tmp_path), free_gib=0))["CUDA devices"]
    assert (found.state, found.found) == ("ok", f"8 x {H100}")
    found = by_name(examine_machine([H100] * 7, gpus=8, output=str(tmp_path), free_gib=0))["CUDA devices"]
    assert (found.state, found.need) == ("failed", "8")


def test_a_machine_without_devices_passes_unless_they_are_needed(tmp_path: Path) -> None:
    for gpus, state in ((0, "optional"), (1, "failed")):
        found = by_name(examine_machine([], gpus=gpus, output=str(tmp_path), free_gib=0))["CUDA devices"]
        assert found.state == state
        assert found.found.startswith("none: torch ")


def test_nccl_is_needed_with_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    for devices, state in (([], "optional"), ([H100], "missing")):
        assert by_name(examine_machine(devices, gpus=0, output=str(tmp_path), free_gib=0))["NCCL"].state == state


def test_recipes_of_fp8_are_those_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert fp8_recipes((8, 0), "13.0") == []
    assert fp8_recipes((8, 9), "13.0") == fp8_recipes((9, 0), "12.8") == ["tensorwise", "delayed"]
    assert fp8_recipes((9, 0), "12.9") == ["tensorwise", "delayed", "blockwise"]
    assert fp8_recipes((10, 0), "13.1")[-1] == "mxfp8"
    assert "mxfp8" not in fp8_recipes((12, 0), "13.1")

    def found(devices: list[str]) -> Finding:
        return by_name(examine_machine(devices, gpus=0, output=str(tmp_path), free_gib=0))["FP8"]

    assert (found([]).state, found([]).found) == ("optional", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert (found([H100]).state, found([H100]).found) == ("ok", "tensorwise, delayed, blockwise")


def test_layers_are_those_that_auto_selects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(devices: list[str]) -> Finding:
        return by_name(examine_machine(devices, gpus=0, output=str(tmp_path), free_gib=0))["layers"]

    assert layers([]).found == layers([H100]).found == "local"
    assert "not installed" in layers([H100]).note
    (tmp_path / "transformer_engine.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (layers([]).found, layers([H100]).found) == ("local", "transformer_engine")


def test_small_shared_memory_is_a_failure_with_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(devices: list[str]) -> str:
        return by_name(examine_machine(devices, gpus=0, output=str(tmp_path), free_gib=0))["/dev/shm"].state

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(total=64 * 1024**2))
    assert (state([]), state([H100])) == ("optional", "failed")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(total=16 * 1024**3))
    assert state([H100]) == "ok"


def test_disk(tmp_path: Path) -> None:
    output = tmp_path / "not" / "yet"
    free = shutil.disk_usage(tmp_path).free / 1024**3
    enough = by_name(examine_machine([], gpus=0, output=str(output), free_gib=free / 2))
    assert (enough["disk"].state, enough["output"].state) == ("ok", "ok")
    assert by_name(examine_machine([], gpus=0, output=str(output), free_gib=free * 2))["disk"].state == "failed"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_a_failure() -> None:
    found = by_name(examine_machine([], gpus=0, output="/proc/nowhere", free_gib=0))["output"]
    assert found.state == "failed"
    assert "/proc/nowhere" in found.found


def test_a_broken_torch_is_reported_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: object, **kwargs: object) -> object:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", broken)
    assert cuda_devices() == []
    found = by_name(examine_machine([], gpus=1, output=str(tmp_path), free_gib=0))["CUDA devices"]
    assert (found.state, found.found) == (
        "failed",
        "torch cannot be imported (libcudart.so.13: cannot open shared object file)",
    )
    assert machine._examine_nccl([]).state == "optional"


def test_imports_are_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("fine", ""),
        ("broken", "raise RuntimeError('no such symbol')"),
        ("driverless", "raise ImportError('libcuda.so.1: cannot open shared object file')"),
        ("silent", "import os; os._exit(3)"),
        ("endless", "import time; time.sleep(600)"),
    ):
        (tmp_path / f"{name}_module.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(imports, "NEEDED", ("fine_module", "broken_module", "driverless_module", "silent_module"))
    monkeypatch.setattr(imports, "ON_GPU", ("nowhere_module",))
    without = by_name(examine_imports([]))
    assert {name: finding.state for name, finding in without.items()} == {
        "fine_module": "ok",
        "broken_module": "failed",
        "driverless_module": "optional",
        "silent_module": "failed",
        "nowhere_module": "optional",
    }
    assert without["broken_module"].found == "RuntimeError: no such symbol"
    assert without["silent_module"].found == "exit status 3"
    with_gpu = by_name(examine_imports([H100]))
    assert (with_gpu["driverless_module"].state, with_gpu["nowhere_module"].state) == ("failed", "optional")
    (tmp_path / "transformer_engine.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert by_name(examine_imports([H100]))["nowhere_module"].state == "failed", "installed but broken"
    monkeypatch.setattr(imports, "NEEDED", ("endless_module",))
    assert by_name(examine_imports([], seconds=0.5))["endless_module"].found == "not imported within 0.5 s"


@pytest.mark.slow
def test_the_needed_modules_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(imports.NEEDED)}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
