"""The files of a diagnosis: `summary.json` with all aggregates, `rollouts.jsonl` with one rollout per line.

summary.json
    format          1
    name, step      name of the diagnosed model, and its number of optimizer steps
    settings        rows, rollout sampling, target, temperature, markers
    rollouts, tokens
    measures        the meaning of each per-token statistic
    groups          see `nemo_popsd.diagnosis.groups`
    rollouts_sha256  SHA-256 of rollouts.jsonl
    sum             checksum of the rest of this file
    push            tokens: as above; "components": for each of total, reference, question, target the lists "promoted"
                    and "suppressed" of entries {id, text, mass, push: {component: ...}}; "markers": the same sums
                    over the entries of each marker that is one token, otherwise null. Sums are per 1,000 response
                    tokens.
rollouts.jsonl
    row, question, reference
    truncated       whether the response ended at the length limit (older files name the key `cut`)
    pieces          the text of each token
    marked          1 for tokens of a marker, otherwise 0
    values          for each measure, and for log_student, log_base, log_privileged, log_reference, log_target of the
                    response's token, a list with one value per token; null if undefined
    alternatives    null, or "texts" (each token once) and for student, base, privileged, reference and target a list
                    by token of [index into texts, probability, index, probability, ...]
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_popsd.diagnosis.ownership import ROLLOUTS, SUMMARY, refuse_other_files
from nemo_popsd.diagnosis.push import COMPONENTS, PushedTokens
from nemo_popsd.diagnosis.schema import MarkerPush, PushedEntry, RolloutRecord, Summary
from nemo_popsd.diagnosis.tokens import DISTRIBUTIONS, Alternatives
from nemo_popsd.files.atomic import write_text
from nemo_popsd.files.json_files import checksum
from nemo_popsd.files.ownership import DIAGNOSIS, write_mark

FORMAT = 1
_DIGITS = 5


@dataclass(frozen=True)
class Diagnosis:
    """The content of both files."""

    summary: Summary
    rollouts: list[RolloutRecord]

    def write(self, directory: Path) -> None:
        """Writes both files into `directory`, which is created if needed.

        The summary is written last; if it exists, both files are complete.

        Raises:
            UserError: files of these names exist that were not written by a diagnosis.
        """
        refuse_other_files(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_mark(directory, DIAGNOSIS)
        lines = "".join(json.dumps(rollout, ensure_ascii=False) + "\n" for rollout in self.rollouts)
        write_text(directory / ROLLOUTS, lines)
        summary = {**self.summary, "rollouts_sha256": hashlib.sha256(lines.encode()).hexdigest()}
        text = json.dumps({**summary, "sum": checksum(summary)}, ensure_ascii=False, indent=1)
        write_text(directory / SUMMARY, text + "\n")


def rounded(value: float) -> float | None:
    """`value` rounded to five significant digits; None for NaN and infinities, which JSON does not support."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def pushed_entry(tokens: PushedTokens, index: int, text: str, total_tokens: int) -> PushedEntry:
    """One vocabulary entry for the summary, per 1,000 tokens."""
    scale = 1000 / max(total_tokens, 1)
    return {
        "id": int(tokens.ids[index]),
        "text": text,
        "mass": rounded(float(tokens.mass[index]) * scale),
        "push": _by_component(tokens.push[:, index].tolist(), scale),
    }


def marker_push(tokens: PushedTokens, total_tokens: int) -> MarkerPush | None:
    """Sums over the entries of one marker, per 1,000 tokens; None if the marker has no entry."""
    if not len(tokens.ids):
        return None
    scale = 1000 / max(total_tokens, 1)
    return {
        "entries": len(tokens.ids),
        "mass": rounded(float(tokens.mass.sum()) * scale),
        "push": _by_component(tokens.push.sum(1).tolist(), scale),
    }


def alternatives_record(alternatives: Alternatives, texts: Mapping[int, str]) -> dict[str, object]:
    """Alternatives of one rollout, with each text stored once.

    Args:
        alternatives: alternatives, on the CPU.
        texts: text of every id in `alternatives`.
    """
    order = {token: index for index, token in enumerate(texts)}
    record: dict[str, object] = {"texts": list(texts.values())}
    for name, log_probs, ids in zip(DISTRIBUTIONS, alternatives.log_probs, alternatives.ids, strict=True):
        record[name] = [
            [part for token, p in zip(row, ps, strict=True) for part in (order[token], float(f"{p:.3g}"))]
            for row, ps in zip(ids.tolist(), log_probs.double().exp().tolist(), strict=True)
        ]
    return record


def _by_component(values: Sequence[float], scale: float) -> dict[str, float | None]:
    return {name: rounded(value * scale) for name, value in zip(COMPONENTS, values, strict=True)}
