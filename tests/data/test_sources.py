import json
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_popsd.data.config import ColumnsConfig, SourceConfig
from nemo_popsd.data.records import Record
from nemo_popsd.data.sources import read_records
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

    monkeypatch.setitem(__import__("sys").modules, "nemo_popsd.testbed", SimpleNamespace(asset=asset))
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
    records, _ = read_records(source(path, answer_pattern=r"####\s*(.+)"))
    assert [record.answer for record in records] == ["1,072", None]


def test_text_is_verbatim_and_unicode_line_separators_do_not_split_rows(tmp_path: Path) -> None:
    question = " a\u2028b\r\n "
    line = json.dumps({"question": question, "reference": "r"}, ensure_ascii=False)
    path = write_lines(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line.encode(), "", "  ", line.replace('r"', 'r2"'))
    records, report = read_records(source(path))
    assert [record.question for record in records] == [question] * 2
    assert [record.id for record in records] == ["a.jsonl:1", "a.jsonl:4"]
    assert report.rows_read == 2


MALFORMED = {
    "not_json": ('{"question": "Q", ', "not JSON"),
    "not_object": ("[1, 2]", "a JSON list instead of an object"),
    "not_utf8": (b'{"question": "\xff", "reference": "R"}', "not UTF-8"),
    "too_deep": ("[" * 200_000, "not JSON"),
    "no_reference": ('{"question": "Q", "solution": "S"}', "no column 'reference', only question, solution"),
    "null_reference": ('{"question": "Q", "reference": null}', "column 'reference' is null"),
    "empty_reference": ('{"question": "Q", "reference": ""}', "column 'reference' is empty"),
    "blank_reference": ('{"question": "Q", "reference": " \\n\\t"}', "column 'reference' is empty"),
    "empty_question": ('{"question": "", "reference": "R"}', "column 'question' is empty"),
    "number": ('{"question": 5, "reference": "R"}', "column 'question' holds int, not text"),
    "surrogate": ('{"question": "\\ud800", "reference": "R"}', "half a surrogate pair"),
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
    assert caught.value.mend == "set data.validation.columns"


def test_no_usable_row_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "P"}] * 2)
    with pytest.raises(UserError, match=r"2 rows, none usable .*no column 'question', only problem"):
        read_records(source(path), malformed_rows="skip")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.parquet", b"PAR1 and then nothing of the kind", "need JSONL"),
        ("a.parquet", b"{}", "name ends in .parquet"),
        ("a.json", b'[{"question": "Q"}]', "one JSON array"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "gzip"),
        ("a.jsonl", b"", "0 rows"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        read_records(source(path))
    assert str(path) in str(caught.value)


def test_unreadable_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without the files that `datasets` saves"):
        read_records(source(tmp_path))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="need JSONL"):
        read_records(source(tmp_path))


@pytest.mark.parametrize("path", ["", "no/such/file.jsonl"])
def test_missing_path(path: str) -> None:
    with pytest.raises(UserError, match=r"data\.validation\.path='.*need a .*set data\.validation\.path"):
        read_records(SourceConfig(path=path), setting="data.validation")


def test_rows_without_references_serve_evaluation_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q", "answer": 33}])
    given = source(path, columns=ColumnsConfig(reference=None, answer="answer"))
    records, _ = read_records(given, need_reference=False, need_answer=True)
    assert records == [Record("a.jsonl:1", "Q", None, "33")]
    with pytest.raises(UserError, match=r"data\.train\.columns\.reference=null"):
        read_records(given)


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
    given = SourceConfig(path=f"nemo_popsd:{name}", columns=ColumnsConfig(id="id", answer="answer"), limit=5)
    records, _ = read_records(given, need_answer=True)
    assert len(records) == 5
