"""The output of `popsd plan`: the full estimate of one layout, its alternatives, a table over nodes; text and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from nemo_popsd.planning.alternatives import Alternative
from nemo_popsd.planning.checkpoint import checkpoint_bytes
from nemo_popsd.planning.memory import PHASES
from nemo_popsd.planning.parameters import total_parameters
from nemo_popsd.planning.plan import GIB, Changes, Estimate
from nemo_popsd.planning.workload import Case

_NOTE = "Estimates by formula, not measurements; formulas and assumptions: docs/planning.md"


def describe(estimate: Estimate, origin: str) -> str:
    """One layout: model, layout, memory by phase, work and time by phase."""
    case, layout = estimate.case, estimate.case.layout
    lines = [_NOTE, ""]
    lines += _aligned(
        [
            ("model", f"{case.sizes.name}: {total_parameters(case.sizes) / 1e9:.2f} billion parameters ({origin})"),
            ("layout", f"{_size(layout.nodes, 'node')} of {_size(layout.gpus_per_node, 'GPU')}: {shape(case)}"),
            ("training", _training(case)),
            ("step", _step(case)),
            *([("frozen", _sharing(case))] if case.shares_prefixes else []),
        ]
    )
    lines += ["", *_memory_table(estimate), "", *_work_table(estimate), ""]
    total = estimate.seconds.total
    lines.append(
        f"step {total:.1f} s, {case.config.training.steps} steps {total * case.config.training.steps / 3600:.1f} h, "
        f"{case.prompts / total:.2f} prompts/s, {gpu_hours(estimate):.2f} GPU hours per 1,000 prompts"
    )
    files = checkpoint_bytes(case)
    lines.append(
        f"checkpoint of {_gb(files.weights)} of weights and {_gb(files.state)} of optimizer state, "
        f"at most {_gb(files.share)} per GPU"
    )
    return "\n".join(lines)


def shape(case: Case) -> str:
    """The layout in short: sizes above 1, and data parallelism."""
    layout = case.layout
    names = (
        ("TP", layout.tensor),
        ("PP", layout.pipeline),
        ("VPP", layout.virtual_pipeline),
        ("CP", layout.context),
        ("EP", layout.expert),
        ("ETP", layout.expert_tensor),
    )
    parts = [f"{name}{size}" for name, size in names if size > 1]
    parts += ["SP"] if layout.sequence else []
    if layout.first_stage_layers or layout.last_stage_layers:
        parts.append("stages of " + "-".join(map(str, layout.stage_layers(case.sizes.layers))))
    parts.append(f"DP{layout.data}")
    return "·".join(parts) + (" distributed" if case.shards_state else "")


def overrides(changes: Changes) -> str:
    """Changes as settings for the command line."""
    return " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())


def advice(layouts: Sequence[tuple[Changes, Estimate]]) -> list[str]:
    """The nearest layouts, one per line, as settings to add to the command."""
    if not layouts:
        return ["no layout on these GPUs fits: use more nodes, or lower the limits on lengths and tokens"]
    lines = ["nearest layouts that fit (estimates):"]
    for changes, estimate in layouts:
        words = overrides(changes) or "as it is"
        lines.append(f"  {words}  ({estimate.memory.worst / GIB:.1f} GiB, {estimate.seconds.total:.1f} s per step)")
    return lines


def growth_table(rows: Sequence[tuple[Case, Estimate | None]]) -> str:
    """Markdown table with one row per number of nodes; an estimate of `None` means that no layout fits."""
    head = ["nodes", "GPUs", "prompts", "layout", "GiB/GPU", "rollout s", "frozen s", "training s", "step s"]
    head += ["prompts/s", "GPU h per 1,000 prompts"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case, estimate in rows:
        start = [str(case.nodes), str(case.layout.world), str(case.prompts)]
        if estimate is None:
            cells = [*start, "none fits", *[""] * (len(head) - 4)]
        else:
            seconds = estimate.seconds
            times = [seconds.rollout.total, seconds.frozen.total, seconds.training.total, seconds.total]
            cells = [
                *start,
                shape(estimate.case),
                f"{estimate.memory.worst / GIB:.1f}",
                *(f"{time:.1f}" for time in times),
            ]
            cells += [f"{estimate.case.prompts / seconds.total:.2f}", f"{gpu_hours(estimate):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(chosen: Estimate, others: Sequence[Alternative]) -> str:
    """Memory and time of a step for the planned layout, and with one setting changed at a time."""
    rows: list[tuple[str, ...]] = [("one setting changed at a time", "GiB/GPU", "step s", "")]
    rows.append(("as planned", *_cost(chosen)))
    for other in others:
        cost = ("", "", "; ".join(other.reasons)) if other.estimate is None else _cost(other.estimate)
        rows.append((overrides(other.changes), *cost))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {memory:>{widths[1]}}  {time:>{widths[2]}}  {note}".rstrip()
        for name, memory, time, note in rows
    )


def _cost(estimate: Estimate) -> tuple[str, str, str]:
    fits = "" if estimate.fits else "does not fit"
    return f"{estimate.memory.worst / GIB:.1f}", f"{estimate.seconds.total:.1f}", fits


def sharing_table(estimates: Sequence[Estimate]) -> str:
    """Markdown table with one row per number of responses and order of the templates."""
    head = ["responses", "order", "tokens of sequences", "computed", "share", "TFLOP, frozen", "frozen s", "step s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for estimate in estimates:
        case = estimate.case
        separate, computed = _frozen_tokens(case)
        cells = [str(case.responses), case.config.data.templates.order, f"{separate:,}", f"{computed:,}"]
        cells += [f"{computed / separate:.3f}", f"{estimate.flops.frozen.needed / 1e12:,.1f}"]
        cells += [f"{estimate.seconds.frozen.total:.2f}", f"{estimate.seconds.total:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_hours(estimate: Estimate) -> float:
    """GPU hours per 1,000 prompts."""
    return estimate.seconds.total * estimate.case.layout.world / estimate.case.prompts * 1000 / 3600


def as_data(estimate: Estimate, origin: str) -> dict[str, object]:
    """All numbers of one layout: bytes, operations, seconds, per GPU unless named otherwise."""
    case, layout = estimate.case, estimate.case.layout
    return {
        "estimate": True,
        "model": {**asdict(case.sizes), "parameters": total_parameters(case.sizes), "origin": origin},
        "layout": {**asdict(layout), "data": layout.data},
        "assumptions": asdict(case.plan),
        "prompts": case.prompts,
        "rows_per_replica": case.rows,
        "responses_per_prompt": case.responses,
        "frozen_tokens": dict(zip(("sequences", "computed"), _frozen_tokens(case), strict=True)),
        "microbatches": case.microbatches,
        "decoded_rows": case.decoded_rows,
        "fits": estimate.fits,
        "memory_bytes": {
            "budget": estimate.budget,
            "standing": estimate.memory.standing,
            **estimate.memory.phases,
            "peak": {phase: estimate.memory.peak(phase) for phase in PHASES},
            "host": estimate.memory.host,
        },
        "checkpoint_bytes": asdict(checkpoint_bytes(case)),
        "flops": {
            phase: {**asdict(flops), "counted": flops.counted, "needed": flops.needed}
            for phase, flops in ((p, getattr(estimate.flops, p)) for p in PHASES)
        },
        "sent_bytes": asdict(estimate.traffic),
        "seconds": {
            **{
                phase: {**asdict(s), "total": s.total}
                for phase, s in ((p, getattr(estimate.seconds, p)) for p in PHASES)
            },
            "step": estimate.seconds.total,
        },
        "gpu_hours_per_1000_prompts": gpu_hours(estimate),
    }


def alternatives_as_data(others: Sequence[Alternative]) -> list[dict[str, object]]:
    """The numbers of `comparison`."""
    return [
        {
            "changes": dict(other.changes),
            "reasons": list(other.reasons),
            "fits": other.estimate is not None and other.estimate.fits,
            "worst_bytes": None if other.estimate is None else other.estimate.memory.worst,
            "step_seconds": None if other.estimate is None else other.estimate.seconds.total,
        }
        for other in others
    ]


def _memory_table(estimate: Estimate) -> list[str]:
    memory = estimate.memory
    lines = [f"GiB per GPU ({estimate.budget / GIB:.1f} usable), rows and responses at their limits"]
    rows: list[tuple[str, ...]] = [("", *PHASES)]
    rows += [(name, *[_gib(size)] * len(PHASES)) for name, size in memory.standing.items() if size]
    named = list(dict.fromkeys(name for phase in PHASES for name in memory.phases[phase]))
    for name in named:
        sizes = [memory.phases[phase].get(name, 0.0) for phase in PHASES]
        if any(sizes):
            rows.append((name, *(_gib(size) if size else "" for size in sizes)))
    rows.append(("peak", *(_gib(memory.peak(phase)) for phase in PHASES)))
    lines += _columns(rows)
    if memory.host:
        lines.append(f"pinned host memory for this GPU: {memory.host / GIB:.1f} GiB")
    return lines


def _work_table(estimate: Estimate) -> list[str]:
    rows: list[tuple[str, ...]] = [("per GPU and step, at the mean lengths", *PHASES)]
    flops, seconds = ([getattr(group, phase) for phase in PHASES] for group in (estimate.flops, estimate.seconds))
    rows.append(("TFLOP", *(f"{phase.needed / 1e12:,.1f}" for phase in flops)))
    moved = [getattr(estimate.traffic, phase) for phase in PHASES]
    for item in fields(moved[0]):
        sent = [getattr(phase, item.name) for phase in moved]
        if any(sent):
            rows.append((f"GB sent, {item.name} parallel", *(f"{size / 1e9:,.2f}" if size else "" for size in sent)))
    if estimate.traffic.weight_gather:
        rows.append(("  of which weight gather", "", "", f"{estimate.traffic.weight_gather / 1e9:,.2f}"))
    if estimate.traffic.from_host:
        rows.append(("GB from the host", "", f"{estimate.traffic.from_host / 1e9:,.2f}", ""))
    for name in ("compute", "communication", "bubble", "total"):
        values = [getattr(phase, name) for phase in seconds]
        if any(values):
            rows.append((f"s, {name}", *(f"{value:,.2f}" for value in values)))
    return _columns(rows)


def _training(case: Case) -> str:
    student, lengths = case.config.student, case.limits
    kind = f"all weights, frozen copy on the {student.frozen_copy}"
    if case.lora:
        kind = f"LoRA of rank {student.lora.rank}"
    recompute = {"none": "", "full": ", recompute", "selective": ", recompute " + "+".join(student.recompute_modules)}
    limits = f"at most {lengths.prompt} prompt, {lengths.reference} reference, {lengths.response} response tokens"
    return f"{kind}, {student.precision}{recompute[student.recompute]}; {limits}"


def _step(case: Case) -> str:
    mean, batches = case.means, _size(case.microbatches, "micro-batch", "es")
    lengths = f"{mean.prompt} prompt, {mean.reference} reference, {mean.response} response tokens on average"
    updates = "" if case.updates == 1 else f" for each of {case.updates} updates"
    several = "" if case.responses == 1 else f" with {case.responses} responses each"
    return f"{_size(case.prompts, 'prompt')}{several}, {case.rows} per replica in {batches}{updates}; {lengths}"


def _frozen_tokens(case: Case) -> tuple[int, int]:
    """Tokens of the frozen sequences of a replica, and how many of them are computed, at the mean lengths."""
    separate, computed = (case.frozen_work(case.means, shared=shared).tokens for shared in (False, None))
    return case.questions * separate, case.questions * computed


def _sharing(case: Case) -> str:
    separate, computed = _frozen_tokens(case)
    return f"{computed:,} of {separate:,} tokens of each replica's sequences computed ({computed / separate:.3f})"


def _size(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _aligned(pairs: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in pairs)
    return [f"{name:<{width}}  {text}" for name, text in pairs]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
