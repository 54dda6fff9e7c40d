"""Which settings may change when a run is resumed from a checkpoint, and which would make it a different run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.settings.checks import shown

_MOST_NAMED = 6
"""Maximum number of settings named in one message."""

FREE = (
    "name",
    "output",
    "overwrite",
    "student.source",  # may be moved; the digest of its weights must be the same
    "student.layers",
    "student.recompute",
    "student.recompute_modules",
    "student.recompute_method",
    "student.recompute_layers",
    "student.gradient_accumulation_fusion",
    "student.frozen_copy",
    "parallel",
    "data.train.path",  # may be moved; the rows must be the same
    "data.train.more_paths",
    "data.train.answer_pattern",  # if a teacher sees the answers, the rows must be the same
    "data.validation",
    "rollout.batch_rows",
    "rollout.cache_tokens",
    "rollout.save",
    "rollout.vllm",
    "distillation.chunk_tokens",
    "distillation.fused",
    "distillation.diagnosed_tokens",
    "optimizer.distributed",
    "optimizer.overlap_grad_reduce",
    "optimizer.overlap_param_gather",
    "optimizer.bucket_size",
    "optimizer.host_share",
    "megatron.ddp",
    "training.steps",
    "training.microbatch_tokens",
    "training.frozen_tokens",
    "training.share_prefixes",
    "training.frozen_cache_tokens",
    "training.packing",
    "training.cache_on_host",
    "training.validate_every",
    "training.checkpoint_every",
    "training.async_save",
    "training.keep_last",
    "training.keep_best",
    "training.best_metric",
    "training.best_is",
    "training.collective_timeout",
    "training.self_check",
    "training.export_huggingface",
    "guard",
    "evaluation",
    "observability",
)
"""Sections and settings that may change: they do not affect the trained weights, except for rounding and the number of
steps. All others, including future ones, must stay the same."""


def refuse_another_run(old: PopsdConfig, new: PopsdConfig) -> None:
    """Refuse to resume a run with settings that would make it a different run.

    Args:
        old: configuration in the checkpoint.
        new: current configuration.

    Raises:
        UserError: settings differ that must not; the message names them.
    """
    before, after = _flat(asdict(old)), _flat(asdict(new))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key) and not _is_free(key)]
    if changed:
        named = [f"{key}={_short(after.get(key))} (was {_short(before.get(key))})" for key in changed[:_MOST_NAMED]]
        more = f" and {len(changed) - _MOST_NAMED} more settings" if len(changed) > _MOST_NAMED else ""
        raise UserError(
            "resuming",
            got=", ".join(named) + more,
            need=f"the settings of the run in output={shown(new.output)} (its config.yaml)",
            fix=f"set {', '.join(changed[:_MOST_NAMED])}{more} back, set output for another run, or overwrite=true to "
            "start again at step 1",
        )


def with_decisions(config: PopsdConfig, earlier: PopsdConfig | None) -> PopsdConfig:
    """Return `config` with the resolved value of `parallel.sequence=auto`, for the record of a run.

    Args:
        config: configuration of this start.
        earlier: configuration of the run that it resumes; its value applies to the same number of tensor-parallel
            ranks. None for a new run.
    """
    parallel = config.parallel
    if parallel.sequence != "auto":
        return config
    same = earlier is not None and earlier.parallel.tensor == parallel.tensor
    decided = (earlier.parallel if earlier is not None and same else parallel).splits_sequences
    return replace(config, parallel=replace(parallel, sequence=str(decided).lower()))


DONE = "DONE"
"""File in `output` of a finished run; contains the number of its steps."""
REQUEUE = "REQUEUE"
"""File in `output` of a run that stopped on request, has saved, and should be started again."""


def finished_steps(output: str) -> int | None:
    """Return the steps of the finished run in `output`; None if there is no finished run."""
    try:
        return int((Path(output) / DONE).read_text())
    except (OSError, ValueError):
        return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
