"""Measures one token per slot with `nemo_popsd.megatron.plain_layers` and with Megatron's own layers.

    python -m benchmarks.plain_layers [--model MODEL] [--rounds 20]

In one process with one thread, both alternate on the same slots. Prints the median milliseconds of a token by slots.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

STEPS = 20


def main() -> None:
    """Prints one line for each number of slots."""
    from nemo_popsd.checkpoint.source import open_source
    from nemo_popsd.megatron.config import StudentConfig
    from nemo_popsd.megatron.decoding import SlotDecoder
    from nemo_popsd.megatron.student import Student
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemo_popsd:tiny_reasoner")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    initialize(ParallelConfig(), seed=0)
    source = open_source(options.model)
    config = StudentConfig(precision="fp32", adaptation="full")
    student = Student(source.architecture, config, ParallelConfig(), seed=0, load_initial=source.load)
    for slots in (1, 8, 64):
        decoder = SlotDecoder(student.chunks, slots=slots, capacity=STEPS)
        plain = decoder._plain
        seconds: dict[str, list[float]] = {"plain": [], "Megatron": []}
        tokens = torch.ones(slots, dtype=torch.long)
        with torch.no_grad(), decoder.open():
            for _ in range(options.rounds):
                for name, layers in (("plain", plain), ("Megatron", [None] * len(plain))):
                    decoder._plain = layers
                    start = time.perf_counter()
                    for position in range(STEPS):
                        decoder.next_logits(tokens, torch.full_like(tokens, position), STEPS)
                    seconds[name].append((time.perf_counter() - start) / STEPS)
        own, other = (1000 * statistics.median(seconds[name]) for name in ("plain", "Megatron"))
        print(
            f"{slots:3} slots: {own:.2f} ms with plain layers, {other:.2f} ms with Megatron's, ratio {other / own:.2f}"
        )


if __name__ == "__main__":
    main()
