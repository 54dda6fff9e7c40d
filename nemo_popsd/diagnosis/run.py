"""Runs a diagnosis: rollouts, four forwards, decomposition, aggregates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_popsd.data.dataset import PromptDataset, PromptRow
from nemo_popsd.diagnosis.config import DiagnosisConfig, DiagnosisSettings
from nemo_popsd.diagnosis.forwards import RowRollout, equal_counts, generate_rollouts, hidden_states, token_batches
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
from nemo_popsd.diagnosis.schema import Extremes, Groups, Push, PushedEntry, RolloutRecord, SettingsRecord, Summary
from nemo_popsd.diagnosis.tokens import DISTRIBUTIONS, Alternatives, BranchStates, diagnose_tokens
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.student import Student
from nemo_popsd.parallel.signals import StopSignals
from nemo_popsd.rollout.engine import Rollout, RolloutEngine, SamplingParams
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
    """Whether its rollout is recorded with alternatives for each token."""


def choose_rows(dataset: PromptDataset, settings: DiagnosisConfig) -> list[DiagnosedRow]:
    """The rows to diagnose: shown rows first, then the others of the first `rows`. The same on every rank.

    Raises:
        UserError: a row of `shown_rows` is missing.
    """
    shown_indices = [dataset.index(row_id) for row_id in settings.shown_rows]
    if None in shown_indices:
        raise UserError(
            "diagnosis",
            got=f"diagnosis.shown_rows={settings.shown_rows!r}, but "
            f"{settings.shown_rows[shown_indices.index(None)]!r} is not among the {len(dataset)} rows",
            need="ids of rows of data.train that are within its limits",
            fix="set diagnosis.shown_rows",
        )
    first = list(range(min(settings.rows, len(dataset))))
    shown = [index for index in shown_indices if index is not None] or first[: settings.shown]
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
    """Generates one rollout for each row and decomposes the teacher's signal on all its tokens. Collective.

    Random numbers depend on the seed of the run and on the row, not on the step: diagnoses before and after training
    differ only by the weights. Rows are distributed over data-parallel ranks, and each rank of the last pipeline stage
    decomposes the tokens that it owns. At any time, hidden states of at most `training.frozen_tokens` response tokens
    and logits of `diagnosis.chunk_tokens` exist. One gather of objects over all ranks.

    Args:
        student: live and frozen weights.
        engine: generates with the live weights.
        sampling: sampling parameters.
        tokenizer: tokenizer of the student.
        rows: rows from `choose_rows`, the same on every rank.
        settings: settings of the diagnosis.
        name: name of the diagnosed model, for the record.
        step: number of optimizer steps of the live weights.
        stop: checked after the rollouts, which a signal ends early.

    Returns:
        The diagnosis, the same on every rank.

    Raises:
        StopRequested: a signal requested a stop. Raised on every rank.
    """
    prompts = [row.row for row in rows]
    rollouts = generate_rollouts(student, engine, sampling, prompts, settings, stop)
    push = VocabularyPush(student.vocab_shard, student.weight.device) if student.holds_output else None
    parts: list[_RolloutFigures] = []
    for batch in equal_counts(student, token_batches(rollouts, settings.frozen_tokens)):
        states = _branch_states(student, [rollout.trajectory for rollout in batch], settings)
        if push is not None:
            parts += [
                _decompose(student, rollout, branch_states, push, settings, shown=rows[rollout.row].shown)
                for rollout, branch_states in zip(batch, states, strict=True)
            ]
    push_record = None
    if push is not None:
        push.reduce_over_(parallel_state.get_data_parallel_group(with_context_parallel=True))
        push_record = _push_record(push, student, tokenizer, settings)
    # Ranks that share a vocabulary have the same results, so one of them reports; earlier pipeline stages have none.
    reported = parts if student.owns_loss else []
    gathered: list[tuple[list[_RolloutFigures], Push | None]] = [([], None)] * dist.get_world_size()
    dist.all_gather_object(gathered, (reported, push_record))
    records = [
        _rollout_record(rows[index].row, _merged(row_parts), tokenizer, settings.markers)
        for index, row_parts in _by_row(part for rank_parts, _ in gathered for part in rank_parts)
    ]
    push_record = next(record for _, record in gathered if record is not None)
    summary: Summary = {
        "format": FORMAT,
        "name": name,
        "step": step,
        "settings": _recorded(settings, len(rows)),
        "rollouts": len(records),
        "tokens": push_record["tokens"],
        "measures": MEASURES,
        "groups": _groups(records, settings.diagnosis),
        "push": push_record,
    }
    return Diagnosis(summary, records)


@dataclass(frozen=True)
class _RolloutFigures:
    """Results of one rollout's tokens, on the CPU, as exchanged between ranks."""

    row: int
    """Index of the row."""
    rollout: Rollout
    owned: slice
    """The tokens of the response that the results cover."""
    values: dict[str, list[float]]
    alternatives: Alternatives | None


def _by_row(parts: Iterable[_RolloutFigures]) -> list[tuple[int, list[_RolloutFigures]]]:
    """Groups the parts of each rollout, in the order of the rows."""
    row_parts: dict[int, list[_RolloutFigures]] = {}
    for part in parts:
        row_parts.setdefault(part.row, []).append(part)
    return sorted(row_parts.items())


def _merged(parts: Sequence[_RolloutFigures]) -> _RolloutFigures:
    """Merges the results of a rollout from all context-parallel ranks."""
    first, count = parts[0], len(parts[0].rollout.response)
    values: dict[str, list[float]] = {name: [math.nan] * count for name in first.values}
    alternatives = None
    if first.alternatives is not None:
        alternatives = Alternatives(*(x.new_empty(x.shape[0], count, x.shape[2]) for x in first.alternatives))
    for part in parts:
        for name, column in part.values.items():
            values[name][part.owned] = column
        if alternatives is not None and part.alternatives is not None:
            for merged, owned in zip(alternatives, part.alternatives, strict=True):
                merged[:, part.owned] = owned
    return replace(first, owned=slice(None), values=values, alternatives=alternatives)


def _branch_states(student: Student, part: Sequence[Trajectory], settings: DiagnosisSettings) -> list[BranchStates]:
    """Hidden states of the four contexts at the response tokens that this rank owns of each trajectory; an empty list
    except on the last pipeline stage.
    """
    live = hidden_states(student.chunks, [t.student for t in part], settings)
    contexts = [[t.student for t in part], [t.privileged for t in part], [t.reference for t in part]]
    with student.base.model() as base:
        frozen = hidden_states(base, [s for sequences in contexts for s in sequences], settings)
    count = len(part) if live else 0
    return [BranchStates(live[row], frozen[row], frozen[count + row], frozen[2 * count + row]) for row in range(count)]


def _decompose(
    student: Student,
    row_rollout: RowRollout,
    states: BranchStates,
    push: VocabularyPush,
    settings: DiagnosisSettings,
    *,
    shown: bool,
) -> _RolloutFigures:
    """Decomposes the signal on this rank's tokens of one rollout, and adds the tokens to `push`."""
    rollout = row_rollout.trajectory.rollout
    owned = student.split.owned(rollout.response)
    diagnosis, alternatives = diagnose_tokens(
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
    columns = {name: column.cpu() for name, column in diagnosis.columns().items()}
    for name, (raised, lowered) in _DELTAS.items():
        columns[name] = columns[raised] - columns[lowered]
    values = {name: columns[name].tolist() for name in (*MEASURES, *_LOG_PROBS)}
    on_cpu = Alternatives(*(x.cpu() for x in alternatives)) if alternatives else None
    return _RolloutFigures(row_rollout.row, rollout, owned, values, on_cpu)


def _rollout_record(
    row: PromptRow, figures: _RolloutFigures, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]
) -> RolloutRecord:
    """One line of rollouts.jsonl."""
    pieces = token_pieces(tokenizer, figures.rollout.response)
    alternatives = None
    if figures.alternatives is not None:
        ids = figures.alternatives.ids.flatten().unique().tolist()
        texts = tokenizer.batch_decode([[token] for token in ids])
        alternatives = alternatives_record(figures.alternatives, dict(zip(ids, texts, strict=True)))
    return {
        "row": row.record.id,
        "question": row.record.question,
        "reference": row.contexts.reference_text,
        "truncated": figures.rollout.truncated,
        "pieces": pieces,
        "marked": [int(mark) for mark in marked_tokens(pieces, markers)],
        "values": {name: [rounded(value) for value in column] for name, column in figures.values.items()},
        "alternatives": alternatives,
    }


def _groups(rollouts: Sequence[RolloutRecord], settings: DiagnosisConfig) -> Groups:
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


def _push_record(
    push: VocabularyPush, student: Student, tokenizer: PreTrainedTokenizerBase, settings: DiagnosisSettings
) -> Push:
    """The push of summary.json.

    Collectives over the vocabulary group: those of `extremes`, and one for each marker.
    """
    count = min(settings.diagnosis.listed_tokens, student.vocab_size)
    promoted, suppressed = push.extremes(count)
    components: dict[str, Extremes] = {}
    for index, name in enumerate(COMPONENTS):
        entries: list[list[PushedEntry]] = []
        for lists in (promoted, suppressed):
            tokens = lists[index]
            texts = tokenizer.batch_decode([[token] for token in tokens.ids.tolist()])
            entries.append([pushed_entry(tokens, place, text, push.tokens) for place, text in enumerate(texts)])
        components[name] = {"promoted": entries[0], "suppressed": entries[1]}
    entries_of_markers = marker_entries(tokenizer, settings.markers, student.vocab_size)
    marker_tokens = {
        marker: push.look_up(torch.tensor(ids, dtype=torch.long, device=push.mass.device))
        for marker, ids in entries_of_markers.items()
    }
    return {
        "tokens": push.tokens,
        "components": components,
        "markers": {marker: marker_push(tokens, push.tokens) for marker, tokens in marker_tokens.items()},
    }


def _recorded(settings: DiagnosisSettings, rows: int) -> SettingsRecord:
    """The settings that summary.json records."""
    return {
        "data": settings.data_path,
        "rows": rows,
        "student": settings.student_source,
        "seed": settings.seed,
        "rollout": {k: v for k, v in asdict(settings.rollout).items() if k not in ("batch_rows", "cache_tokens")},
        "target": asdict(settings.target),
        "markers": list(settings.markers),
    }
