"""`popsd data check`: the rows of a configuration as the branches see them, their lengths, and their problems.

Reads only rows and tokenizer, no weights. Rows are read as in training, so everything that training refuses is refused
here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings
from nemo_popsd.data.config import DataConfig, SourceConfig
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.data.dataset import EvaluationPrompt, PromptDataset, build_dataset, build_evaluation_prompts
from nemo_popsd.data.limits import refuse_beyond_positions
from nemo_popsd.data.models import missing_model, model_path
from nemo_popsd.data.overlap import Questions
from nemo_popsd.data.report import DataReport
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.algebra.sameness import compared_as
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import AnswerVerifier
from nemo_popsd.evaluation.problem_sets import sources_of
from nemo_popsd.files.reading import read_strict_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED = 1000
"""Maximum number of rows, evenly spaced, tokenised for the table of lengths. The limits apply to all rows."""
LONGEST_ANSWER = 200
"""Maximum length of a final answer in characters; a longer text is a solution."""
_HEAD, _TAIL = 900, 500
"""Characters shown from the beginning and from the end of a long text."""
_NAMED = 3
"""Maximum number of rows named in a finding."""


@dataclass
class DataCheck:
    """The result of a check."""

    lines: list[str] = field(default_factory=list)
    """Text of the check, line by line."""
    wrong: list[str] = field(default_factory=list)
    """Problems that must be fixed, each with its fix."""
    notes: list[str] = field(default_factory=list)
    """Information that requires no change."""

    def __str__(self) -> str:
        notes = [f"note: {text}" for text in self.notes]
        wrong = [f"wrong: {text}" for text in self.wrong] or ["nothing is wrong"]
        return "\n".join([*self.lines, *notes, *wrong])


@dataclass(frozen=True)
class _Model:
    """The parts of `student.source` that the check needs."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int | None
    positions: int | None


def check_data(config: PopsdConfig, *, shown: int = 3, full: bool = False) -> DataCheck:
    """Check `data.train`, `data.validation` and `evaluation.sets`, if they are set.

    Args:
        config: configuration of the run; from `student.source` only tokenizer and ``config.json`` are read.
        shown: number of rows of each set to show as text.
        full: show complete texts; otherwise only beginning and end of long texts.

    Raises:
        UserError: no data is configured, or the tokenizer cannot be loaded. Defects of rows are part of the result.
    """
    data, check = config.data, DataCheck()
    sets = sources_of(config.evaluation, data) if config.evaluation.sets or data.validation.path else {}
    if not data.train.path and not sets:
        raise UserError(
            "data", got="no data.train.path, data.validation.path or evaluation.sets", need="rows", fix="set one"
        )
    model = _read_model(config.student.source)
    trained: Questions | None = None
    if data.train.path:
        try:
            trained = _check_training(config, model, check, shown, full)
        except UserError as error:
            check.wrong.append(f"data.train: {error}")
    for name, source in sets.items():
        setting = f"evaluation.sets.{name}" if config.evaluation.sets else "data.validation"
        try:
            questions = _check_evaluation(config, setting, source, model, check, shown, full)
        except UserError as error:
            check.wrong.append(f"{setting}: {error}")
            continue
        if trained is not None and (leaks := trained.shared_with(questions)):
            pairs = (f"row {row} of {setting} is row {other} of data.train" for other, row in leaks[:_NAMED])
            check.wrong.append(
                f"{len(leaks):,} questions of {setting} are also in data.train ({_listed(pairs, len(leaks))}); "
                "remove these rows from one of the two"
            )
    return check


def _check_training(config: PopsdConfig, model: _Model, check: DataCheck, shown: int, full: bool) -> Questions:
    borrowed = Borrowed(config.distillation.target.borrowed)
    dataset, report = build_dataset(
        data_settings(config),
        config.data.train,
        model.tokenizer,
        borrowed,
        vocab_size=model.vocab_size,
        need_answer=config.distillation.tokens.by_answer,
    )
    check.lines += ["data.train", f"  {report}", *_training_lengths(config.data, dataset, model.tokenizer)]
    for index in range(min(shown, len(dataset))):
        contexts = dataset[index].contexts
        check.lines.append(f"  row {dataset[index].record.id}")
        for title, ids in (
            ("student and base", contexts.student),
            ("privileged teacher", contexts.privileged),
            ("reference-only teacher", contexts.reference),
        ):
            check.lines += _shown(title, ids, model.tokenizer, full)
    _judge_report("data.train", report, config.data, check)
    questions = Questions.of(dataset.records())
    if repeated := questions.repetitions:
        rows = (f"row {one.row} that of {one.earlier}" for one in repeated[:_NAMED])
        same = sum(one.same_answer for one in repeated)
        check.notes.append(
            f"{len(repeated):,} rows of data.train repeat a question, {same:,} of them with the same reference "
            f"({_listed(rows, len(repeated))})"
        )
    longest = dataset.builder.longest_context + config.rollout.max_response_tokens
    _judge_positions(
        model, longest, "data.max_prompt_tokens, data.max_reference_tokens or rollout.max_response_tokens", check
    )
    return questions


def _check_evaluation(
    config: PopsdConfig,
    setting: str,
    source: SourceConfig,
    model: _Model,
    check: DataCheck,
    shown: int,
    full: bool,
) -> Questions:
    data = replace(config.data, validation=source)
    prompts, report = build_evaluation_prompts(data, source, model.tokenizer, vocab_size=model.vocab_size)
    check.lines += ["", setting, f"  {report}"]
    lengths = {"student's prompt": ([len(p.prompt) for p in prompts], f"{data.max_prompt_tokens:,}")}
    check.lines += _table(lengths)
    for prompt in prompts[:shown]:
        check.lines.append(f"  row {prompt.record.id}")
        check.lines += _shown("student", prompt.prompt, model.tokenizer, full)
        answer = prompt.record.answer or ""
        rule = "" if config.evaluation.checker else f", compared as {compared_as(answer)}"
        check.lines.append(f"    answer{rule}: {_shortened(answer, full)}")
    _judge_report(setting, report, data, check)
    _judge_answers(setting, prompts, config.evaluation, check)
    questions = Questions.of(prompt.record for prompt in prompts)
    if repeated := questions.repetitions:
        rows = (f"row {one.row} that of {one.earlier}" for one in repeated[:_NAMED])
        check.wrong.append(
            f"{len(repeated):,} rows of {setting} repeat a question ({_listed(rows, len(repeated))}), which then "
            "counts more than once; remove them"
        )
    longest = max(len(prompt.prompt) for prompt in prompts) + config.evaluation.max_response_tokens
    _judge_positions(model, longest, "evaluation.max_response_tokens", check)
    return questions


def _judge_report(setting: str, report: DataReport, data: DataConfig, check: DataCheck) -> None:
    dropped = report.rows_read - report.rows_kept
    if dropped:
        text = f"{dropped:,} of {report.rows_read:,} rows of {setting} are dropped (counts above)"
        if 2 * dropped > report.rows_read:
            check.wrong.append(f"{text}; fix the rows, or set data.max_prompt_tokens or {setting}.columns")
        else:
            check.notes.append(text)
    if cut := report.references_truncated:
        text = f"{cut:,} of {report.rows_kept:,} references are truncated to {data.max_reference_tokens:,} tokens"
        if 2 * cut > report.rows_kept:
            check.wrong.append(f"{text}; set data.max_reference_tokens higher: the answer is at the end of a solution")
        else:
            check.notes.append(f"{text} (data.max_reference_tokens)")
    if report.template_ignores_thinking and not any("enable_thinking" in note for note in check.notes):
        check.notes.append("the chat template ignores data.enable_thinking")


def _judge_answers(
    setting: str, prompts: Sequence[EvaluationPrompt], evaluation: EvaluationConfig, check: DataCheck
) -> None:
    if evaluation.checker:
        _judge_by_checker(setting, prompts, evaluation, check)
        return
    kinds: dict[str, list[EvaluationPrompt]] = {"value": [], "math-verify": [], "text": []}
    for prompt in prompts:
        kinds[compared_as(prompt.record.answer or "")].append(prompt)
    check.lines.append("  answers compared as " + ", ".join(f"{name}: {len(of):,}" for name, of in kinds.items()))
    long = [p for p in prompts if len(p.record.answer or "") > LONGEST_ANSWER or "\n" in (p.record.answer or "")]
    if long:
        rows = (f"row {p.record.id}: {_shortened((p.record.answer or '').splitlines()[0], False)}" for p in long)
        named = _listed((row for row, _ in zip(rows, range(_NAMED), strict=False)), len(long))
        check.wrong.append(
            f"{len(long):,} answers of {setting} have several lines or more than {LONGEST_ANSWER} characters "
            f"({named}), so no response can match them; set columns.answer to the final answer, or answer_pattern with "
            "columns.answer=null"
        )
    elif kinds["text"]:
        answers = (repr(prompt.record.answer) for prompt in kinds["text"][:_NAMED])
        check.notes.append(
            f"{len(kinds['text']):,} answers of {setting} are compared as text, since the grammar does not parse them "
            f"({_listed(answers, len(kinds['text']))})"
        )


def _judge_by_checker(
    setting: str, prompts: Sequence[EvaluationPrompt], evaluation: EvaluationConfig, check: DataCheck
) -> None:
    check.lines.append(f"  answers compared by evaluation.checker={evaluation.checker}")
    with AnswerVerifier(evaluation.verify_seconds, evaluation.checker) as verifier:
        answers = [prompt.record.answer or "" for prompt in prompts]
        refused = [answer for answer in answers if not verifier.compare(answer, answer).correct]
    if refused:
        check.wrong.append(
            f"evaluation.checker={evaluation.checker} rejects {len(refused):,} answers of {setting} compared with "
            f"themselves ({_listed(map(repr, refused[:_NAMED]), len(refused))}); fix the checker or the answers"
        )


def _judge_positions(model: _Model, longest: int, settings: str, check: DataCheck) -> None:
    try:
        refuse_beyond_positions(model.positions, longest, settings)
    except UserError as error:
        check.wrong.append(str(error))


def _training_lengths(data: DataConfig, dataset: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    step = max(1, -(-len(dataset) // MEASURED))
    rows = [dataset[index] for index in range(0, len(dataset), step)]
    references = [row.record.reference or "" for row in rows]
    encoded = tokenizer(references, add_special_tokens=False, return_attention_mask=False, verbose=False)
    lengths = {
        "student's prompt": ([len(row.contexts.student) for row in rows], f"{data.max_prompt_tokens:,}"),
        "reference, before truncation": ([len(ids) for ids in encoded["input_ids"]], f"{data.max_reference_tokens:,}"),
        "privileged teacher's prompt": ([len(row.contexts.privileged) for row in rows], ""),
        "reference-only teacher's prompt": ([len(row.contexts.reference) for row in rows], ""),
    }
    return _table(lengths, measured="" if step == 1 else f"of {len(rows):,} rows, evenly spaced")


def _table(lengths: dict[str, tuple[list[int], str]], measured: str = "") -> list[str]:
    lines = [f"  {'tokens ' + measured:<34}{'median':>10}{'95 %':>10}{'longest':>10}{'limit':>10}"]
    for name, (values, limit) in lengths.items():
        ordered = sorted(values)
        numbers = (int(statistics.median(ordered)), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1])
        lines.append(f"  {name:<34}" + "".join(f"{number:>10,}" for number in numbers) + f"{limit:>10}")
    return [line.rstrip() for line in lines]


def _shown(title: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, full: bool) -> list[str]:
    text = _shortened(str(tokenizer.decode(ids)), full)
    return [f"    {title}, {len(ids):,} tokens", *(f"      | {line}".rstrip() for line in text.split("\n"))]


def _shortened(text: str, full: bool) -> str:
    left_out = len(text) - _HEAD - _TAIL
    return text if full or left_out <= 0 else f"{text[:_HEAD]} [... {left_out:,} characters ...] {text[-_TAIL:]}"


def _listed(texts: Iterable[str], total: int) -> str:
    shown = list(texts)
    return ", ".join(shown) + (f" and {total - len(shown):,} more" if total > len(shown) else "")


def _read_model(source: str) -> _Model:
    """Read tokenizer and sizes from a Hugging Face directory, or from the one inside a NeMo checkpoint."""
    directory: Path = model_path(source)
    if not source or not directory.exists():
        raise missing_model(source, setting="student.source")
    inside = directory / "huggingface"
    directory = inside if not (directory / "config.json").exists() and inside.is_dir() else directory
    tokenizer = load_tokenizer(directory)
    sizes: dict[str, object] = {}
    if (directory / "config.json").is_file():
        sizes = read_strict_json(directory / "config.json", f"model {directory}", fix="repair the file")
    vocab_size, positions = sizes.get("vocab_size"), sizes.get("max_position_embeddings")
    return _Model(
        tokenizer,
        vocab_size if isinstance(vocab_size, int) else None,
        positions if isinstance(positions, int) else None,
    )
