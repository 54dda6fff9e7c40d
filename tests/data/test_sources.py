import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_popsd.data.config import ColumnsConfig, SourceConfig
from nemo_popsd.data.records import Record
from nemo_popsd.data.sources import check_source, read_records
from nemo_popsd.errors import UserError
from tests.data.small import rows, write_jsonl

GOOD = {"question": "Q?", "reference": "R."}
ANSWERS = ColumnsConfig(answer="answer")


def source(path: Path, **changes: object) -> SourceConfig:
    return SourceConfig(path=str(path), **changes)  # type: ignore[arg-type]


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def test_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    records, report = read_records(source(path, columns=ANSWERS))
    assert records[1] == Record("a.jsonl:2", "What is 1+1?", "It is 2.", "2")
    assert (report.rows_read, report.malformed, len(records)) == (3, 0, 3)


def test_parquet_is_recognised_by_content(tmp_path: Path) -> None:
    path = tmp_path / "no_suffix"
    pq.write_table(pa.Table.from_pylist(rows(2500)), path)
    records, _ = read_records(source(path, columns=ANSWERS))
    assert len(records) == 2500
    assert records[-1] == Record("no_suffix:2500", "What is 2499+1?", "It is 2500.", "2500")


def test_saved_dataset_with_and_without_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_list(rows(3))
    plain.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": plain, "extra": plain.select([0])}).save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict({"dev": plain, "test": plain}).save_to_disk(str(tmp_path / "no_train"))
    for name in ("plain", "split"):
        records, _ = read_records(source(tmp_path / name, columns=ANSWERS))
        assert [record.answer for record in records] == ["1", "2", "3"]
    with pytest.raises(UserError, match="got splits dev, test; need a split named train"):
        read_records(source(tmp_path / "no_train"))
    with pytest.raises(UserError, match=r"columns answer, question, reference|columns question, reference, answer"):
        read_records(source(tmp_path / "plain", columns=ColumnsConfig(question="prompt")))


def test_embedded_names_resolve_through_the_testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "tiny.jsonl", rows(1))
    asked: list[str] = []

    def asset(name: str) -> Path:
        asked.append(name)
        return path

    monkeypatch.setattr("nemo_popsd.embedded.names.asset", asset)
    records, report = read_records(SourceConfig(path="nemo_popsd:tiny_train"))
    assert asked == ["nemo_popsd:tiny_train"]
    assert len(records) == 1
    assert report.source == "nemo_popsd:tiny_train"


def test_limit_counts_rows_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(5))
    records, report = read_records(source(path, limit=2))
    assert (len(records), report.rows_read) == (2, 2)


def test_column_mapping_and_ids(tmp_path: Path) -> None:
    row = {"uid": 7, "problem": "P", "solution": "S", "final": 2.5}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    columns = ColumnsConfig(id="uid", question="problem", reference="solution", answer="final")
    assert read_records(source(path, columns=columns))[0] == [Record("7", "P", "S", "2.5")]


def test_answer_pattern_takes_the_last_match(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q", "reference": "#### 1\nno\n####  1,072 \n"}, GOOD])
    patterned = source(path, answer_pattern=r"####\s*(.+)")
    records, _ = read_records(patterned, need_answer=True, malformed_rows="skip")
    assert [record.answer for record in records] == ["1,072"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (ColumnsConfig(answer="answer"), "data.train.columns.answer='answer', which overrides it"),
        (ColumnsConfig(reference=None), "data.train.columns.reference, which it searches"),
    ],
)
@pytest.mark.parametrize("need_answer", [True, False])
def test_a_pattern_without_effect_is_refused(
    tmp_path: Path, columns: ColumnsConfig, need_answer: bool, message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "answer": "1"}])
    patterned = source(path, columns=columns, answer_pattern="(.)")
    with pytest.raises(UserError, match=re.escape(message)):
        check_source(patterned, setting="data.train", need_reference=False, need_answer=need_answer)


def test_several_files_are_one_source(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "y/a.jsonl"):
        (tmp_path / name).parent.mkdir()
        write_jsonl(tmp_path / name, rows(2))
    patterned = source(tmp_path / "x" / "a.jsonl", more_paths=[str(tmp_path / "y" / "*.jsonl")], columns=ANSWERS)
    records, report = read_records(patterned)
    assert [record.id for record in records] == ["x/a.jsonl:1", "x/a.jsonl:2", "y/a.jsonl:1", "y/a.jsonl:2"]
    assert report.rows_read == 4
    assert len(read_records(source(tmp_path / "x", more_paths=[str(tmp_path / "y")], limit=3))[0]) == 3
    write_jsonl(tmp_path / "y" / "a.jsonl", [GOOD, {"question": "Q"}])
    with pytest.raises(UserError, match=r"y/a\.jsonl:2: got no column 'reference'"):
        read_records(source(tmp_path / "x", more_paths=[str(tmp_path / "y")]))


def test_the_layout_of_verl(tmp_path: Path) -> None:
    path = tmp_path / "verl.parquet"
    row = {
        "prompt": [{"role": "user", "content": "Q?"}],
        "reward_model": {"style": "rule", "ground_truth": "18"},
        "extra_info": {"question": "Q!", "answer": "long\n#### 18"},
    }
    pq.write_table(pa.Table.from_pylist([row]), path)
    columns = ColumnsConfig(
        question="prompt", reference="extra_info.answer", answer="reward_model.ground_truth", id="extra_info.question"
    )
    records, _ = read_records(source(path, columns=columns), need_answer=True)
    assert records == [Record("Q!", "Q?", "long\n#### 18", "18")]
    nested = ColumnsConfig(question="prompt.0.content", reference="extra_info.solution")
    with pytest.raises(
        UserError, match=r"no field 'solution' in column 'extra_info', only (question, answer|answer, question)"
    ):
        read_records(source(path, columns=nested))
    with pytest.raises(UserError, match=r"including reward\.ground_truth"):
        read_records(source(path, columns=ColumnsConfig(question="prompt", reference="reward.ground_truth")))


def test_text_is_verbatim_and_unicode_line_separators_do_not_split_rows(tmp_path: Path) -> None:
    question = " a\u2028b\r\n "
    line = json.dumps({"question": question, "reference": "r"}, ensure_ascii=False)
    path = write_lines(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line.encode(), "", "  ", line.replace('r"', 'r2"'))
    records, report = read_records(source(path))
    assert [record.question for record in records] == [question] * 2
    assert [record.id for record in records] == ["a.jsonl:1", "a.jsonl:4"]
    assert report.rows_read == 2


MALFORMED = {
    "not_json": ('{"question": "Q", ', "not valid JSON"),
    "not_object": ("[1, 2]", "a JSON list instead of an object"),
    "not_utf8": (b'{"question": "\xff", "reference": "R"}', "not UTF-8"),
    "too_deep": ("[" * 200_000, "not valid JSON"),
    "no_reference": ('{"question": "Q", "solution": "S"}', "no column 'reference', only question, solution"),
    "null_reference": ('{"question": "Q", "reference": null}', "column 'reference' is null"),
    "empty_reference": ('{"question": "Q", "reference": ""}', "column 'reference' is empty"),
    "blank_reference": ('{"question": "Q", "reference": " \\n\\t"}', "column 'reference' is empty"),
    "empty_question": ('{"question": "", "reference": "R"}', "column 'question' is empty"),
    "number": ('{"question": 5, "reference": "R"}', "column 'question' holds int, not text"),
    "surrogate": ('{"question": "\\ud800", "reference": "R"}', "an unpaired surrogate"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named_or_skipped_and_counted(tmp_path: Path, name: str) -> None:
    line, reason = MALFORMED[name]
    path = write_lines(tmp_path / "a.jsonl", json.dumps(GOOD), line, json.dumps(GOOD))
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        read_records(source(path))
    assert str(caught.value).startswith(f"{path}:2: got ")
    records, report = read_records(source(path), malformed_rows="skip")
    assert [record.id for record in records] == ["a.jsonl:1", "a.jsonl:3"]
    assert (report.rows_read, report.malformed) == (3, 1)
    assert report.first_malformed is not None
    assert report.first_malformed.startswith("row 2: ")


def test_blank_reference_in_parquet_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, {"question": "Q", "reference": None}]), path)
    with pytest.raises(UserError, match=r"a\.parquet:2: got column 'reference' is null"):
        read_records(source(path))


def test_duplicate_ids_are_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "x", **GOOD}, {"id": "y", **GOOD}, {"id": "x", **GOOD}])
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=r"a\.jsonl:3: got id 'x' again, first in row 1"):
            read_records(source(path, columns=ColumnsConfig(id="id")), malformed_rows=policy)


def test_missing_column_lists_the_columns_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"problem": "P", "reference": "R"}]), path)
    with pytest.raises(UserError) as caught:
        read_records(source(path), setting="data.validation", malformed_rows="skip")
    assert caught.value.got == "columns problem, reference"
    assert "question" in caught.value.need
    assert caught.value.fix == "set data.validation.columns"


def test_no_usable_row_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "P"}] * 2)
    with pytest.raises(UserError, match=r"2 rows, none usable .*no column 'question', only problem"):
        read_records(source(path), malformed_rows="skip")


@pytest.mark.parametrize("path", ["", "no/such/file.jsonl"])
def test_missing_path(path: str) -> None:
    with pytest.raises(UserError, match=r"data\.validation\.path='.*need a .*set data\.validation\.path"):
        read_records(SourceConfig(path=path), setting="data.validation")


def test_rows_without_references_are_for_evaluation_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q", "answer": 33}])
    patterned = source(path, columns=ColumnsConfig(reference=None, answer="answer"))
    records, _ = read_records(patterned, need_reference=False, need_answer=True)
    assert records == [Record("a.jsonl:1", "Q", None, "33")]
    with pytest.raises(UserError, match=r"data\.train\.columns\.reference=null"):
        read_records(patterned)


def test_evaluation_needs_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(UserError, match=r"neither data\.train\.columns\.answer"):
        read_records(source(path), need_answer=True)
    with pytest.raises(UserError, match=r"a\.jsonl:1: got no final answer"):
        read_records(source(path, answer_pattern="#(.)"), need_answer=True)


@pytest.mark.parametrize("fields", [("x", " ", "r"), ("x", "q", "")])
def test_a_record_is_never_blank(fields: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="blank"):
        Record(*fields)


def test_unknown_embedded_name() -> None:
    with pytest.raises(UserError, match="nemo_popsd:nothing"):
        read_records(SourceConfig(path="nemo_popsd:nothing"))


@pytest.mark.parametrize("name", ["tiny_train", "tiny_validation"])
def test_embedded_data_can_be_read(name: str) -> None:
    patterned = SourceConfig(path=f"nemo_popsd:{name}", columns=ColumnsConfig(id="id", answer="answer"), limit=5)
    records, _ = read_records(patterned, need_answer=True)
    assert len(records) == 5
