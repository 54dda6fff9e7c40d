"""Collects wheels for a machine with Python 3.12, torch, triton and transformers, but without Megatron and network.

    python -m benchmarks.bundle DIR

On a machine with a network, downloads the other packages of `python -m benchmarks.gpu`: the versions of the lock
(`requirements/`), for Python 3.12 on x86-64 Linux, at most 60 MB together. It prints the two commands for the other
machine. A newer transformers there does not matter: the folder of the bundle comes first on the path.

pandas, pyarrow, scipy, scikit-learn and onnx, which other modules of NeMo import, are excluded because they are large
and the parts do not need them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
PYTHON = "3.12"
LARGEST_BYTES = 60_000_000

_NAMES = """
megatron-core megatron-bridge nemo-toolkit transformers tokenizers huggingface_hub omegaconf
antlr4-python3-runtime lightning pytorch-lightning torchmetrics lightning-utilities hydra-core requests urllib3
charset-normalizer einops accelerate datasets dill multiprocess xxhash math-verify latex2sympy2_extended wandb
braceexpand webdataset toml StrEnum overrides cloudpickle psutil attrs joblib platformdirs protobuf wrapt
python-dateutil aistore aiohttp aiosignal aiohappyeyeballs frozenlist propcache multidict yarl cwevals tenacity
smart_open distro msgspec humanize sniffio text-unidecode threadpoolctl googleapis-common-protos
nv-one-logger-core nv-one-logger-pytorch-lightning-integration nv-one-logger-training-telemetry opentelemetry-api
opentelemetry-sdk opentelemetry-proto opentelemetry-semantic-conventions opentelemetry-exporter-http-transport
opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http
"""
NAMES = tuple(_NAMES.split())
"""Packages whose versions come from the lock."""
BESIDE = ("liger-kernel==0.8.5",)
"""Packages outside of the lock, with which the loss is compared."""
FROM_SOURCE = ("antlr4-python3-runtime",)
"""Pure Python packages that are on PyPI only as source."""

_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def pins() -> list[str]:
    """`name==version` of all bundled packages.

    Raises:
        ValueError: the lock does not contain a package.
    """
    lines = [
        line
        for file in ("26.02/runtime.txt", "26.02/bridge.txt")
        for line in (REQUIREMENTS / file).read_text().splitlines()
    ]
    locked = {_canonical(line.split("==")[0]): line.split(";")[0].strip() for line in lines if "==" in line}
    missing = [name for name in NAMES if _canonical(name) not in locked]
    if missing:
        raise ValueError(f"not in the lock: {', '.join(missing)}")
    return [*(locked[_canonical(name)] for name in NAMES), *BESIDE]


def collect(directory: Path) -> int:
    """Downloads the wheels into `directory`, which is created.

    Returns:
        Their total size in bytes.

    Raises:
        subprocess.CalledProcessError: pip failed.
        ValueError: their total size exceeds `LARGEST_BYTES`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = [pin for pin in pins() if _canonical(pin.split("==")[0]) in map(_canonical, FROM_SOURCE)]
    ready = [pin for pin in pins() if pin not in source]
    platforms = [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    _pip("download", "--dest", str(directory), *target, ready)
    _pip("wheel", "--wheel-dir", str(directory), "--no-build-isolation", source)
    total = sum(file.stat().st_size for file in directory.glob("*.whl"))
    if total > LARGEST_BYTES:
        raise ValueError(f"got {total / 1e6:.1f} MB in {directory}; need at most {LARGEST_BYTES / 1e6:.0f} MB")
    return total


def _pip(command: str, *words: str | Iterable[str]) -> None:
    flat = [part for word in words for part in ([word] if isinstance(word, str) else word)]
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *flat], check=True)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    total = collect(directory)
    print(f"{len(list(directory.glob('*.whl')))} wheels, {total / 1e6:.1f} MB. On the other machine, in a checkout:")
    print(f"  python3 -m pip install --no-index --no-deps --no-compile --target SITE {directory}/*.whl")
    print("  PYTHONPATH=SITE python3 -m benchmarks.gpu")


if __name__ == "__main__":
    main()
