"""Finds why a run ended: causes in order of probability, each with its evidence and a command to continue."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nemo_popsd.doctor.remains import Line, Remains
from nemo_popsd.doctor.symptoms import EFFECT, ROOT, SHOW_JOB, SHOW_KERNEL, SYMPTOMS, UNCLEAR, Symptom, meaning
from nemo_popsd.errors import SAVED_AND_STOPPED
from nemo_popsd.files.attempts import RankEnd
from nemo_popsd.observability.flight_recorder import FLIGHT_PREFIX, FOLDER

State = Literal["finished", "running", "stopped", "dead"]

_LIKELIHOODS = ((ROOT - 10, "very likely"), (UNCLEAR - 10, "likely"), (0, "possible"))
_MOST_EVIDENCE = 4
_LONGEST_TEXT = 300
_FIRST_TO_END = 4
"""Added to the weight of the error that the rank that ended first reports."""
_SIGNALS = {132: "segfault", 134: "segfault", 135: "shared_memory", 137: "killed", 139: "segfault"}
"""Symptoms by the exit status that a shell reports for a signal."""
_BY_NAME = {symptom.name: symptom for symptom in SYMPTOMS}
_STEP = re.compile(r"\bstep (\d+)")
_STOP = re.compile(r"popsd: (stopped by )?SIG\w+")
_PATIENCE = (5.0, 120.0)
"""A run is reported as silent after this many times its longest step, and this many seconds."""


@dataclass
class Cause:
    """A possible cause."""

    name: str
    what: str
    weight: float
    next: str
    evidence: list[Line] = field(default_factory=list)

    @property
    def likelihood(self) -> str:
        """The likelihood in words."""
        return next(words for least, words in _LIKELIHOODS if self.weight >= least)


@dataclass(frozen=True)
class PostMortem:
    """The result for one run."""

    remains: Remains
    state: State
    causes: Sequence[Cause]
    """Possible causes, the most probable one first."""


def examine_remains(remains: Remains, *, now: float | None = None) -> PostMortem:
    """Finds the state of a run and its probable causes.

    Args:
        remains: files that the run left.
        now: current time in seconds since 1970; None reads the clock.
    """
    state = _state(remains)
    moment = time.time() if now is None else now
    if state == "running":
        causes = [_running(remains, moment)]
    elif state == "finished":
        done = Line(remains.output / "DONE", 1, "finished")
        causes = [Cause("finished", "the run is finished", 100, f"popsd report {_quoted(remains.output)}", [done])]
    elif state == "stopped":
        causes = [_stopped(remains)]
    else:
        causes = _causes(remains)
    return PostMortem(remains, state, causes)


def resume_command(remains: Remains) -> str:
    """The command that continues the run."""
    return f"popsd train {_quoted(remains.output / 'config.yaml')} overwrite=false"


def _state(remains: Remains) -> State:
    ends = remains.attempt.ends if remains.attempt else ()
    statuses = {end.status for end in ends if end.status is not None}
    if remains.holder is not None:
        return "running"
    if remains.done and statuses <= {0}:
        return "finished"
    if statuses <= {SAVED_AND_STOPPED} and (remains.stopped or statuses):
        return "stopped"
    return "dead"


def _running(remains: Remains, now: float) -> Cause:
    assert remains.holder is not None
    holder, age = remains.holder
    file = remains.output / "lock"
    cause = Cause("running", f"the run goes on: {holder.describe()}", 100, f"tail -f {_quoted(_metrics(remains))}")
    cause.evidence.append(Line(file, 0, f"heartbeat {age:.0f} s ago"))
    longest = max((_seconds(line) for _, line in remains.metrics), default=0.0)
    if longest and _metrics(remains).exists():
        silent = now - _metrics(remains).stat().st_mtime
        if silent > max(_PATIENCE[0] * longest, _PATIENCE[1]):
            cause.name, cause.what = "silent", f"{cause.what}; it has logged nothing for {silent:.0f} s, and may hang"
            cause.next = f"py-spy dump --pid {holder.pid}  # on {holder.host}"
            cause.evidence.append(Line(_metrics(remains), 0, f"the longest step took {longest:.0f} s"))
    return cause


def _seconds(line: object) -> float:
    names = ("train/seconds_rollout", "train/seconds_frozen", "train/seconds_train")
    values = [line.get(name, 0) for name in names] if isinstance(line, dict) else []
    return float(sum(value for value in values if isinstance(value, int | float)))


def _stopped(remains: Remains) -> Cause:
    cause = Cause("stopped", "a signal stopped the run, and what it had completed is saved", 100, "")
    cause.next = resume_command(remains)
    if remains.stopped:
        cause.evidence.append(Line(remains.output / "REQUEUE", 1, f"saved after step {remains.last_step}"))
    cause.evidence += [_of_end(end) for end in remains.attempt.ends[:1]] if remains.attempt else []
    cause.evidence += [line for lines in remains.logs.values() for line in lines if _STOP.search(line.text)][:2]
    return cause


def _causes(remains: Remains) -> list[Cause]:
    """All causes that the remains show, the most probable one first."""
    found: dict[str, Cause] = {}

    def add(symptom: Symptom, line: Line, more: float = 0.0) -> None:
        cause = found.get(symptom.name)
        if cause is None:
            cause = found[symptom.name] = Cause(symptom.name, symptom.what, 0.0, "")
        cause.weight = max(cause.weight, symptom.weight + more)
        shown = Line(line.file, line.number, " ".join(line.text.split())[:_LONGEST_TEXT])
        if len(cause.evidence) < _MOST_EVIDENCE:
            cause.evidence.append(shown)
        cause.next = cause.next or _command(symptom.next, remains, line.text)

    ended = sorted((end for end in _ends(remains) if end.ended is not None), key=lambda end: end.ended or 0.0)
    roots = [end for end in ended if end.error and _symptom_of(end).weight > EFFECT]
    for end in ended:
        if end.error:
            add(_symptom_of(end), _of_end(end), _FIRST_TO_END if end in roots[:1] else 0.0)
    for exit_file in remains.exits:
        if exit_file.status in _SIGNALS:
            add(_BY_NAME[_SIGNALS[exit_file.status]], exit_file.line)
    for lines in remains.logs.values():
        for line in lines:
            if (symptom := meaning(line.text)) is not None:
                add(symptom, line)
    _add_servers(remains, found)
    _add_dumps(remains, found)
    _add_unrecorded(remains, found)
    _add_versions(remains, found)
    if not found:
        found["unknown"] = Cause(
            "unknown",
            "nothing on the disk says why the run ended",
            0.0,
            f"popsd doctor --run {_quoted(remains.output)} --logs LOG",
        )
    return sorted(found.values(), key=lambda cause: -cause.weight)


def _ends(remains: Remains) -> Sequence[RankEnd]:
    return remains.attempt.ends if remains.attempt else ()


def _symptom_of(end: RankEnd) -> Symptom:
    """The symptom of a rank's error, by its text if it matches one, otherwise by its exit status."""
    return meaning(end.error) or _BY_NAME["user_error" if end.status == 2 else "defect" if end.where else "transient"]


def _of_end(end: RankEnd) -> Line:
    where = f" (at {end.where})" if end.where else ""
    return Line(end.file, end.line, f"rank {end.rank} ended with {end.status}: {end.error or 'no error'}{where}")


def _add_servers(remains: Remains, found: dict[str, Cause]) -> None:
    """Adds errors in the logs of vLLM servers: the reason if a server was lost, otherwise of little weight."""
    lost = found.get("vllm")
    for lines in remains.servers.values():
        for line in lines:
            symptom = meaning(line.text)
            if symptom is None or not symptom.of_servers:
                continue
            name = f"vllm_{symptom.name}"
            cause = found.setdefault(
                name,
                Cause(
                    name,
                    f"of a vLLM server: {symptom.what}",
                    (lost.weight + 1) if lost else EFFECT,
                    _command(symptom.next, remains, line.text),
                ),
            )
            if len(cause.evidence) < _MOST_EVIDENCE:
                cause.evidence.append(Line(line.file, line.number, line.text.strip()[:_LONGEST_TEXT]))
    if lost is not None:
        lost.evidence += [lines[-1] for lines in remains.servers.values() if lines][:2]


def _add_dumps(remains: Remains, found: dict[str, Cause]) -> None:
    """Adds dumps of the last attempt: of the Flight Recorder after a timeout, and of the memory after it ran out."""
    began = remains.attempt.began if remains.attempt else 0.0
    recent = [path for path in remains.dumps if path.stat().st_mtime >= began]
    flights = [path for path in recent if path.name.startswith(FLIGHT_PREFIX)]
    if flights:
        cause = _cause(found, "timeout", ROOT - 2, remains)
        silent = remains.silent_flights
        missing = f"; no dump of rank {', '.join(map(str, silent))}, which may be the one that hung" if silent else ""
        count = f"{len(flights)} dump{'s' if len(flights) > 1 else ''} of NCCL's Flight Recorder"
        cause.evidence.append(Line(flights[0].parent, 0, f"{count}{missing}"))
        cause.next = f"torchfrtrace --prefix {FLIGHT_PREFIX} {_quoted(remains.output / FOLDER)}"
    for path in recent:
        if path.name.startswith("memory-rank-"):
            cause = _cause(found, "device_memory", ROOT, remains)
            cause.evidence.append(Line(path, 0, "the state of its memory, for https://pytorch.org/memory_viz"))


def _add_unrecorded(remains: Remains, found: dict[str, Cause]) -> None:
    """Adds ranks that recorded no end, and ranks that recorded no beginning."""
    attempt = remains.attempt
    if attempt is None:
        return
    lost = [end for end in attempt.ends if end.ended is None]
    absent = sorted(set(range(attempt.ranks)) - {end.rank for end in attempt.ends})
    if lost:
        ranks = "all ranks" if len(lost) == attempt.ranks > 1 else f"rank {', '.join(str(end.rank) for end in lost)}"
        cause = Cause(
            "killed",
            f"{ranks} ended without a report: killed (out of host memory, by hand, by the batch system, a lost node) "
            "or a crash of native code",
            UNCLEAR + 8,
            _command(SHOW_JOB if remains.job else SHOW_KERNEL, remains, ""),
            [Line(end.file, end.line, f"rank {end.rank} began on {end.process.host} and has no end") for end in lost],
        )
        known = found.get("killed")
        cause.evidence = [*cause.evidence[:_MOST_EVIDENCE], *(known.evidence if known else [])]
        found["killed"] = cause
    if absent and any(end.rank == 0 for end in attempt.ends):
        ranks = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        found["absent"] = Cause(
            "absent",
            f"rank {ranks} of {attempt.ranks} did not get as far as rank 0: it failed while it started, or could not "
            "connect",
            UNCLEAR - 5,
            f"popsd doctor {_quoted(remains.output / 'config.yaml')} --imports",
            [Line(remains.output / "ranks", 0, f"files of {len(attempt.ends)} of {attempt.ranks} ranks")],
        )


def _add_versions(remains: Remains, found: dict[str, Cause]) -> None:
    """Adds library versions that differ from those of the previous attempt."""
    if len(remains.attempts) < 2:
        return
    before, last = (attempt.versions for attempt in remains.attempts[-2:])
    changed = [
        f"{name} {before[name]} → {last[name]}" for name in last if name in before and before[name] != last[name]
    ]
    if changed:
        line = Line(remains.output / "ranks", 0, "; ".join(changed))
        text = "libraries changed since the attempt before"
        found["versions"] = Cause("versions", text, EFFECT + 5, "popsd doctor --strict", [line])


def _cause(found: dict[str, Cause], name: str, weight: float, remains: Remains) -> Cause:
    """The cause for a symptom, created if missing, with at least the given weight."""
    symptom = _BY_NAME[name]
    cause = found.setdefault(name, Cause(name, symptom.what, weight, _command(symptom.next, remains, "")))
    cause.weight = max(cause.weight, weight)
    return cause


def _command(template: str, remains: Remains, text: str) -> str:
    step = int(match[1]) if (match := _STEP.search(text)) else remains.last_step + 1
    server = max(remains.servers, key=lambda file: file.stat().st_mtime, default=remains.output / "vllm")
    if "{job}" in template and not remains.job:
        template = template.replace("{job}", "JOB")
    return template.format(
        output=_quoted(remains.output),
        config=_quoted(remains.output / "config.yaml"),
        step=step,
        job=remains.job,
        server=_quoted(server),
    )


def _metrics(remains: Remains) -> Path:
    return remains.output / "metrics.jsonl"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def shown_path(line: Line, output: Path) -> str:
    """File and line of evidence; the path is relative to `output` if it is below it."""
    file = line.file.relative_to(output) if line.file.is_relative_to(output) else line.file
    return f"{file}:{line.number}" if line.number else str(file)


def facts(remains: Remains) -> Iterator[tuple[str, str]]:
    """Name and text of each known fact about the run."""
    training = remains.config.get("training")
    steps = training.get("steps") if isinstance(training, dict) else None
    yield "steps", f"{remains.last_step} of {steps or 'an unknown number'} with metrics"
    if (attempt := remains.attempt) is not None:
        first = attempt.ends[0].process
        job = f", job {first.job}, start {first.start}" if first.job else ""
        ranks = f"{attempt.ranks} rank{'s' if attempt.ranks > 1 else ''}"
        yield "attempt", f"number {len(remains.attempts)}, {ranks} on {first.host}{job}, since {first.since}"
        ends = [f"rank {end.rank} {'no end' if end.status is None else end.status}" for end in attempt.ends]
        yield "statuses", ", ".join(ends[:16]) + (", ..." if len(ends) > 16 else "")
        yield "versions", ", ".join(f"{name} {number}" for name, number in attempt.versions.items() if number)
    if remains.metrics:
        number, last = remains.metrics[-1]
        values = [f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, int | float)][:6]
        yield "metrics", f"metrics.jsonl:{number}: {', '.join(values)}"
    alarms = [f"{name} at step {line.get('step')}" for _, line in remains.metrics for name in line if "guard/" in name]
    if alarms:
        yield "alarms", ", ".join(alarms[-6:])
    complete = [name for name, step in remains.checkpoints.items() if step is not None]
    broken = [name for name, step in remains.checkpoints.items() if step is None]
    text = f"complete: {', '.join(complete) or 'none'}" + (f"; incomplete: {', '.join(broken)}" if broken else "")
    yield "checkpoints", text
    marks = [name for name, exists in (("DONE", remains.done), ("REQUEUE", remains.stopped)) if exists]
    yield "marks", ", ".join(marks) or "none"
    logs = [str(file) for file in (*remains.logs, *remains.servers)]
    yield "logs", ", ".join(logs[:8]) + (f" and {len(logs) - 8} more" if len(logs) > 8 else "") if logs else "none"
    if remains.dumps:
        yield "dumps", ", ".join(path.name for path in remains.dumps[:8])
    if not remains.done and (newest := remains.resumable) is not None:
        yield "resume", f"{resume_command(remains)}  # after step {newest[1]}, from {newest[0]}"
