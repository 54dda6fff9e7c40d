"""Conversion of published data sets to rows: the columns of each layout with question, reference and answer.

The layouts are those of the repositories on the Hugging Face Hub in November 2026. A layout has one or several forms,
distinguished by their columns. A form converts each published row to a row of this package, or to None if the row is
not mathematics.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_popsd.data.cells import scalar_of, text_of
from nemo_popsd.data.files import source_files
from nemo_popsd.data.readers import MalformedError, column_names, rows_of
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import write_lines

Published = Mapping[str, object]
Rows = Mapping[str, str]

_SETTING = "SOURCE"
_INSTRUCTIONS = (
    re.compile(r"^Return your final response within \\boxed\{\}\.\s*"),
    re.compile(r"\s*Please reason step by step, and put your final answer within \\boxed\{\}\.?\s*$"),
)
"""Sentences around a published question that the template `data.templates.student` already contains."""
_TAGS = {
    "<|begin_of_thought|>": "<think>",
    "<|end_of_thought|>": "</think>",
    "<|begin_of_solution|>": "",
    "<|end_of_solution|>": "",
}
"""Tags of OpenThoughts with their replacements."""
_MATHEMATICS = "math"
"""Value of the column `domain` for mathematics."""


@dataclass(frozen=True)
class Form:
    """One form of a layout."""

    columns: tuple[str, ...]
    """Columns that identify the form."""
    row: Callable[[Published], Rows | None]
    """Returns the row with `question` and, if published, `id`, `reference` and `answer`; None drops the row. Raises
    `MalformedError`."""
    optional: tuple[str, ...] = ()
    """Further columns that are read if the file has them."""


@dataclass(frozen=True)
class Layout:
    """The layout of a published data set."""

    repositories: tuple[str, ...]
    """Repositories of the Hub with this layout."""
    forms: tuple[Form, ...]
    """Forms of the layout; the first one whose columns are all present applies."""


@dataclass
class ConversionReport:
    """Counts of one conversion; ``str()`` is one line."""

    read: int = 0
    """Published rows."""
    written: int = 0
    """Rows of the output."""
    other: int = 0
    """Rows that are not mathematics."""
    malformed: int = 0
    """Rows without a required text."""
    first_malformed: str = ""
    """Why the first malformed row was dropped."""
    columns: list[str] = field(default_factory=list)
    """Columns of the output, in their order."""

    def __str__(self) -> str:
        parts = [f"{self.written:,} of {self.read:,} rows written", f"columns {', '.join(self.columns)}"]
        if self.other:
            parts.append(f"{self.other:,} dropped because they are not mathematics")
        if self.malformed:
            parts.append(f"{self.malformed:,} malformed and dropped (first: {self.first_malformed})")
        if (sampled := self.read - self.other - self.malformed - self.written) > 0:
            parts.append(f"{sampled:,} not in the sample")
        return "; ".join(parts)


def convert(layout: str, paths: list[str], output: Path, *, rows: int | None = None, seed: int = 0) -> ConversionReport:
    """Write published rows as JSONL with the columns `id`, `question`, `reference` and `answer` that exist.

    One published row is in memory at a time; sampling reads the files twice. The output is written atomically: it
    appears, or replaces an earlier file, when it is complete.

    Args:
        layout: one of `LAYOUTS`.
        paths: files, patterns or directories, as for `data.train.path`.
        output: file to write.
        rows: size of a random sample, in file order; None means all rows.
        seed: seed of the sample.

    Raises:
        UserError: a file is missing or has another layout, or no row is left.
    """
    files = source_files(paths, setting=_SETTING)
    chosen: set[int] | None = None
    if rows is not None:
        usable = sum(isinstance(row, dict) for row in _converted(layout, files))
        chosen = set(random.Random(seed).sample(range(usable), min(rows, usable)))
    report = ConversionReport()
    write_lines(output, _lines(layout, files, chosen, report))
    return report


def _lines(layout: str, files: list[Path], chosen: set[int] | None, report: ConversionReport) -> Iterator[str]:
    index = 0
    for row in _converted(layout, files):
        report.read += 1
        if row is None:
            report.other += 1
        elif isinstance(row, str):
            report.malformed += 1
            report.first_malformed = report.first_malformed or row
        else:
            if chosen is None or index in chosen:
                report.written += 1
                report.columns += [name for name in row if name not in report.columns]
                yield json.dumps(row, ensure_ascii=False) + "\n"
            index += 1
    if not report.written:
        raise UserError(
            f"conversion of {', '.join(map(str, files))}",
            got=str(report),
            need=f"mathematics rows in the layout {layout}",
            fix="pass other files or another layout",
        )


def _converted(layout: str, files: list[Path]) -> Iterator[Rows | str | None]:
    """Yield the converted row for each published row, None if it is dropped, or the reason why it is malformed."""
    for file in files:
        present = column_names(file, _SETTING)
        form = next((form for form in LAYOUTS[layout].forms if set(form.columns) <= set(present)), None)
        if form is None:
            needed = " or ".join(", ".join(form.columns) for form in LAYOUTS[layout].forms)
            raise UserError(
                str(file),
                got=f"columns {', '.join(present) or '(none)'}",
                need=f"columns {needed}, the layout {layout} ({', '.join(LAYOUTS[layout].repositories)})",
                fix="pass another layout, or map the columns with data.train.columns, without a conversion",
            )
        wanted = [*form.columns, *(name for name in form.optional if name in present)]
        for row in rows_of(file, wanted, _SETTING):
            try:
                if isinstance(row.content, MalformedError):
                    raise row.content
                yield form.row(row.content)
            except MalformedError as problem:
                yield f"{file}:{row.number}: {problem}"


def _question(text: str) -> str:
    for instruction in _INSTRUCTIONS:
        text = instruction.sub("", text)
    return text


def _dasd(row: Published) -> Rows | None:
    if row.get("domain") != _MATHEMATICS:
        return None
    question, reference = text_of(row, "input", field="question"), text_of(row, "output", field="reference")
    return {"id": scalar_of(row, "uuid"), "question": _question(question), "reference": reference}


def _open_thoughts_metadata(row: Published) -> Rows | None:
    if row.get("domain") != _MATHEMATICS:
        return None
    thought = text_of(row, "deepseek_reasoning", field="reference").strip()
    solution = text_of(row, "deepseek_solution", field="reference").strip()
    reference = f"<think>\n{thought}\n</think>\n\n{solution}"
    return {"question": _question(text_of(row, "problem", field="question")), "reference": reference}


def _open_thoughts_conversations(row: Published) -> Rows | None:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, Mapping) for turn in turns):
        raise MalformedError("column 'conversations' does not hold one question and one response")
    if row.get("domain", _MATHEMATICS) != _MATHEMATICS:
        return None
    question = text_of(turns[0], "value", field="question")
    if "domain" not in row and not _INSTRUCTIONS[0].match(question):  # only mathematics requests a boxed answer
        return None
    reference = text_of(turns[1], "value", field="reference")
    for tag, replacement in _TAGS.items():
        reference = reference.replace(tag, replacement)
    return {"question": _question(question), "reference": reference.strip()}


def _math_cot(row: Published) -> Rows:
    return {
        "question": text_of(row, "question", field="question"),
        "reference": text_of(row, "response", field="reference"),
        "answer": scalar_of(row, "answer"),
    }


def _gsm8k(row: Published) -> Rows:
    reference = text_of(row, "answer", field="reference")
    _, mark, answer = reference.rpartition("####")
    if not mark or not answer.strip():
        raise MalformedError("column 'answer' has no final answer after ####")
    return {
        "question": text_of(row, "question", field="question"),
        "reference": reference,
        "answer": answer.strip(),
    }


def _contest(identities: tuple[str, ...], problem: str, solution: str, answer: str) -> Form:
    """Return the form of a contest: problems with answers, and solutions if published."""

    def row(published: Published) -> Rows:
        present = [name for name in identities if published.get(name) is not None]
        converted = {"id": scalar_of(published, present[0])} if present else {}
        converted["question"] = text_of(published, problem, field="question")
        if published.get(solution):
            converted["reference"] = text_of(published, solution, field="reference")
        return {**converted, "answer": scalar_of(published, answer)}

    return Form((problem, answer), row, optional=(*identities, solution))


_CONTEST = (
    _contest(("problem_idx", "id"), "problem", "solution", "answer"),
    _contest(("ID",), "Problem", "Solution", "Answer"),
)

LAYOUTS: Mapping[str, Layout] = {
    "dasd": Layout(
        ("Alibaba-Apsara/Superior-Reasoning-SFT-gpt-oss-120b",),
        (Form(("uuid", "input", "output", "domain"), _dasd),),
    ),
    "openthoughts": Layout(
        ("open-thoughts/OpenThoughts-114k", "open-thoughts/OpenThoughts3-1.2M"),
        (
            Form(("problem", "deepseek_reasoning", "deepseek_solution", "domain"), _open_thoughts_metadata),
            Form(("conversations",), _open_thoughts_conversations, optional=("domain",)),
        ),
    ),
    "math-cot-20k": Layout(("jasonrqh/Math-CoT-20k",), (Form(("question", "response", "answer"), _math_cot),)),
    "gsm8k": Layout(("openai/gsm8k",), (Form(("question", "answer"), _gsm8k),)),
    "aime": Layout(
        ("HuggingFaceH4/aime_2024", "Maxwell-Jia/AIME_2024", "math-ai/aime25", "MathArena/aime_2025"), _CONTEST
    ),
    "hmmt": Layout(("MathArena/hmmt_feb_2025",), _CONTEST),
}
"""The layouts by name."""
