"""The runs of the main comparison and of the tables, and the learning rates that their records select."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import GRID, RATES, TUNING_SEEDS, Arm, seeds_of
from experiments.records import Record, load
from experiments.rows import FILE as TUNING_ROWS
from experiments.tables import HELD_OUT, TABLES, Table

RUNS = Path("runs/experiments")
CONF = Path(__file__).with_name("conf.yaml")
TUNING = ("distillation.diagnosed_tokens=0", "training.self_check=false")
"""Overrides that save time in a run that selects a learning rate; they do not change the weights."""


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    phase: str
    """"tuning" or "training"."""
    arm: Arm
    rate: str
    seed: int
    rows: str
    """Path or name of the rows that are answered before and after training."""
    output: Path
    more: tuple[str, ...] = ()
    """Further overrides; those of the arm come last."""
    stages: tuple[int, ...] = ()
    """Numbers of steps after which the run is evaluated before it continues; empty uses those of `CONF`."""

    @property
    def overrides(self) -> list[str]:
        """All overrides of `CONF`."""
        words = [f"name={self.arm.name}", f"output={self.output}", f"seed={self.seed}", f"optimizer.lr={self.rate}"]
        return [*words, f"data.validation.path={self.rows}", *self.more, *self.arm.overrides]

    @property
    def asked(self) -> tuple[str, ...]:
        """The overrides that determine the answers of the untrained base."""
        of_base = ("seed", "student.", "evaluation.", "data.validation.", "data.enable_thinking", "data.max_")
        return tuple(sorted(word for word in self.overrides if word.startswith(of_base)))

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The key of the run; see `Record.key`."""
        return self.phase, self.arm.name, self.rate, self.seed


def tuning_run(arm: Arm, rate: str, seed: int) -> Run:
    """A run of the main comparison that is compared with runs of the same arm at other rates."""
    output = RUNS / "tuning" / f"{arm.name}-{rate}-seed-{seed}"
    return Run("tuning", arm, rate, seed, str(TUNING_ROWS), output, TUNING)


def training_run(arm: Arm, rate: str, seed: int) -> Run:
    """A run of the main comparison that is part of the results."""
    output = RUNS / "training" / f"{arm.name}-{rate}-seed-{seed}"
    return Run("training", arm, rate, seed, HELD_OUT, output)


def tuning_runs(arms: Sequence[Arm]) -> list[Run]:
    """Every arm with every rate and seed; seeds are the outer loop, so that a partial set is balanced."""
    return [tuning_run(arm, rate, seed) for seed in TUNING_SEEDS for rate in GRID for arm in arms]


def training_runs(rates: dict[str, str], arms: Sequence[Arm]) -> list[Run]:
    """Every arm at its rate with every seed; seeds are the outer loop.

    Args:
        rates: learning rate by name of the arm.
        arms: arms to run, if they have a rate.
    """
    seeds = sorted({seed for arm in arms for seed in seeds_of(arm)})
    return [
        training_run(arm, rates[arm.name], seed)
        for seed in seeds
        for arm in arms
        if arm.name in rates and seed in seeds_of(arm)
    ]


def tuned(records: Iterable[Record], seeds: Sequence[int] = TUNING_SEEDS) -> dict[str, dict[str, float]]:
    """Mean change of the accuracy on the tuning rows by arm and rate, for rates with all seeds."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        if record.phase == "tuning":
            of_rates = found.setdefault(record.arm, {})
            of_rates.setdefault(record.rate, {})[record.seed] = record.after.accuracy - record.before.accuracy
    return {
        arm: {
            rate: statistics.fmean(of_rates[rate].values())
            for rate in RATES
            if set(of_rates.get(rate, ())) >= set(seeds)
        }
        for arm, of_rates in found.items()
    }


def chosen(
    records: Iterable[Record], grid: Sequence[str] = GRID, seeds: Sequence[int] = TUNING_SEEDS
) -> dict[str, str]:
    """The rate with the highest accuracy on the tuning rows (the smallest in a tie), for arms with all rates."""
    found = tuned(records, seeds)
    return {
        arm: max(of_rates, key=of_rates.__getitem__) for arm, of_rates in found.items() if set(of_rates) >= set(grid)
    }


def rates_of(table: Table, own: Sequence[Record], main: Sequence[Record]) -> dict[str, str]:
    """The rates of the arms of a table by name; arms whose tuning is not finished are omitted.

    Args:
        table: the table.
        own: records of the table.
        main: records of the main comparison.
    """
    lender = TABLES[table.rates_of] if table.rates_of else None
    families = rates_of(lender, load(lender.file), main) if lender else chosen(main)
    found = {}
    for entry in table.entries:
        if entry.rates:
            rate = chosen([r for r in own if r.arm == entry.arm.name], entry.rates, table.tuning_seeds)
            found |= {name: scaled(best, table.factor) for name, best in rate.items()}
        elif entry.family.name in families:
            found[entry.arm.name] = scaled(families[entry.family.name], table.factor)
    return found


def scaled(rate: str, factor: float) -> str:
    """A multiple of a rate, written as in `RATES`."""
    number, _, power = f"{float(rate) * factor:.1e}".partition("e")
    return f"{number}e{int(power)}"


def table_tuning_runs(table: Table) -> list[Run]:
    """The tuning runs of the arms that a table tunes separately; seeds are the outer loop."""
    folder = RUNS / table.name / "tuning"
    return [
        Run(
            "tuning",
            entry.arm,
            rate,
            seed,
            table.tuning_rows,
            folder / f"{entry.arm.name}-{rate}-seed-{seed}",
            (*table.more, *TUNING),
        )
        for seed in table.tuning_seeds
        for entry in table.entries
        for rate in entry.rates
    ]


def table_training_runs(table: Table, rates: dict[str, str]) -> list[Run]:
    """The training runs of a table whose arms have a rate; seeds are the outer loop."""
    folder = RUNS / table.name / "training"
    return [
        Run(
            "training",
            entry.arm,
            rate,
            seed,
            table.held_out,
            folder / f"{entry.arm.name}-{rate}-seed-{seed}",
            table.more,
            table.stages,
        )
        for seed in table.seeds
        for entry in table.entries
        if (rate := rates.get(entry.arm.name))
    ]


def missing_neighbours(records: Sequence[Record], arms: Sequence[Arm]) -> list[Run]:
    """Runs with the next rate beyond the grid, for arms whose best rate is at its edge."""
    found, best = tuned(records), chosen(records)
    rates = {
        arm: RATES[place]
        for arm in arms
        if arm.name in best
        for place in (RATES.index(best[arm.name]) - 1, RATES.index(best[arm.name]) + 1)
        if 0 <= place < len(RATES) and RATES[place] not in found[arm.name]
    }
    return [tuning_run(arm, rate, seed) for seed in TUNING_SEEDS for arm, rate in rates.items()]
