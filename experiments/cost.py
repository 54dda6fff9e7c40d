"""Measures the cost of the reference-only branch: alternating steps of Purified OPSD and OPSD on the same rollouts.

    python -m experiments.cost experiments/conf.yaml [--steps 10] [key=value ...]
    torchrun --nproc-per-node 8 -m experiments.cost conf/qwen3_8b.yaml student.source=/models/Qwen3-8B

Prints the median seconds of each part of a step. Neither method computes Δ norms (`distillation.diagnosed_tokens=0`),
for which OPSD would also need the reference-only branch. Rollouts are generated and timed once for both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch.distributed as dist

from benchmarks.measure import machine
from nemo_popsd.config.loading import load_config, to_dict_config
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.data.dataset import PromptRow
from nemo_popsd.distillation.config import TargetConfig
from nemo_popsd.model import PurifiedOPSDModel
from nemo_popsd.model.trainer import build_trainer
from nemo_popsd.model.training import build_step
from nemo_popsd.parallel.distributed import shutdown
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams

PARTS = ("rollout", "frozen", "train")
METHODS = {"OPSD": "opsd", "Purified": "purified"}


class GenerateOnce:
    """Returns the same rollouts for repeated calls with the same requests."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._seeds: list[int] = []
        self._rollouts: list[Rollout] = []

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Rollout]:
        """See `RolloutEngine`."""
        seeds = [request.seed for request in requests]
        if seeds != self._seeds:
            self._seeds, self._rollouts = seeds, self._engine.generate(requests, sampling)
        return self._rollouts


def _rows(model: PurifiedOPSDModel) -> Iterator[list[PromptRow]]:
    assert model.training_data is not None
    while True:
        yield from model.training_data.loader()


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=10, help="steps of each method, besides one to warm up")
    options = parser.parse_intermixed_args()
    config = load_config(
        options.config,
        [
            *options.overrides,
            "distillation.diagnosed_tokens=0",
            "training.self_check=false",
            "guard.mismatch=off",  # the second method trains on responses of older weights
        ],
    )
    config.data = replace(config.data, validation=SourceConfig())
    model = PurifiedOPSDModel(to_dict_config(config), build_trainer(config, logs=False))
    optimizer = model.configure_optimizers()
    engine = GenerateOnce(model.engine)
    assert model.training_data is not None
    steps = {}
    for name, family in METHODS.items():
        target = replace(config.distillation, target=TargetConfig(family=family))
        steps[name] = build_step(
            replace(config, distillation=target, rollout=replace(config.rollout, save=False)),
            model.student,
            engine,
            model.sampling(config.rollout),
            model.tokenizer,
            model.training_data,
            check_lock=lambda: None,
            stop=model.stop,
        )
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in METHODS}
    rows = _rows(model)
    for number in range(options.steps + 1):
        batch, rollout_seconds = next(rows), 0.0
        order = list(METHODS) if number % 2 else list(METHODS)[::-1]
        for name in order:
            # Always the first: no trainer counts these updates, so the engine's weights version stays 0.
            found = steps[name](1, batch, optimizer, optimizer.step)
            rollout_seconds = max(rollout_seconds, found.seconds_rollout)
            seconds[name]["frozen"].append(found.seconds_frozen)
            seconds[name]["train"].append(found.seconds_train)
        for name in METHODS:
            seconds[name]["rollout"].append(rollout_seconds)
    if dist.get_rank() == 0:
        _print(options, {name: {p: statistics.median(s[1:]) for p, s in of.items()} for name, of in seconds.items()})
    shutdown()


def _print(options: argparse.Namespace, medians: dict[str, dict[str, float]]) -> None:
    print(f"{options.config} {' '.join(options.overrides)}; median of {options.steps} steps; {machine()}\n")
    print("| s | " + " | ".join((*PARTS, "step")) + " |\n|" + "---|" * (len(PARTS) + 2))
    whole = {name: sum(of.values()) for name, of in medians.items()}
    for name, of in medians.items():
        print(f"| {name} | " + " | ".join(f"{of[part]:.2f}" for part in PARTS) + f" | {whole[name]:.2f} |")
    print(f"\nPurified takes {100 * (whole['Purified'] / whole['OPSD'] - 1):+.1f} % of OPSD's step.")


if __name__ == "__main__":
    main()
