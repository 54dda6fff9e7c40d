"""The arms: the overrides of experiments/conf.yaml for each."""

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

ARMS = (
    OPSD,
    Arm("opsd-forward-kl", "OPSD, forward KL", (f"{_TARGET}.family=opsd", f"{_KIND}=forward_kl")),
    Arm("beta-opsd", "β-OPSD, w=0.5", (f"{_TARGET}.family=beta_opsd", f"{_TARGET}.weight=0.5")),
    Arm("student-pmi", "PMI on the live student", (f"{_TARGET}.family=student_pmi",)),
    Arm("other-reference", "OPSD, other problem's reference", (f"{_TARGET}.family=other_reference",)),
    PURIFIED,
    *(_purified(cap, "1") for cap in ("5", "20", "null")),
    *(_purified("10", beta) for beta in ("0.5", "2")),
)
"""All arms; each starts from the untrained base."""

RATES = ("1.0e-4", "3.0e-4")
"""Learning rates that are compared for every arm, once each, on the tuning rows."""
SEEDS = (1, 2, 3, 4, 5)
"""Seeds of the order of the rows, of rollouts and of the answers to held-out problems."""
TUNING_SEED = 0
