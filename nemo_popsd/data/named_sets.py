"""Published problem sets by name, from the user's files or the caches of `datasets` and the Hub; no network access."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_popsd.data.config import ColumnsConfig, SourceConfig
from nemo_popsd.data.files import source_files
from nemo_popsd.data.readers import column_names
from nemo_popsd.errors import UserError


@dataclass(frozen=True)
class NamedSet:
    """A published problem set."""

    problems: int
    """Number of problems; a set with a different number is refused."""
    repositories: tuple[tuple[str, str], ...]
    """Hugging Face Hub data sets that contain it, each with the split, in search order."""
    answer_pattern: str | None = None
    """Regular expression for the answer in the column `answer`; None means that the column is the answer."""


NAMED_SETS: Mapping[str, NamedSet] = {
    "aime24": NamedSet(
        30,
        (("HuggingFaceH4/aime_2024", "train"), ("math-ai/aime24", "test"), ("Maxwell-Jia/AIME_2024", "train")),
    ),
    "aime25": NamedSet(
        30, (("math-ai/aime25", "test"), ("yentinglin/aime_2025", "train"), ("MathArena/aime_2025", "train"))
    ),
    "hmmt25": NamedSet(30, (("MathArena/hmmt_feb_2025", "train"),)),
    "math500": NamedSet(500, (("HuggingFaceH4/MATH-500", "test"),)),
    "gsm8k": NamedSet(1319, (("openai/gsm8k", "test"),), r"####\s*(.+)"),
}
"""The sets by name. HMMT is the February 2025 contest; GSM8K is its test split."""

_QUESTIONS = ("problem", "question", "Problem", "Question")
_ANSWERS = ("answer", "Answer", "expected_answer")
_SUFFIXES = (".jsonl", ".parquet", ".arrow", "")


def named_source(name: str, directory: str = "") -> SourceConfig:
    """Return the published set `name` as a source of rows with answers.

    The search order is: `<directory>/<name>.jsonl`, `.parquet`, `.arrow`, or a directory that `datasets` saved; the
    Arrow files that `datasets` prepares (below `HF_DATASETS_CACHE`); files that the Hub client downloaded (below
    `HF_HUB_CACHE`). Columns are found by their usual names.

    Raises:
        UserError: the set is not found (the message names all locations), or the file has no column of a known name.
    """
    known = NAMED_SETS[name]
    searched: list[str] = []
    for path in (*_in_directory(name, directory), *_cached(known)):
        searched.append(str(path))
        if path.exists():
            columns = _columns(path, column_names(path, "evaluation.sets_directory"), known.answer_pattern)
            return SourceConfig(path=str(path), columns=columns, answer_pattern=known.answer_pattern)
    raise UserError(
        f"problem set {name}",
        got=f"none of {', '.join(searched)}",
        need=f"a file with its {known.problems} problems and answers; nothing is downloaded",
        fix=f"set evaluation.sets_directory to a directory with {name}.jsonl (columns problem, answer), "
        f"or fetch {known.repositories[0][0]} with `datasets` on a machine with network and copy its cache",
    )


def own_source(name: str, path: str, like: SourceConfig) -> SourceConfig:
    """Return the user's set `name` at `path` as a source of rows with answers.

    The columns are those of `like` if the file has them all; otherwise they are found by their usual names.

    Args:
        name: key in `evaluation.sets`.
        path: a file, pattern or directory, as for `data.validation.path`.
        like: the section `data.validation`.

    Raises:
        UserError: there is no file, or no column of a known name.
    """
    setting = f"evaluation.sets.{name}"
    first = source_files([path], setting=setting)[0]
    present = column_names(first, setting)
    columns = like.columns
    wanted = [column for column in (columns.id, columns.question, columns.reference, columns.answer) if column]
    declared = columns.answer is not None or like.answer_pattern is not None
    if declared and all(column in present or column.partition(".")[0] in present for column in wanted):
        return SourceConfig(path=path, columns=columns, answer_pattern=like.answer_pattern)
    return SourceConfig(path=path, columns=_columns(first, present, answer_pattern=None))


def refuse_another_size(name: str, problems: int) -> None:
    """Refuse a number of rows that differs from that of the named set.

    Raises:
        UserError: the numbers differ; the message states both.
    """
    if problems != NAMED_SETS[name].problems:
        raise UserError(
            f"problem set {name}",
            got=f"{problems} usable problems",
            need=f"{NAMED_SETS[name].problems}, so that results under this name are comparable",
            fix="fix the file or data.max_prompt_tokens, or give your file another name: evaluation.sets={NAME: PATH}",
        )


def _in_directory(name: str, directory: str) -> list[Path]:
    return [Path(directory) / f"{name}{suffix}" for suffix in _SUFFIXES] if directory else []


def _cached(known: NamedSet) -> Iterator[Path]:
    """Yield the files in the caches; for a cache without a match, the search pattern."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    downloaded = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    for repository, split in known.repositories:
        owner, name = repository.split("/")
        snapshots = f"datasets--{owner}--{name}/snapshots/*/**"
        patterns = [
            (prepared, f"{owner}___{name.lower()}/*/*/*/*-{split}.arrow"),
            (downloaded, f"{snapshots}/{split}*.jsonl"),
            (downloaded, f"{snapshots}/{split}*.parquet"),
        ]
        for root, pattern in patterns:
            files = sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime) if root.is_dir() else []
            yield files[-1] if files else root / pattern


def _columns(path: Path, names: Sequence[str], answer_pattern: str | None) -> ColumnsConfig:
    question = next((column for column in _QUESTIONS if column in names), None)
    answer = next((column for column in _ANSWERS if column in names), None)
    if question is None or answer is None:
        raise UserError(
            str(path),
            got=f"columns {', '.join(names) or '(none)'}",
            need=f"one of {', '.join(_QUESTIONS)} and one of {', '.join(_ANSWERS)}",
            fix="set data.validation.columns (and answer_pattern) to columns of the file, or rename its columns",
        )
    if answer_pattern is not None:
        return ColumnsConfig(question=question, reference=answer, answer=None)
    return ColumnsConfig(question=question, reference=None, answer=answer)
