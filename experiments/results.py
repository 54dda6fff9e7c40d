"""Tables and plots of all finished runs: `python -m experiments.results` writes RESULTS.md and plots/.

Each value is a mean over seeds with a 95 % interval (Student's t over the seeds' means). A change is from before to
after training of the same seed, with the same problems and the same seeds of the answers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from scipy.stats import t as student_t

from benchmarks.measure import machine
from experiments.arms import ARMS, Arm
from experiments.run import CHOSEN, Run, training_runs
from nemo_popsd.evaluation.records import EvaluationDirectory, SampleScore

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float
    """Half width of the 95 % interval; NaN for one seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Student's t."""
        count = len(values)
        if count < 2:
            return cls(statistics.fmean(values), math.nan)
        error = statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.fmean(values), float(student_t.ppf(0.975, count - 1)) * error)

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """Text for a table."""
        return f"{self.mean:{'+' if sign else ''}.{digits}f} ± {self.half_width:.{digits}f}"


def accuracy(kind: str) -> Callable[[Sequence[SampleScore]], float]:
    """Accuracy on the problems of a kind (usual or hard), in per cent."""

    def of(scores: Sequence[SampleScore]) -> float:
        chosen = [score.correct for score in scores if score.problem.startswith(f"{kind}/")]
        return 100 * sum(chosen) / len(chosen)

    return of


def markers(scores: Sequence[SampleScore]) -> float:
    """Epistemic markers per 1,000 tokens."""
    return 1000 * sum(sum(s.markers.values()) for s in scores) / sum(s.tokens for s in scores)


def length(scores: Sequence[SampleScore]) -> float:
    """Tokens per answer."""
    return statistics.fmean(score.tokens for score in scores)


FIGURES: dict[str, tuple[str, Callable[[Sequence[SampleScore]], float]]] = {
    "usual": ("accuracy, 2-5 operations, %", accuracy("usual")),
    "hard": ("accuracy, 6-7 operations, %", accuracy("hard")),
    "markers": ("markers per 1,000 tokens", markers),
    "length": ("tokens per answer", length),
}


def scores(run: Run, moment: str) -> list[SampleScore]:
    """Statistics of a run's held-out answers, "before" or "after" training."""
    directory = (
        EvaluationDirectory(run.output / "validation" / "step-000000") if moment == "before" else run.last_evaluation()
    )
    return list(directory.scores())


def training(run: Run) -> dict[str, list[float]]:
    """Training metrics by name, a value for each step."""
    found: dict[str, list[float]] = {}
    for line in (run.output / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if name.startswith("train/"):
                found.setdefault(name.removeprefix("train/"), []).append(float(value))
    return found


def table(done: dict[Arm, list[Run]]) -> str:
    """A row for the base and for each arm."""
    header = ["arm", "rate", "seeds", *(cell for title, _ in FIGURES.values() for cell in (title, "change"))]
    lines = [header, ["---"] * len(header)]
    # The base is the same for all arms, and its answers depend only on the seed.
    widest = max(done.values(), key=len)
    base = [Estimate.of([of(scores(run, "before")) for run in widest]) for _, of in FIGURES.values()]
    lines.append(["base", "none", str(len(widest)), *(cell for e in base for cell in (e.text(), ""))])
    for arm, runs in done.items():
        cells = [arm.title, runs[0].rate, str(len(runs))]
        for _, of in FIGURES.values():
            pairs = [(of(scores(run, "before")), of(scores(run, "after"))) for run in runs]
            cells.append(Estimate.of([after for _, after in pairs]).text())
            cells.append(Estimate.of([after - before for before, after in pairs]).text(sign=True))
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def signal_table(done: dict[Arm, list[Run]]) -> str:
    """The teacher's signal at the start and the end, and the time of a step."""
    first, last, every = slice(0, 5), slice(-5, None), slice(None)
    columns = [
        ("‖Δ_ref‖/‖Δ_total‖, steps 1-5", "norm_ratio", first),
        ("last 5 steps", "norm_ratio", last),
        ("cos(Δ_total, Δ_ref)", "cosine_reference", every),
        ("cos(Δ_total, Δ_it)", "cosine_question", every),
    ]
    header = ["arm", *(title for title, _, _ in columns), "s a step, two runs at a time"]
    lines = [header, ["---"] * len(header)]
    for arm, runs in done.items():
        logged = [training(run) for run in runs]
        cells = [
            Estimate.of([statistics.fmean(found[name][steps]) for found in logged]).text(2)
            for _, name, steps in columns
        ]
        seconds = [statistics.median(_step_seconds(found)) for found in logged]
        lines.append([arm.title, *cells, f"{statistics.median(seconds):.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _step_seconds(found: dict[str, list[float]]) -> list[float]:
    parts = (found[f"seconds_{part}"] for part in ("rollout", "frozen", "train"))
    return [sum(step) for step in zip(*parts, strict=True)]


def plot_changes(done: dict[Arm, list[Run]], file: Path) -> None:
    """Changes of all statistics by arm, with intervals."""
    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(13, 0.42 * len(done) + 1.4), sharey=True)
    for axis, (title, of) in zip(axes, FIGURES.values(), strict=True):
        found = [
            Estimate.of([of(scores(r, "after")) - of(scores(r, "before")) for r in runs]) for runs in done.values()
        ]
        places = range(len(found))
        axis.errorbar([e.mean for e in found], places, xerr=[e.half_width for e in found], fmt="o", capsize=3)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(f"change of {title}", fontsize=9)
        axis.set_yticks(list(places), [arm.title for arm in done])
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def plot_training(done: dict[Arm, list[Run]], file: Path) -> None:
    """Signal, markers and length of the rollouts over training, a mean over seeds for each arm."""
    names = {
        "norm_ratio": "‖Δ_ref‖ / ‖Δ_total‖",
        "cosine_question": "cos(Δ_total, Δ_it)",
        "marker_rate": "markers per 1,000 rollout tokens",
        "response_tokens": "tokens per rollout",
    }
    figure, axes = pyplot.subplots(1, len(names), figsize=(17, 4))
    for arm, runs in done.items():
        logged = [training(run) for run in runs]
        for axis, name in zip(axes, names, strict=True):
            curve = [statistics.fmean(values) for values in zip(*(found[name] for found in logged), strict=True)]
            style = "--" if arm.name.startswith("purified") else "-"
            axis.plot(range(1, len(curve) + 1), curve, style, label=arm.title, linewidth=1.2)
    for axis, title in zip(axes, names.values(), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runs = [run for run in training_runs() if run.finished]
    done = {arm: of_arm for arm in ARMS if (of_arm := [run for run in runs if run.arm == arm])}
    (HERE / "plots").mkdir(exist_ok=True)
    plot_changes(done, HERE / "plots" / "changes.svg")
    plot_training(done, HERE / "plots" / "training.svg")
    parts = [
        "# Results of `python -m experiments.results`",
        f"{datetime.date.today():%d %B %Y}; {len(runs)} runs, two at a time with one thread each, on {machine()}. "
        "± are 95 % intervals over seeds.",
        f"Learning rates, chosen on the tuning rows: `{CHOSEN.name}`.",
        table(done),
        "![changes](plots/changes.svg)",
        "## The signal, and the cost",
        signal_table(done),
        "![training](plots/training.svg)",
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
