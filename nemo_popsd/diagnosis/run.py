"""From a student, an engine and rows to a diagnosis: rollouts, four forwards, decomposition, aggregates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_popsd.data.dataset import PromptDataset, PromptRow
from nemo_popsd.diagnosis.config import DiagnosisConfig, DiagnosisSettings
from nemo_popsd.diagnosis.groups import MEASURES, TokenFigures, group_figures
from nemo_popsd.diagnosis.pieces import marked_tokens, marker_entries, token_pieces
from nemo_popsd.diagnosis.push import COMPONENTS, VocabularyPush
from nemo_popsd.diagnosis.record import (
    FORMAT,
    Diagnosis,
    alternatives_record,
    marker_push,
    pushed_entry,
    rounded,
)
from nemo_popsd.diagnosis.tokens import DISTRIBUTIONS, Alternatives, BranchStates, diagnose_tokens
from nemo_popsd.distillation.families import build_target
from nemo_popsd.errors import StopRequested, UserError
from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
from nemo_popsd.megatron.microbatches import ContextSequence
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.distributed import device
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams, row_seed
from nemo_popsd.training.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG_PROBS = tuple(f"log_{name}" for name in DISTRIBUTIONS)
_DELTAS = {
    "delta_total": ("log_privileged", "log_student"),
    "delta_reference": ("log_reference", "log_student"),
    "delta_question": ("log_privileged", "log_reference"),
    "delta_target": ("log_target", "log_student"),
}


@dataclass(frozen=True)
class DiagnosedRow:
    """A row to diagnose."""

    row: PromptRow
    shown: bool
    """Whether its rollout is kept with alternatives for each token."""


def choose_rows(dataset: PromptDataset, settings: DiagnosisConfig) -> list[DiagnosedRow]:
    """The rows that `settings` names, those to be shown first named first; the same on every rank.

    Raises:
        UserError: a row that is to be shown is not there.
    """
    named = [dataset.index(row_id) for row_id in settings.shown_rows]
    if None in named:
        raise UserError(
            "diagnosis",
            got=f"diagnosis.shown_rows={settings.shown_rows!r}, of which "
            f"{settings.shown_rows[named.index(None)]!r} is not among the {len(dataset)} rows",
            need="ids of rows of data.train that are within its limits",
            fix="set diagnosis.shown_rows",
        )
    first = list(range(min(settings.rows, len(dataset))))
    shown = [index for index in named if index is not None] or first[: settings.shown]
    order = list(dict.fromkeys([*shown, *first]))
    return [DiagnosedRow(dataset[index], index in shown) for index in order]


def diagnose(
    student: Student,
    engine: RolloutEngine,
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[DiagnosedRow],
    settings: DiagnosisSettings,
    *,
    name: str,
    step: int,
    stop: StopSignals | None = None,
) -> Diagnosis:
    """Draws one rollout for each row and decomposes the teacher's signal on all its tokens. Collective.

    Random numbers depend on the run's seed and the row, not on the step: diagnoses before and after training differ
    by the weights alone. Rows are shared out over data-parallel ranks, and each rank of the last pipeline stage
    decomposes the tokens that it owns; hidden states of `training.frozen_tokens` response tokens exist at one time, and
    logits of `diagnosis.chunk_tokens`. One gather of objects over all ranks.

    Args:
        student: live and frozen weights.
        engine: draws from the live ones.
        sampling: how.
        tokenizer: the student's.
        rows: from `choose_rows`, the same on every rank.
        settings: what the run's configuration says of it.
        name: of what is diagnosed.
        step: optimizer steps behind the live weights.
        stop: asked after the rollouts, which a signal cuts short.

    Returns:
        The same on every rank.

    Raises:
        StopRequested: on every rank.
    """
    drawn = _draw(student, engine, sampling, rows, settings, stop)
    push = VocabularyPush(student.vocab_shard, student.weight.device) if student.holds_output else None
    parts: list[_Diagnosed] = []
    for some in _in_step(student, _within(drawn, settings.frozen_tokens)):
        states = _branch_states(student, [d.trajectory for d in some], settings)
        if push is not None:
            parts += [
                _diagnosed(student, d, of, push, settings, shown=rows[d.row].shown)
                for d, of in zip(some, states, strict=True)
            ]
    pushed = None
    if push is not None:
        push.reduce_over_(parallel_state.get_data_parallel_group(with_context_parallel=True))
        pushed = _push(push, student, tokenizer, settings)
    # What one of the ranks that share a vocabulary knows, all of them know; first pipeline stages know nothing.
    told = parts if student.owns_loss else []
    gathered: list[tuple[list[_Diagnosed], dict[str, Any] | None]] = [([], None)] * dist.get_world_size()
    dist.all_gather_object(gathered, (told, pushed))
    records = [
        _rollout_record(rows[number].row, _joined(owned), tokenizer, settings.markers)
        for number, owned in _by_row(part for found, _ in gathered for part in found)
    ]
    pushed = next(found for _, found in gathered if found is not None)
    summary = {
        "format": FORMAT,
        "name": name,
        "step": step,
        "settings": _recorded(settings, len(rows)),
        "rollouts": len(records),
        "tokens": pushed["tokens"],
        "measures": MEASURES,
        "groups": _groups(records, settings.diagnosis),
        "push": pushed,
    }
    return Diagnosis(summary, records)


@dataclass(frozen=True)
class _Drawn:
    """A rollout to row number `row`."""

    row: int
    trajectory: Trajectory


@dataclass(frozen=True)
class _Diagnosed:
    """What was found on one rollout, on the CPU: what ranks tell each other."""

    row: int
    rollout: Rollout
    owned: slice
    """Which of its tokens this is about."""
    values: dict[str, list[float]]
    alternatives: Alternatives | None


def _draw(
    student: Student,
    engine: RolloutEngine,
    sampling: SamplingParams,
    rows: Sequence[DiagnosedRow],
    settings: DiagnosisSettings,
    stop: StopSignals | None,
) -> list[_Drawn]:
    """One rollout for each of this data-parallel rank's rows. Ranks that share experts draw equally many: who has
    fewer draws a row of another's, and keeps it to itself.
    """
    dp_rank, dp_size = student.dp_group.rank(), student.dp_group.size()
    mine = list(range(len(rows)))[dp_rank::dp_size]
    asked = list(mine)
    if settings.expert_parallel:
        asked += [0] * (math.ceil(len(rows) / dp_size) - len(mine))
    requests = [
        Request(row.contexts.student, row_seed(settings.seed, "diagnosis", row.record.id))
        for row in (rows[index].row for index in asked)
    ]
    rollouts: list[Rollout] = []
    try:
        rollouts = engine.generate(requests, sampling) if requests else []
    except StopRequested:
        if stop is None:
            raise
        stop.request()
    if stop is not None:
        stop.raise_if_requested()
    return [_Drawn(i, Trajectory(rows[i].row, rollout)) for i, rollout in zip(mine, rollouts[: len(mine)], strict=True)]


def _in_step(student: Student, parts: Iterable[list[_Drawn]]) -> list[list[_Drawn]]:
    """`parts`, with empty ones added until every data-parallel rank has as many (one all-reduce of a number): their
    forwards are collective where ranks share experts.
    """
    own = list(parts)
    most = torch.tensor(len(own), device=device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=student.dp_group)
    return own + [[] for _ in range(int(most) - len(own))]


def _by_row(parts: Iterable[_Diagnosed]) -> list[tuple[int, list[_Diagnosed]]]:
    """Parts of the same rollout together, in the order of the rows."""
    found: dict[int, list[_Diagnosed]] = {}
    for part in parts:
        found.setdefault(part.row, []).append(part)
    return sorted(found.items())


def _joined(parts: Sequence[_Diagnosed]) -> _Diagnosed:
    """One rollout, from what the context-parallel ranks found on the tokens that they own."""
    first, count = parts[0], len(parts[0].rollout.response)
    values: dict[str, list[float]] = {name: [math.nan] * count for name in first.values}
    alternatives = None
    if first.alternatives is not None:
        alternatives = Alternatives(*(x.new_empty(x.shape[0], count, x.shape[2]) for x in first.alternatives))
    for part in parts:
        for name, column in part.values.items():
            values[name][part.owned] = column
        if alternatives is not None and part.alternatives is not None:
            for whole, owned in zip(alternatives, part.alternatives, strict=True):
                whole[:, part.owned] = owned
    return replace(first, owned=slice(None), values=values, alternatives=alternatives)


def _within(drawn: Sequence[_Drawn], tokens: int) -> Iterator[list[_Drawn]]:
    """Parts of `drawn`, in order, of at most `tokens` response tokens where more than one."""
    part: list[_Drawn] = []
    held = 0
    for one in drawn:
        length = len(one.trajectory.rollout.response)
        if part and held + length > tokens:
            yield part
            part, held = [], 0
        part.append(one)
        held += length
    if part:
        yield part


def _branch_states(student: Student, part: Sequence[Trajectory], settings: DiagnosisSettings) -> list[BranchStates]:
    """Hidden states of the four contexts at the response tokens that this rank owns of each trajectory; none but on
    the last pipeline stage.
    """

    def states(chunks: list[GPTModel], sequences: list[ContextSequence]) -> list[Tensor]:
        batches = student_batches(chunks, sequences, settings.frozen_tokens, packed=settings.packing)
        return frozen_hidden_states(chunks, batches)

    live = states(student.chunks, [t.student for t in part])
    contexts = [[t.student for t in part], [t.privileged for t in part], [t.reference for t in part]]
    with student.base.model() as base:
        frozen = states(base, [s for sequences in contexts for s in sequences])
    count = len(part) if live else 0
    return [BranchStates(live[row], frozen[row], frozen[count + row], frozen[2 * count + row]) for row in range(count)]


def _diagnosed(
    student: Student,
    drawn: _Drawn,
    states: BranchStates,
    push: VocabularyPush,
    settings: DiagnosisSettings,
    *,
    shown: bool,
) -> _Diagnosed:
    """Decomposes the signal on this rank's tokens of one rollout, and adds it to `push`."""
    rollout = drawn.trajectory.rollout
    owned = student.split.owned(rollout.response)
    found, alternatives = diagnose_tokens(
        states,
        torch.tensor(rollout.response[owned], dtype=torch.long, device=states.student.device),
        student.weight.detach(),
        student.base_weight,
        target=build_target(settings.target),
        shard=student.vocab_shard,
        push=push,
        alternatives=min(settings.diagnosis.alternatives, student.vocab_size) if shown else 0,
        chunk_tokens=settings.diagnosis.chunk_tokens,
    )
    columns = {name: column.cpu() for name, column in found.columns().items()}
    for name, (raised, lowered) in _DELTAS.items():
        columns[name] = columns[raised] - columns[lowered]
    kept = {name: columns[name].tolist() for name in (*MEASURES, *_LOG_PROBS)}
    best = Alternatives(*(x.cpu() for x in alternatives)) if alternatives else None
    return _Diagnosed(drawn.row, rollout, owned, kept, best)


def _rollout_record(
    row: PromptRow, found: _Diagnosed, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]
) -> dict[str, Any]:
    """One line of rollouts.jsonl."""
    pieces = token_pieces(tokenizer, found.rollout.response)
    kept = None
    if found.alternatives is not None:
        ids = found.alternatives.ids.flatten().unique().tolist()
        texts = tokenizer.batch_decode([[token] for token in ids])
        kept = alternatives_record(found.alternatives, dict(zip(ids, texts, strict=True)))
    return {
        "row": row.record.id,
        "question": row.record.question,
        "reference": row.contexts.reference_text,
        "cut": found.rollout.truncated,
        "pieces": pieces,
        "marked": [int(mark) for mark in marked_tokens(pieces, markers)],
        "values": {name: [rounded(value) for value in column] for name, column in found.values.items()},
        "alternatives": kept,
    }


def _groups(rollouts: Sequence[dict[str, Any]], settings: DiagnosisConfig) -> dict[str, Any]:
    tokens = [
        TokenFigures(
            position,
            bool(marked),
            {name: _number(rollout["values"][name][position]) for name in MEASURES},
        )
        for rollout in rollouts
        for position, marked in enumerate(rollout["marked"])
    ]
    return group_figures(tokens, position_bins=settings.position_bins, entropy_edges=settings.entropy_edges)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _push(
    push: VocabularyPush, student: Student, tokenizer: PreTrainedTokenizerBase, settings: DiagnosisSettings
) -> dict[str, Any]:
    count = min(settings.diagnosis.listed_tokens, student.vocab_size)
    promoted, suppressed = push.extremes(count)
    components: dict[str, Any] = {}
    for row, name in enumerate(COMPONENTS):
        components[name] = {}
        for direction, lists in (("promoted", promoted), ("suppressed", suppressed)):
            tokens = lists[row]
            texts = tokenizer.batch_decode([[token] for token in tokens.ids.tolist()])
            components[name][direction] = [
                pushed_entry(tokens, place, text, push.tokens) for place, text in enumerate(texts)
            ]
    entries = marker_entries(tokenizer, settings.markers, student.vocab_size)
    device = push.mass.device
    found = {
        marker: push.look_up(torch.tensor(ids, dtype=torch.long, device=device)) for marker, ids in entries.items()
    }
    return {
        "tokens": push.tokens,
        "components": components,
        "markers": {marker: marker_push(tokens, push.tokens) for marker, tokens in found.items()},
    }


def _recorded(settings: DiagnosisSettings, rows: int) -> dict[str, Any]:
    """The settings that summary.json repeats."""
    return {
        "data": settings.data_path,
        "rows": rows,
        "student": settings.student_source,
        "seed": settings.seed,
        "rollout": {k: v for k, v in asdict(settings.rollout).items() if k not in ("batch_rows", "cache_tokens")},
        "target": asdict(settings.target),
        "markers": list(settings.markers),
    }
