"""Synthetic directories of runs, in the format that training writes."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemo_popsd.config.loading import save_resolved
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.diagnosis.groups import MEASURES, TokenFigures, group_figures
from nemo_popsd.diagnosis.push import COMPONENTS
from nemo_popsd.diagnosis.record import Diagnosis
from nemo_popsd.diagnosis.tokens import DISTRIBUTIONS
from nemo_popsd.diagnosis.views.record import Score, ViewScores
from nemo_popsd.diagnosis.views.tokens import DISTRIBUTIONS as VIEW_DISTRIBUTIONS
from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS
from nemo_popsd.evaluation.comparison import Evaluation
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.markers import count_markers
from nemo_popsd.evaluation.records import EvaluationDirectory, Problem, Sample, SampleScore
from nemo_popsd.observability.metrics import DECLARED, GROUPS, CostMetrics, MismatchMetrics, StepMetrics
from tests.evaluation.scores import sample_settings

_DIFFERENCES = ("teacher_over_reference", "target_over_student")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`]]>-->\u2028\x00 <b>bold</b> &lt;"
"""Text that would break out of a page without escaping."""


def step_metrics(step: int, *, scale: float = 1.0) -> StepMetrics:
    """All metrics of one step."""
    nested = ("statistics", *GROUPS)
    names = [*(item.name for item in fields(StepMetrics) if item.name not in nested), *(s.name for s in DECLARED)]
    values: dict[str, Any] = {name: scale * (index + 1) / (step + 1) for index, name in enumerate(names)}
    mismatch = MismatchMetrics(kl=1e-4 * step, start_kl=2e-4, mean_ratio=1.0, max=0.1, share=0.0)
    cost = CostMetrics(tflops=12.5, seconds_waiting=0.5)
    statistics = {s.name: values.pop(s.name) for s in DECLARED}
    return StepMetrics(statistics=statistics, mismatch=mismatch, cost=cost, **values)


def write_run(
    directory: Path, *, name: str = "run", steps: int = 6, after: float = 0.6, text: str = "Wait, 2."
) -> Path:
    """A finished run: configuration, metrics, two validations, two diagnoses, a manifest."""
    config = PopsdConfig()
    config.name, config.output, config.training.steps = name, str(directory), steps
    config.data.train.path = text
    save_resolved(config, directory / "config.yaml")
    lines: list[dict[str, Any]] = [{"step": 0, **validation(0.6)}]
    lines += [{"step": step, **step_metrics(step).as_dict()} for step in range(1, steps + 1)]
    lines += [{"step": steps, **validation(after)}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for moment in ("before", "after"):
        diagnosis(text).write(directory / "diagnosis" / moment)
    final = directory / "checkpoints" / "final"
    final.mkdir(parents=True)
    manifest = {"step": steps, "layout": {"tensor": 1, "data": 2}, "versions": {"torch": "2.9", "nemo_popsd": text}}
    (final / "manifest.json").write_text(json.dumps(manifest))
    return directory


def validation(accuracy: float) -> dict[str, float]:
    """The metrics that a run logs for an evaluation."""
    return {
        "validation/accuracy": accuracy,
        "validation/accuracy_stderr": 0.02,
        "validation/markers_per_1000_tokens": 50.0,
        "validation/mean_tokens": 110.0,
        "validation/cut_share": 0.25,
        "validation/unanswered_share": 0.0,
        "validation/problems": 256.0,
        "validation/samples": 256.0,
    }


def write_samples(directory: Path, step: int, correct: dict[str, bool], *, text: str = "Wait, {}.") -> None:
    """An evaluation as stored by training, with two samples per problem, both correct or both wrong."""
    config = EvaluationConfig(markers=["Wait", "Maybe"], resamples=200)
    problems = [Problem(key, f"what is {key}?", "4") for key in correct]
    samples = [Sample(key, n, text.format(key), 7 + n, False) for key in correct for n in range(2)]
    settings = sample_settings({problem.id: "0" for problem in problems}, max_response_tokens=9)
    scores = [
        SampleScore(
            problem=s.problem,
            sample=s.sample,
            answer="4",
            correct=correct[s.problem],
            decided_by="text",
            vote=0,
            truncated=False,
            tokens=s.tokens,
            markers=count_markers(s.text, config.markers),
            segments=1,
            closed_thinking=True,
            repeated=0.0,
            looping=False,
        )
        for s in samples
    ]
    kept = EvaluationDirectory(directory / "validation" / f"step-{step:06d}")
    kept.replace(settings, problems, samples)
    kept.conclude(scores, {"model": f"step {step}", **Evaluation.of(scores, config).summary.as_dict()})


def diagnosis(text: str, *, tokens: int = 24) -> Diagnosis:
    """Two rollouts with `tokens` tokens, the first with alternatives; all their texts are `text`."""
    rollouts = [_rollout(row, text, tokens) for row in range(2)]
    figures = [
        TokenFigures(
            position,
            bool(rollout["marked"][position]),
            {name: math.nan if (v := rollout["values"][name][position]) is None else v for name in MEASURES},
        )
        for rollout in rollouts
        for position in range(tokens)
    ]
    entry = {"id": 3, "text": text, "mass": 5.0, "push": dict.fromkeys(COMPONENTS, 0.5)}
    low = {**entry, "push": dict.fromkeys(COMPONENTS, -0.5)}
    summary = {
        "format": 1,
        "name": f"rollouts of {text}",
        "step": 3,
        "settings": {"target": {"family": "purified"}},
        "rollouts": 2,
        "tokens": 2 * tokens,
        "measures": MEASURES,
        "groups": group_figures(figures, position_bins=4, entropy_edges=[0.5, 1.0]),
        "push": {
            "tokens": 2 * tokens,
            "components": {name: {"promoted": [entry] * 4, "suppressed": [low] * 4} for name in COMPONENTS},
            "markers": {"Wait": {"entries": 1, "mass": 5.0, "push": dict.fromkeys(COMPONENTS, -0.5)}, text: None},
        },
    }
    return Diagnosis(summary, rollouts)


def _rollout(row: int, text: str, tokens: int) -> dict[str, Any]:
    names = (*MEASURES, "log_student", "log_base", "log_privileged", "log_reference", "log_target")
    values = {
        name: [round(math.sin(row + place + token), 4) for token in range(tokens)] for place, name in enumerate(names)
    }
    values["cosine_question"][2] = None  # type: ignore[call-overload]
    alternatives = {name: [[0, 0.75, 1, 0.25]] * tokens for name in DISTRIBUTIONS}
    return {
        "row": f"{text} {row}",
        "question": text,
        "reference": text,
        "truncated": row == 1,
        "pieces": [text if token % 5 == 0 else f" {token}" for token in range(tokens)],
        "marked": [int(token % 5 == 0) for token in range(tokens)],
        "values": values,
        "alternatives": {"texts": [text, " other"], **alternatives} if row == 0 else None,
    }


def view_scores(text: str = "solution") -> ViewScores:
    """Scores of the view `text`, and of one without any defined score."""
    score: Score = {"value": 0.5, "low": 0.25, "high": 0.75}
    own = ("accuracy", "markers", "ends")
    names = [
        *(s.name for s in SIGNAL_STATISTICS),
        *("distance", "markers", "markers_share", "ends", "length_share", "accuracy", "accuracy_over_student", "gain"),
        *(f"{kind}_{name}" for kind in ("fork", "uncertain") for name in (*VIEW_DISTRIBUTIONS, *_DIFFERENCES)),
    ]
    return {
        "format": 1,
        "name": text,
        "settings": {
            "source": "train",
            "problems": 64,
            "samples": 8,
            "teacher_samples": 2,
            "uncertain_entropy": 0.5,
            "horizon": 1024,
            "seed": 1,
            "markers": ["Wait"],
            "confidence": 0.95,
        },
        "answers": 512,
        "right": 256,
        "compared": 40,
        "student": dict.fromkeys(own, score),
        "candidates": [
            {
                "name": text,
                "family": "purified",
                "scores": dict.fromkeys(names, score),
                "kind": "helps",
                "verdict": text,
            },
            {
                "name": "none",
                "family": "purified",
                "scores": dict.fromkeys(names),
                "kind": "undecided",
                "verdict": "none: undecided.",
            },
        ],
        "best": f"Best: {text}.",
    }
