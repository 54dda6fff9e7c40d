"""The model card of an export: `README.md` with base, method, data, scores and versions in the format of the Hub.

A card contains no path of the machine: base and data are named by their Hub names if known, otherwise by the last part
of their paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.distillation.target_families import FAMILIES
from nemo_popsd.embedded.names import PREFIX, asset
from nemo_popsd.evaluation.comparison import Evaluation, changes_between
from nemo_popsd.evaluation.config import EvaluationConfig

CARD = "README.md"
"""Name of the card in an export."""
_CACHED = re.compile(r"/(?:models|datasets)--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_METHODS = {
    "purified": "Purified On-Policy Self-Distillation ([arXiv 2607.02234](https://arxiv.org/abs/2607.02234))",
    "opsd": "On-Policy Self-Distillation ([arXiv 2601.18734](https://arxiv.org/abs/2601.18734))",
}
"""Names of the methods by target family."""


@dataclass(frozen=True)
class Scores:
    """The evaluations of one problem set."""

    trained: Evaluation
    """Evaluation of the exported model."""
    base: Evaluation | None = None
    """Evaluation of its base."""


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Options of the user for the card of an export."""

    base: str | None = None
    """Hub name or path of the base; None uses `student.source`."""
    evaluation: str | None = None
    """Directory with evaluations of the exported model; None uses the validation of the run."""
    base_evaluation: str | None = None
    """Directory with evaluations of the base."""


def hub_name(path: str) -> str | None:
    """`owner/name` on the Hub of a path in the Hub's cache, or of a path that is such a name; None for any other."""
    if cached := _CACHED.search(f"{path}/"):
        return f"{cached['owner']}/{cached['name']}"
    return path if _HUB_ID.fullmatch(path) and not Path(path).exists() else None


def base_reference(source: str, given: str | None = None) -> str:
    """How an adapter refers to its base: a name on the Hub, or an absolute path, which loads from any directory.

    Args:
        source: `student.source`.
        given: name or path that the user specified instead.
    """
    if given is not None:
        return given if hub_name(given) else str(Path(given).expanduser().absolute())
    return hub_name(source) or str((asset(source) if source.startswith(PREFIX) else Path(source)).absolute())


def model_card(
    config: PopsdConfig,
    *,
    name: str,
    base: str,
    step: int,
    adapter: bool,
    scores: Mapping[str, Scores],
    versions: Mapping[str, str | None],
    data_digest: str | None = None,
) -> str:
    """The text of the card.

    Args:
        config: configuration of the run.
        name: name of the exported directory.
        base: result of `base_reference`.
        step: number of training steps.
        adapter: whether the export has LoRA adapters alone.
        scores: by problem set; empty if nothing was evaluated.
        versions: library versions of the training, by distribution.
        data_digest: SHA-256 of the training rows.
    """
    on_hub = hub_name(base)
    base_name = on_hub or Path(base).name
    link = f"[{on_hub}](https://huggingface.co/{on_hub})" if on_hub else f"`{base_name}`"
    target = config.distillation.target
    method = _METHODS.get(target.family, f"on-policy self-distillation with the target `{target.family}`")
    front = [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if on_hub:
        front += [f"base_model: {on_hub}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    front += ["tags:", *(f"- {tag}" for tag in ("nemo_popsd", "self-distillation", *(["lora"] if adapter else [])))]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {name}",
        f"{'LoRA adapters for' if adapter else 'A model trained from'} {link} by {method}, with nemo_popsd.",
        "## Scores\n\n" + _scores(scores, config.evaluation),
        "## Training\n\n" + _table(("setting", "value"), _settings(config, step)),
        "## Data\n\n" + _data(config.data.train, data_digest),
        "## Use\n\n" + _use(name, base if on_hub else base_name, adapter=adapter),
        "## Versions\n\n" + _table(("package", "version"), [(key, value or "") for key, value in versions.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _scores(scores: Mapping[str, Scores], settings: EvaluationConfig) -> str:
    if not scores:
        return "Not evaluated."
    rows = []
    for name, of in scores.items():
        trained = of.trained.summary
        cells = [
            f"{name} ({trained.problems:,} problems, avg@{trained.samples_per_problem})",
            "",
            _accuracy(of.trained),
        ]
        if of.base is not None:
            change = changes_between(of.base, of.trained, resamples=settings.resamples)["accuracy"]
            low, high = change.interval
            cells[1] = _accuracy(of.base)
            cells.append(f"{100 * change.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        rows.append((*cells, *[""] * (4 - len(cells))))
    confidence = next(iter(scores.values())).trained.summary.confidence
    return _table(("set", "base", "trained", "change"), rows) + (
        f"\n\nAccuracy in per cent; in brackets {100 * confidence:g} % bootstrap intervals over problems."
    )


def _accuracy(evaluation: Evaluation) -> str:
    summary = evaluation.summary
    ends = summary.intervals.get("accuracy")
    interval = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""
    return f"{100 * summary.accuracy:.1f}{interval}"


def _settings(config: PopsdConfig, step: int) -> list[tuple[str, str]]:
    student, rollout, target = config.student, config.rollout, config.distillation.target
    divergence, lora = config.distillation.divergence, student.lora
    weights = f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}" if student.adaptation == "lora" else "full"
    parameters = (f"{name} {getattr(target, name)}" for name in FAMILIES[target.family].settings)
    return [
        ("steps", f"{step:,} of {config.training.prompts_per_step:,} prompts"),
        ("trained weights", f"{weights}, {student.precision}"),
        ("target", ", ".join([target.family, *parameters])),
        ("divergence", divergence.kind + (f", weight {divergence.weight:g}" if divergence.kind == "jsd" else "")),
        ("learning rate", f"{config.optimizer.lr:g}"),
        ("rollouts", f"temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, top-k {rollout.top_k}"),
        ("response limit", f"{rollout.max_response_tokens:,} tokens"),
        ("seed", str(config.seed)),
    ]


def _data(source: SourceConfig, digest: str | None) -> str:
    lines = []
    for path in (source.path, *source.more_paths):
        on_hub = None if path.startswith(PREFIX) or not _CACHED.search(f"{path}/") else hub_name(path)
        name = f"[{on_hub}](https://huggingface.co/datasets/{on_hub})" if on_hub else f"`{Path(path).name}`"
        lines.append(f"- {name}" + (f", the first {source.limit:,} rows" if source.limit else ""))
    if digest:
        lines.append(f"- SHA-256 of ids, questions and references: `{digest}`")
    return "\n".join(lines)


def _use(name: str, base: str, *, adapter: bool) -> str:
    if not adapter:
        return (
            f"```bash\nvllm serve {name}\n```\n\n```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n```'
        )
    return (
        f"```bash\nvllm serve {base} --enable-lora --lora-modules {name}={name}\n```\n\n```python\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n```'
    )


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
