"""The tables in addition to the main comparison: the settings that each varies, its seeds and rates, and its cost.

Each table has its own file of records, experiments/tables/NAME.jsonl. Runs of the main comparison are reused as rows if
they differ from the table only in what the table varies, with the same rows, seeds and steps.

**Rates.** An arm whose target differs much from that of any tuned arm is tuned separately, on the tuning rows with the
three rates around that of its family. Every other arm uses the rate of its family: Purified gains at each rate from
1e-5 to 1e-3, so a factor of three does not decide between its variants. A run with a constant rate uses half the tuned
rate, which is the mean of the cosine schedule that was tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import MAIN_ARMS, OPSD, PURIFIED, SEEDS, STUDENT_PMI, TUNING_SEEDS, Arm
from experiments.rows import FILE as TUNING_ROWS
from experiments.rows import made

FOLDER = Path(__file__).with_name("tables")
HELD_OUT = "nemo_popsd:tiny_validation"
REASONER = Path("runs/reasoner/model")
"""Path of the larger model, which `python -m nemo_popsd.testbed.reasoner --output runs/reasoner` creates."""


@dataclass(frozen=True)
class Entry:
    """An arm of a table."""

    arm: Arm
    family: Arm
    """The tuned arm whose rate this arm uses."""
    rates: tuple[str, ...] = ()
    """Rates with which this arm is tuned instead."""
    against: Arm | None = None
    """The arm with which it is compared; None means its family if the table has it, otherwise the first row."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One question, and the runs that answer it."""

    name: str
    question: str
    entries: tuple[Entry, ...]
    reused: tuple[Arm, ...] = ()
    """Arms whose runs of the main comparison are rows of the table."""
    seeds: tuple[int, ...] = SEEDS[:5]
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    stages: tuple[int, ...] = (30,)
    """Numbers of steps after which the held-out rows are answered; one run passes all of them."""
    more: tuple[str, ...] = ()
    """Overrides of all arms."""
    factor: float = 1.0
    """Factor of the family's rate."""
    rates_of: str = ""
    """The table whose tuning determines the rates of families; empty for the main comparison."""
    files: tuple[str, ...] = ()
    """Rows that are written for the table (`experiments.rows`)."""
    held_out: str = HELD_OUT
    tuning_rows: str = str(TUNING_ROWS)
    weight: float = 1.0
    """Time of a step and of an evaluation relative to the main comparison."""
    needs: Path | None = None
    """A model that must exist."""

    @property
    def file(self) -> Path:
        """File of the records."""
        return FOLDER / f"{self.name}.jsonl"

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All rows, in order."""
        return (*self.reused, *(entry.arm for entry in self.entries))

    def against(self, entry: Entry) -> Arm:
        """The row with which an entry is compared; the entry itself for the first row."""
        return entry.against or (entry.family if entry.family in self.reused else self.arms[0])


def _variant(base: Arm, name: str, title: str, *words: str) -> Arm:
    """An arm with further overrides."""
    return Arm(f"{base.name}-{name}", f"{base.title}, {title}", (*base.overrides, *words))


_LOW, _HIGH = ("3.0e-6", "1.0e-5", "3.0e-5"), ("3.0e-5", "1.0e-4", "3.0e-4")
_CONSTANT = ("optimizer.decay=constant",)


def _views() -> tuple[Entry, ...]:
    seen = (("answer", "answer only", "stated"), ("solution", "solution without answer", "sheet"))
    return tuple(
        Entry(_variant(base, name, title, f"data.privileged.view={column}"), base, rates)
        for base, rates in ((OPSD, _LOW), (PURIFIED, _HIGH))
        for name, title, column in seen
    )


def _per_prompt() -> tuple[Entry, ...]:
    return tuple(
        Entry(
            _variant(
                base,
                f"{count}-per-prompt",
                f"{count} rollouts of {32 // count} prompts",
                f"rollout.per_prompt={count}",
                f"training.prompts_per_step={32 // count}",
            ),
            base,
        )
        for base in (PURIFIED, STUDENT_PMI)
        for count in (2, 4, 8)
    )


def _moving(weights: str, decay: str = "0.98") -> tuple[str, ...]:
    names = ("teacher", "anchor")
    words = tuple(f"distillation.{name}.weights={weights}" for name in names)
    return words + tuple(f"distillation.{name}.decay={decay}" for name in names) * (weights == "ema")


def _weights() -> tuple[Entry, ...]:
    tokens = "distillation.tokens"
    variants = (
        ("gate", "loss where the student is unsure", f"{tokens}.max_student_probability=0.99"),
        ("no-markers", "no loss on markers", f"{tokens}.markers=0"),
        ("horizon", "loss on the first 48 tokens", f"{tokens}.horizon=48"),
    )
    plain = _variant(OPSD, "fast", "Purified's rate")
    fast = tuple(Entry(_variant(plain, name, title, word), PURIFIED, against=plain) for name, title, word in variants)
    return (
        *(Entry(_variant(PURIFIED, *variant), PURIFIED) for variant in variants),
        Entry(plain, PURIFIED, against=plain),
        *fast,
    )


def _thinking() -> tuple[Entry, ...]:
    student, teacher = "data.enable_thinking=false", "data.privileged.enable_thinking"
    return (
        Entry(_variant(OPSD, "teacher-off", "teacher does not think", f"{teacher}=false"), OPSD, _LOW),
        Entry(_variant(OPSD, "student-off", "student does not think", student, f"{teacher}=true"), OPSD, _LOW),
        Entry(_variant(OPSD, "both-off", "neither thinks", student), OPSD, _LOW),
        Entry(_variant(PURIFIED, "off", "nobody thinks", student), PURIFIED, _HIGH),
    )


def _strength() -> tuple[Entry, ...]:
    target = "distillation.target"
    settings = (("beta", "0.5"), ("beta", "2"), ("cap", "5"), ("cap", "null"))
    titles = {"beta": "β", "cap": "c"}
    return (
        Entry(_variant(PURIFIED, "longer", "longer"), PURIFIED),
        *(
            Entry(
                _variant(PURIFIED, f"{name}-{value}", f"{titles[name]}={value} instead", f"{target}.{name}={value}"),
                PURIFIED,
            )
            for name, value in settings
        ),
    )


def _noise() -> tuple[Entry, ...]:
    return tuple(
        Entry(_variant(base, f"noise-{share}", f"{share} % wrong", f"data.train.path={made(f'noise-{share}')}"), base)
        for base in MAIN_ARMS
        for share in (10, 30)
    )


def _larger(rows: str, **settings: str) -> tuple[str, ...]:
    words = {
        "student.source": str(REASONER),
        "data.train.path": str(made(f"{rows}-train")),
        **settings,
    }
    return tuple(f"{name}={value}" for name, value in words.items())


TABLES = {
    table.name: table
    for table in (
        Table(
            name="views",
            question="What does the reference have to show: the answer, the solution, or both?",
            entries=_views(),
            tuning_seeds=TUNING_SEEDS[:2],
            reused=(PURIFIED, OPSD),
            more=(f"data.train.path={made('views')}",),
            files=("views",),
        ),
        Table(
            name="per_prompt",
            question="Are several rollouts of a prompt better than as many prompts, at equal tokens?",
            entries=_per_prompt(),
            reused=(PURIFIED, STUDENT_PMI),
        ),
        Table(
            name="anchors",
            question="Does the gain of a moving anchor last, or does the run collapse?",
            entries=(
                Entry(_variant(PURIFIED, "frozen", "all frozen"), PURIFIED),
                Entry(_variant(STUDENT_PMI, "frozen-teachers", "frozen teachers"), STUDENT_PMI),
                Entry(_variant(PURIFIED, "ema", "moving average of teachers and anchor", *_moving("ema")), PURIFIED),
                Entry(_variant(PURIFIED, "live", "teachers and anchor live", *_moving("live")), PURIFIED),
            ),
            seeds=SEEDS[:3],
            stages=(30, 100, 300),
            more=_CONSTANT,
            factor=0.5,
        ),
        Table(
            name="weights",
            question="Do gates, marker weights or a horizon change what is gained or lost?",
            entries=_weights(),
            reused=(PURIFIED,),
        ),
        Table(
            name="thinking",
            question="Which of the roles has to think?",
            entries=_thinking(),
            tuning_seeds=TUNING_SEEDS[:2],
            reused=(OPSD, PURIFIED),
        ),
        Table(
            name="strength",
            question="Do β and c matter in runs of 100 steps?",
            entries=_strength(),
            seeds=SEEDS[:3],
            stages=(30, 100),
            more=_CONSTANT,
            factor=0.5,
        ),
        Table(
            name="noise",
            question="How many wrong references does each method bear?",
            entries=_noise(),
            reused=(PURIFIED, OPSD, STUDENT_PMI),
            files=("noise-10", "noise-30"),
        ),
        Table(
            name="scale",
            question="Does the picture hold for a model ten times as large, on harder problems?",
            entries=(Entry(PURIFIED, PURIFIED, _HIGH), Entry(OPSD, OPSD, _LOW), Entry(STUDENT_PMI, STUDENT_PMI, _HIGH)),
            seeds=SEEDS[:3],
            tuning_seeds=TUNING_SEEDS[:2],
            more=_larger("larger", **{"evaluation.samples_per_problem": "2", "evaluation.max_response_tokens": "512"}),
            files=("larger-train", "larger-tuning", "larger-held-out"),
            held_out=str(made("larger-held-out")),
            tuning_rows=str(made("larger-tuning")),
            weight=7.0,
            needs=REASONER,
        ),
        Table(
            name="long",
            question="Do lengths and markers of chains of a thousand tokens break, and does the alarm see it?",
            entries=(
                *(Entry(arm, arm) for arm in (PURIFIED, OPSD, STUDENT_PMI)),
                Entry(_variant(OPSD, "fast", "Purified's rate"), PURIFIED),
            ),
            seeds=SEEDS[:3],
            more=_larger(
                "long",
                **{
                    "training.prompts_per_step": "8",
                    "data.max_prompt_tokens": "512",
                    "data.max_reference_tokens": "768",
                    "rollout.max_response_tokens": "1792",
                    "evaluation.max_response_tokens": "2048",
                },
            ),
            rates_of="scale",
            files=("long-train", "long-held-out"),
            held_out=str(made("long-held-out")),
            weight=12.0,
            needs=REASONER,
        ),
    )
}
"""By name."""


def steps_of(table: Table) -> int:
    """Steps of a run."""
    return table.stages[-1]


def count_runs(table: Table) -> tuple[int, int]:
    """Tuning and training runs of a table."""
    tuned = sum(len(entry.rates) for entry in table.entries) * len(table.tuning_seeds)
    return tuned, len(table.entries) * len(table.seeds)


def core_hours(table: Table, seconds: float) -> tuple[float, float]:
    """Estimated core-hours of all tuning and of all training runs of a table.

    Args:
        table: table to estimate.
        seconds: time of a run of the main comparison on one thread: 30 steps and one evaluation. Start-up takes a
            twelfth of it, the evaluation a fifth (run logs).
    """
    start, evaluation = seconds / 12, seconds / 5
    step = (seconds - start - evaluation) / 30
    tuning, training = count_runs(table)
    of_tuning = start + table.weight * (30 * step + evaluation)
    of_training = len(table.stages) * (start + table.weight * evaluation) + table.weight * steps_of(table) * step
    return tuning * of_tuning / 3600, training * of_training / 3600


def cost_table(tables: Sequence[Table], seconds: float) -> str:
    """The estimate by table."""
    lines = ["table       runs: tuning  training   core-hours: tuning  training"]
    totals = [0.0, 0.0]
    for table in tables:
        hours = core_hours(table, seconds)
        totals = [total + hour for total, hour in zip(totals, hours, strict=True)]
        tuning, training = count_runs(table)
        lines.append(f"{table.name:<11} {tuning:>12} {training:>9} {hours[0]:>20.1f} {hours[1]:>9.1f}")
    lines.append(f"{'all':<11} {'':>12} {'':>9} {totals[0]:>20.1f} {totals[1]:>9.1f}")
    return "\n".join([*lines, f"from {seconds:.0f} seconds of a run of the main comparison"])
