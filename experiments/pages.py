"""Result pages of the tables: `python -m experiments.pages` writes tables/NAME.md and tables/NAME.svg.

Every table with training records has a page. It shows the records of the table and the runs of the main comparison that
the table reuses; intervals and tests are those of `experiments.results`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace

from experiments.plan import rates_of, tuned
from experiments.records import Record, load
from experiments.results import FIGURES, Done, change, finished, markdown, paired, plot_training, provenance, table
from experiments.tables import FOLDER, TABLES, Table


def rows_of(asked: Table, own: Sequence[Record], main: Sequence[Record]) -> Done:
    """The training runs of a table at the selected rates, by arm, in the order of the table.

    Args:
        asked: the table.
        own: records of the table.
        main: records of the main comparison.
    """
    reused, rates = finished(main), rates_of(asked, own, main)
    found: Done = {}
    for arm in asked.arms:
        if arm in asked.reused:
            runs = reused.get(arm, [])
        else:
            runs = [r for r in own if (r.phase, r.arm, r.rate) == ("training", arm.name, rates.get(arm.name))]
        if some := [run for run in runs if run.seed in asked.seeds]:
            found[arm] = sorted(some, key=lambda run: run.seed)
    return found


def at_stage(done: Done, stage: int, last: int) -> Done:
    """The state of the runs after some steps."""
    if stage == last:
        return done
    return {arm: [replace(run, after=run.between[str(stage)]) for run in runs] for arm, runs in done.items()}


def by_base(done: Done) -> list[Done]:
    """Groups arms whose untrained base gave the same answers."""
    groups: dict[str, Done] = {}
    for arm, runs in done.items():
        groups.setdefault(runs[0].before.correct, {})[arm] = runs
    return list(groups.values())


def rates_table(asked: Table, own: Sequence[Record]) -> str:
    """Mean change on the tuning rows by rate, for the arms that the table tunes; empty if it tunes none."""
    found = tuned(own, asked.tuning_seeds)
    lines = [["arm", "low", "middle", "high", "chosen"]]
    for entry in asked.entries:
        of_rates = found.get(entry.arm.name, {})
        if entry.rates and set(of_rates) >= set(entry.rates):
            best = max(entry.rates, key=of_rates.__getitem__)
            edge = "" if best == entry.rates[1] else ", at the edge"
            cells = [f"{of_rates[rate]:+.1f} ({rate})" for rate in entry.rates]
            lines.append([entry.arm.title, *cells, best + edge])
    return markdown(lines) if len(lines) > 1 else ""


def alarms_table(done: Done) -> str:
    """Alarms of the runs (`guard.drift`) compared with the actual changes; empty if no run recorded alarms."""
    lines = [["arm", "alarms: runs, median step", *(f"change of {title}" for title in FIGURES)]]
    for arm, runs in done.items():
        recorded = [run.alarms for run in runs if run.alarms is not None]
        if not recorded:
            continue
        steps: dict[tuple[str, str], list[int]] = {}
        for alarms in recorded:
            for name, step in alarms.items():
                steps.setdefault((name, "fell" if step < 0 else "rose"), []).append(abs(step))
        ordered = sorted(steps.items(), key=lambda item: statistics.median(item[1]))
        texts = [
            f"{name} {verb}: {len(some)} of {len(recorded)}, step {statistics.median(some):.0f}"
            for (name, verb), some in ordered
        ]
        lines.append(
            [arm.title, "; ".join(texts) or "none", *(change(runs, of).text(sign=True) for of in FIGURES.values())]
        )
    return markdown(lines) if len(lines) > 1 else ""


def page(asked: Table, own: Sequence[Record], main: Sequence[Record]) -> str:
    """The text of a page; empty without training runs."""
    done = rows_of(asked, own, main)
    if not any(entry.arm in done for entry in asked.entries):
        return ""
    parts = [
        f"# {asked.question}",
        f"`python -m experiments.run {asked.name}`, `python -m experiments.pages`: {provenance(own)} One thread each. "
        "± are 95 % intervals over seeds; p-values are adjusted for all rows of a table (Holm).",
    ]
    for stage in asked.stages:
        then = at_stage(done, stage, asked.stages[-1])
        if len(asked.stages) > 1:
            parts.append(f"## After {stage} steps")
        parts += [table(group) for group in by_base(then)]
        pairs = [(entry.arm, asked.against(entry)) for entry in asked.entries]
        pairs = [(arm, other) for arm, other in pairs if arm is not other]
        titles = [f"{arm.title} minus {other.title}" for arm, other in pairs]
        parts += ["Accuracy after training, paired by seed:", paired(then, pairs, titles, "difference")]
    if rates := rates_table(asked, own):
        parts += ["## Learning rates", "Change of the accuracy on the tuning rows, in points:", rates]
    if found := alarms_table(done):
        parts += ["## Alarms", found]
    parts.append(f"![training]({asked.name}.svg)")
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    of_main = load()
    for name, asked in TABLES.items():
        own = load(asked.file)
        if text := page(asked, own, of_main):
            (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")
            plot_training(rows_of(asked, own, of_main), FOLDER / f"{name}.svg")
            print(text)


if __name__ == "__main__":
    main()
