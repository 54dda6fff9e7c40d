"""The arms of the experiments: their overrides of experiments/conf.yaml, learning rates and seeds."""

from __future__ import annotations

from dataclasses import dataclass

_TARGET, _KIND = "distillation.target", "distillation.divergence.kind"


@dataclass(frozen=True)
class Arm:
    """One method of training."""

    name: str
    title: str
    overrides: tuple[str, ...]


def _purified(cap: str, beta: str) -> Arm:
    return Arm(
        f"purified-c{cap}-b{beta}",
        f"Purified, c={'none' if cap == 'null' else cap}, β={beta}",
        (f"{_TARGET}.family=purified", f"{_TARGET}.cap={cap}", f"{_TARGET}.beta={beta}"),
    )


PURIFIED = _purified("10", "1")
"""The setting of the paper."""

OPSD = Arm("opsd-jsd", "OPSD, JSD", (f"{_TARGET}.family=opsd",))

STUDENT_PMI = Arm("student-pmi", "PMI on the live student", (f"{_TARGET}.family=student_pmi",))

MAIN_ARMS = (OPSD, PURIFIED, STUDENT_PMI)
"""The arms of the main comparison, which have more seeds."""

ARMS = (
    *MAIN_ARMS,
    Arm("opsd-forward-kl", "OPSD, forward KL", (f"{_TARGET}.family=opsd", f"{_KIND}=forward_kl")),
    Arm("beta-opsd", "β-OPSD, w=0.5", (f"{_TARGET}.family=beta_opsd", f"{_TARGET}.weight=0.5")),
    Arm("other-reference", "OPSD, other problem's reference", (f"{_TARGET}.family=other_reference",)),
    *(_purified(cap, "1") for cap in ("5", "20", "null")),
    *(_purified("10", beta) for beta in ("0.5", "2")),
)
"""All arms; each starts from the untrained base."""

RATES = ("3.0e-6", "1.0e-5", "3.0e-5", "1.0e-4", "3.0e-4", "1.0e-3", "3.0e-3")
"""Learning rates, ascending. The first and the last are used only for an arm whose best rate is next to them."""
GRID = RATES[1:-1]
"""The learning rates with which every arm is tuned."""
TUNING_SEEDS = (1, 2, 3)
"""Seeds of the runs that select the rates, on the tuning rows."""
SEEDS = tuple(range(111, 121))
"""Seeds of the order of the rows, of rollouts and of answers to held-out problems; different from those of tuning."""


def seeds_of(arm: Arm) -> tuple[int, ...]:
    """The seeds with which an arm is trained at its chosen rate: ten for a main arm, five for another."""
    return SEEDS if arm in MAIN_ARMS else SEEDS[:5]
