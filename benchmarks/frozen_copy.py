"""Measures the frozen copy on the device and on the host: resident bytes and seconds of the transfer, for a real model.

    python -m benchmarks.frozen_copy MODEL [--uses 20] [--precision bf16]
    torchrun --nproc-per-node 8 -m benchmarks.frozen_copy /models/Qwen3-8B --tensor 8 --precision bf16

MODEL is a Hugging Face directory or nemo_popsd:tiny_reasoner. Prints one Markdown row for each location of the copy.
On CUDA, resident bytes are torch's memory_allocated of the process, and host memory is pinned. On the CPU both
locations are the same memory, so the seconds are those of a memory copy and do not apply to a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.megatron.base import FrozenCopy
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import device, initialize


def main() -> None:
    """Measure both locations and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--uses", type=int, default=20, help="how often the copy is used")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    args = parser.parse_args()
    initialize(ParallelConfig(tensor=args.tensor), seed=0)
    rows = [_measure(args, place) for place in ("device", "host")]
    if torch.distributed.get_rank() == 0:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{args.model}, {args.precision}, tensor {args.tensor}, on {name}; median of {args.uses} uses\n")
        print("| copy | MiB on the device between uses | during use | MiB on the host | s of the transfer | GB/s |")
        print("|---|---|---|---|---|---|")
        print("\n".join(rows))


def _measure(args: argparse.Namespace, place: str) -> str:
    source = open_source(args.model)
    config = StudentConfig(precision=args.precision, adaptation="full", frozen_copy=place)
    parallel = ParallelConfig(tensor=args.tensor)
    student = Student(source.architecture, config, parallel, seed=0, load_initial=source.load)
    base = student.base
    assert isinstance(base, FrozenCopy)
    between, within, seconds = _resident(base), 0, []
    for _ in range(args.uses):
        _wait()
        start = time.perf_counter()
        with base.model():
            _wait()
            seconds.append(time.perf_counter() - start)
            within = _resident(base)
    median = statistics.median(seconds)
    rate = f"{base.host_bytes / median / 1e9:.2f}" if base.host_bytes else ""
    taken = f"{median:.6f}" if base.host_bytes else "0"
    return (
        f"| {place} | {between / 2**20:.3f} | {within / 2**20:.3f} | {base.host_bytes / 2**20:.3f} | {taken} | {rate} |"
    )


def _resident(base: FrozenCopy) -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else base.device_bytes


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
