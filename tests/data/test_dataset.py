import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from nemo_popsd.data import rows
from nemo_popsd.data.config import ColumnsConfig, DataConfig, SourceConfig
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.data.dataset import build_dataset, build_evaluation_prompts
from nemo_popsd.data.report import DataReport
from nemo_popsd.data.sampler import StepSampler, collate
from nemo_popsd.errors import UserError
from tests.data import small

MIXED: list[object] = [
    {"question": "What is 1+1?", "reference": "2"},
    {"question": "What is 2+2?", "reference": "It is four, " * 10},
    {"question": "What? " * 50, "reference": "2"},
    {"question": "What is 3+3?"},
    {"question": "What is <end>?", "reference": "2"},
]


def config(path: Path, **changes: object) -> DataConfig:
    return DataConfig(train=SourceConfig(path=str(path)), max_prompt_tokens=200, max_reference_tokens=50, **changes)  # type: ignore[arg-type]


def test_every_row_is_kept_or_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small.write_jsonl(tmp_path / "a.jsonl", MIXED)
    given = config(path, malformed_rows="skip")
    with caplog.at_level(logging.INFO):
        dataset, report = build_dataset(given, given.train, small.tokenizer())
    assert [dataset[i].record.id for i in range(len(dataset))] == ["a.jsonl:1", "a.jsonl:2"]
    longest = max(len(dataset[i].contexts.student) for i in range(2))
    assert report == DataReport(
        source=str(path),
        rows_read=5,
        malformed=2,
        first_malformed="row 4: no column 'reference', only question",
        references_truncated=1,
        overlong_dropped=1,
        rows_kept=2,
        longest_prompt=longest,
    )
    assert str(report) in caplog.text


def test_long_references_are_counted_when_dropped(tmp_path: Path) -> None:
    given = config(small.write_jsonl(tmp_path / "a.jsonl", MIXED[:3]), long_references="drop")
    dataset, report = build_dataset(given, given.train, small.tokenizer())
    assert (len(dataset), report.long_references_dropped, report.references_truncated) == (1, 1, 0)


def test_malformed_row_stops_the_build_by_default(tmp_path: Path) -> None:
    given = config(small.write_jsonl(tmp_path / "a.jsonl", MIXED))
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        build_dataset(given, given.train, small.tokenizer())


def test_no_row_that_fits_is_an_error_with_the_counts(tmp_path: Path) -> None:
    given = config(small.write_jsonl(tmp_path / "a.jsonl", MIXED[2:3]))
    with pytest.raises(UserError, match=r"0 of 1 rows kept, .*1 dropped for a long prompt"):
        build_dataset(given, given.train, small.tokenizer())


def test_bad_chat_template_is_refused_before_training(tmp_path: Path) -> None:
    given = config(small.write_jsonl(tmp_path / "a.jsonl", MIXED[:1]))
    with pytest.raises(UserError, match=r"row a\.jsonl:1: got student prompt ends in"):
        build_dataset(given, given.train, small.tokenizer(small.FICKLE))


def test_access_is_deterministic_and_out_of_range_indices_raise(tmp_path: Path) -> None:
    given = config(small.write_jsonl(tmp_path / "a.jsonl", small.rows(3)))
    dataset, _ = build_dataset(given, given.train, small.tokenizer())
    assert dataset[1] == dataset[1]
    assert [row.record.id for row in dataset] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_a_borrowed_reference_is_deterministic_and_of_another_row(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}+{n}?", "reference": str(2 * (n // 2))} for n in range(8)]  # pairs share one
    given = config(small.write_jsonl(tmp_path / "a.jsonl", rows))
    own, _ = build_dataset(given, given.train, small.tokenizer())
    privileged, _ = build_dataset(given, given.train, small.tokenizer(), Borrowed.PRIVILEGED)
    second, _ = build_dataset(given, given.train, small.tokenizer(), Borrowed.SECOND)
    questions = [row.contexts.student for row in own]
    for plain, lent, wrong in zip(own, privileged, second, strict=True):
        assert lent.contexts.student == wrong.contexts.student == plain.contexts.student
        assert lent.contexts.reference == plain.contexts.reference
        assert wrong.contexts.privileged == plain.contexts.privileged
        # The same template with another reference: not the privileged context of any row.
        assert lent.contexts.privileged == wrong.contexts.reference
        assert lent.contexts.privileged not in [row.contexts.privileged for row in own]
        assert lent.contexts.reference_text == plain.contexts.reference_text
    assert [row.contexts.student for row in privileged] == questions
    assert [row.contexts for row in privileged] == [row.contexts for row in privileged]


def test_borrowing_among_rows_with_the_same_reference_is_refused(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "reference": "2"} for n in range(3)]
    given = config(small.write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=r"3 rows that all have the reference of row a\.jsonl:1"):
        build_dataset(given, given.train, small.tokenizer(), Borrowed.SECOND)


def test_data_loader_over_the_step_sampler(tmp_path: Path) -> None:
    given = config(small.write_jsonl(tmp_path / "a.jsonl", small.rows(5)))
    dataset, _ = build_dataset(given, given.train, small.tokenizer())
    sampler = StepSampler(len(dataset), prompts_per_step=4, seed=3, dp_rank=1, dp_size=2, start_step=2)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    batch = next(iter(loader))
    assert [row.record for row in batch] == [dataset[index].record for index in sampler.global_batch(2)[2:]]


def test_evaluation_prompts_need_answers_but_no_references(tmp_path: Path) -> None:
    path = small.write_jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "answer": 33}])
    given = DataConfig(
        validation=SourceConfig(path=str(path), columns=ColumnsConfig(reference=None, answer="answer")),
        enable_thinking=False,
    )
    tokenizer = small.tokenizer()
    prompts, report = build_evaluation_prompts(given, given.validation, tokenizer)
    assert report.rows_kept == 1
    assert prompts[0].record.answer == "33"
    text = tokenizer.decode(prompts[0].prompt)
    assert text.startswith("<s><user>Problem: Q?\n\n")
    assert text.endswith("<end><assistant><think></think>")


def test_evaluation_prompt_is_the_students_training_prompt(tmp_path: Path) -> None:
    path = small.write_jsonl(tmp_path / "a.jsonl", small.rows(2))
    given = DataConfig(train=SourceConfig(path=str(path), columns=ColumnsConfig(answer="answer")))
    dataset, _ = build_dataset(given, given.train, small.tokenizer())
    prompts, _ = build_evaluation_prompts(given, given.train, small.tokenizer())
    assert [row.contexts.student for row in dataset] == [prompt.prompt for prompt in prompts]


def test_messages_name_the_validation_settings() -> None:
    given = DataConfig(validation=SourceConfig(path="absent", answer_pattern="(.)"))
    with pytest.raises(UserError, match=r"set data\.validation\.path"):
        build_evaluation_prompts(given, given.validation, small.tokenizer())


def test_report_is_one_line() -> None:
    report = DataReport(source="a.jsonl", template_ignores_thinking=True)
    report.skip("row 1: bad")
    report.skip("row 2: worse")
    assert "\n" not in str(report)
    assert "2 malformed skipped (first: row 1: bad)" in str(report)
    assert "ignores enable_thinking" in str(report)
    assert report.as_dict()["malformed"] == 2


def test_rows_of_a_large_file_stay_on_the_disk_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank lines, a skipped row, a truncated reference and more rows than are fitted together."""
    path = tmp_path / "a.jsonl"
    lines = [*MIXED, *({"question": f"What is {n}+1é?", "reference": f"It is {n + 1}. " * 9} for n in range(150))]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n\n" for line in lines), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(small.rows(3)), tmp_path / "b.parquet")  # type: ignore[arg-type]
    given = config(path, malformed_rows="skip", overlong_rows="drop")
    given.train.more_paths = [str(tmp_path / "b.parquet")]
    kept, report = build_dataset(given, given.train, small.tokenizer())
    monkeypatch.setattr(rows, "IN_MEMORY_BYTES", 100)
    read, again = build_dataset(given, given.train, small.tokenizer())
    assert (kept._rows.in_memory, read._rows.in_memory) == (len(kept), 3)
    assert (len(read), again) == (155, report)
    assert report.references_truncated > 100
    assert [read[index] for index in (154, 0, 77, 1)] == [kept[index] for index in (154, 0, 77, 1)]
    assert list(read.records()) == list(kept.records())
    assert read.data_digest() == kept.data_digest()
    assert read.index("a.jsonl:11") == kept.index("a.jsonl:11") == 2
    assert read.by_id("b.parquet:2") == kept.by_id("b.parquet:2")
    path.unlink()
    assert read[1] == kept[1], "the file is open"


def test_a_large_file_that_changes_during_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY_BYTES", 0)
    path = small.write_jsonl(tmp_path / "a.jsonl", small.rows(3))
    given = config(path)
    dataset, _ = build_dataset(given, given.train, small.tokenizer())
    assert dataset[2].record.question == "What is 2+1?"
    with path.open("r+b") as file:
        file.write(path.read_bytes().replace(b"What", b"Then"))
    with pytest.raises(UserError, match=r"a\.jsonl: got different content at byte \d+ than at the start of the run"):
        dataset[2]
