"""Tables and plots of all recorded runs: `python -m experiments.results` writes RESULTS.md and plots/.

The tables of `experiments.tables` have their own pages: `experiments.pages`.

Each value is a mean over seeds with a 95 % interval (Student's t over the seeds). A change is from before to after
training of the same seed, with the same problems and the same seeds of the answers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from experiments.arms import ARMS, GRID, PURIFIED, RATES, Arm
from experiments.intervals import Estimate, holm, p_text
from experiments.plan import chosen, tuned
from experiments.records import FILE, Answers, Record, load

matplotlib.rcParams["svg.hashsalt"] = "experiments"  # the same figures give the same file

HERE = Path(__file__).parent

FIGURES: dict[str, Callable[[Answers], float]] = {
    "accuracy, %": lambda answers: answers.accuracy,
    "markers per 1,000 tokens": lambda answers: answers.marker_rate,
    "tokens per answer": lambda answers: answers.length,
}
"""Statistics of the held-out answers, by title."""

Done = dict[Arm, list[Record]]
"""Training runs by arm, each in the order of the seeds."""


def finished(records: Sequence[Record]) -> Done:
    """The training runs of all arms with records, at the selected rates."""
    rates = chosen(records)
    found: Done = {}
    for arm in ARMS:
        of_arm = [r for r in records if (r.phase, r.arm, r.rate) == ("training", arm.name, rates.get(arm.name))]
        if of_arm:
            found[arm] = sorted(of_arm, key=lambda record: record.seed)
    return found


def change(runs: Sequence[Record], of: Callable[[Answers], float]) -> Estimate:
    """Mean change of a statistic from before to after training."""
    return Estimate.of([of(run.after) - of(run.before) for run in runs])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first line is its header."""
    first, *others = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (first, ["---"] * len(first), *others))


def table(done: Done) -> str:
    """A row for the base and each arm; p-values are those of the change of accuracy, adjusted for all arms (Holm)."""
    header = ["arm", "rate", "seeds"]
    for title in FIGURES:
        header += [title, "change", *(["p, Holm"] if title.startswith("accuracy") else [])]
    # The base is the same for all arms, and its answers depend only on the seed.
    widest = max(done.values(), key=len)
    base = ["base", "none", str(len(widest))]
    for title, of in FIGURES.items():
        base += [Estimate.of([of(run.before) for run in widest]).text(), ""]
        base += [""] if title.startswith("accuracy") else []
    adjusted = holm([change(runs, FIGURES["accuracy, %"]).p for runs in done.values()])
    lines = [header, base]
    for (arm, runs), p in zip(done.items(), adjusted, strict=True):
        cells = [arm.title, runs[0].rate, str(len(runs))]
        for title, of in FIGURES.items():
            cells += [Estimate.of([of(run.after) for run in runs]).text(), change(runs, of).text(sign=True)]
            cells += [p_text(p)] if title.startswith("accuracy") else []
        lines.append(cells)
    return markdown(lines)


def differences(done: Done) -> str:
    """Purified, c=10, β=1 against every other arm: accuracy after training, paired by seed; empty without it."""
    pairs = [(PURIFIED, arm) for arm in done if arm is not PURIFIED]
    return paired(done, pairs, [arm.title for _, arm in pairs], f"{PURIFIED.title} minus")


def paired(done: Done, pairs: Sequence[tuple[Arm, Arm]], titles: Sequence[str], header: str) -> str:
    """Differences of the accuracy after training, paired by seed, p-values adjusted for all pairs (Holm).

    Args:
        done: training runs.
        pairs: minuend and subtrahend; pairs of which one has no runs are omitted.
        titles: titles of the pairs.
        header: header of their column.
    """
    found = {}
    for (first, second), title in zip(pairs, titles, strict=True):
        mine = {run.seed: run.after.accuracy for run in done.get(first, ())}
        values = [mine[run.seed] - run.after.accuracy for run in done.get(second, ()) if run.seed in mine]
        if values:
            found[title] = Estimate.of(values)
    if not found:
        return ""
    adjusted = holm([estimate.p for estimate in found.values()])
    lines = [[header, "points", "p, Holm"]]
    lines += [[name, e.text(sign=True), p_text(p)] for (name, e), p in zip(found.items(), adjusted, strict=True)]
    return markdown(lines)


def rates_table(records: Sequence[Record]) -> str:
    """Mean change of the accuracy on the tuning rows by arm and rate; the selected rate is bold."""
    found, best = tuned(records), chosen(records)
    used = [rate for rate in RATES if rate in GRID or any(rate in of_rates for of_rates in found.values())]
    lines = [["arm", *used]]
    for arm in ARMS:
        if of_rates := found.get(arm.name):
            cells = [f"{of_rates[rate]:+.1f}" if rate in of_rates else "" for rate in used]
            cells = [f"**{c}**" if rate == best.get(arm.name) else c for rate, c in zip(used, cells, strict=True)]
            lines.append([arm.title, *cells])
    return markdown(lines)


def signal_table(done: Done) -> str:
    """The teacher's signal at the start and the end of training."""
    first, last, every = slice(0, 5), slice(-5, None), slice(None)
    columns = [
        ("‖Δ_ref‖/‖Δ_total‖, steps 1-5", "norm_ratio", first),
        ("last 5 steps", "norm_ratio", last),
        ("cos(Δ_total, Δ_ref)", "cosine_reference", every),
        ("cos(Δ_total, Δ_it)", "cosine_question", every),
    ]
    lines = [["arm", *(title for title, _, _ in columns)]]
    for arm, runs in done.items():
        cells = [
            Estimate.of([statistics.fmean(run.curves[name][steps]) for run in runs]).text(2)
            for _, name, steps in columns
        ]
        lines.append([arm.title, *cells])
    return markdown(lines)


def provenance(records: Sequence[Record]) -> str:
    """Number of runs, seeds, commits, machine and minutes."""
    parts = []
    for phase in ("tuning", "training"):
        some = [record for record in records if record.phase == phase]
        seeds = sorted({record.seed for record in some})
        minutes = sum(record.seconds for record in some) / 60
        if some:
            parts.append(f"{len(some)} {phase} runs with seeds {seeds[0]} to {seeds[-1]}, {minutes:.0f} minutes in all")
    commits = sorted({record.commit for record in records})
    machines = sorted({record.machine for record in records})
    return "; ".join([*parts, f"commit {', '.join(commits)}", *machines]) + "."


def plot_changes(done: Done, file: Path) -> None:
    """Changes of all statistics by arm, with intervals."""
    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(11, 0.42 * len(done) + 1.4), sharey=True)
    for axis, (title, of) in zip(axes, FIGURES.items(), strict=True):
        found = [change(runs, of) for runs in done.values()]
        places = range(len(found))
        axis.errorbar([e.mean for e in found], places, xerr=[e.half_width for e in found], fmt="o", capsize=3)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(f"change of {title}", fontsize=9)
        axis.set_yticks(list(places), [arm.title for arm in done])
    axes[0].invert_yaxis()
    _save(figure, file)


def plot_training(done: Done, file: Path) -> None:
    """Signal, markers and length of the rollouts over training, a mean over seeds for each arm."""
    names = {
        "norm_ratio": "‖Δ_ref‖ / ‖Δ_total‖",
        "cosine_question": "cos(Δ_total, Δ_it)",
        "marker_rate": "markers per 1,000 rollout tokens",
        "response_tokens": "tokens per rollout",
    }
    figure, axes = pyplot.subplots(1, len(names), figsize=(17, 4))
    for arm, runs in done.items():
        for axis, name in zip(axes, names, strict=True):
            curve = [statistics.fmean(values) for values in zip(*(run.curves[name] for run in runs), strict=True)]
            style = "--" if arm.name.startswith("purified") else "-"
            axis.plot(range(1, len(curve) + 1), curve, style, label=arm.title, linewidth=1.2)
    for axis, title in zip(axes, names.values(), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _save(figure, file)


def plot_rates(records: Sequence[Record], file: Path) -> None:
    """Change of the accuracy on the tuning rows over the learning rate, a mean over seeds for each arm."""
    figure, axis = pyplot.subplots(figsize=(7.5, 4))
    found = tuned(records)
    for arm in ARMS:
        if of_rates := found.get(arm.name):
            style = "--" if arm.name.startswith("purified") else "-"
            axis.plot([float(r) for r in of_rates], list(of_rates.values()), style, marker="o", ms=3, label=arm.title)
    axis.axhline(0, color="0.6", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate", fontsize=9)
    axis.set_title("change of the accuracy on the tuning rows, points", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _save(figure, file)


def _save(figure: pyplot.Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    records = load()
    done = finished(records)
    (HERE / "plots").mkdir(exist_ok=True)
    plot_changes(done, HERE / "plots" / "changes.svg")
    plot_training(done, HERE / "plots" / "training.svg")
    plot_rates(records, HERE / "plots" / "rates.svg")
    parts = [
        "# Results of `python -m experiments.results`",
        f"All runs are in `{FILE.name}`: {provenance(records)} One thread each. ± are 95 % intervals over seeds.",
        table(done),
        "![changes](plots/changes.svg)",
        "Accuracy after training, paired by seed:",
        differences(done),
        "## Learning rates",
        "Change of the accuracy on the tuning rows, mean over three seeds, in points; the chosen rate is bold.",
        rates_table(records),
        "![rates](plots/rates.svg)",
        "## The signal",
        signal_table(done),
        "![training](plots/training.svg)",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (HERE / "RESULTS.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
