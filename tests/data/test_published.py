"""Published data sets become rows: one or two hand-written rows in the layout of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_popsd.cli.data import LAYOUTS as NAMES
from nemo_popsd.cli.main import main
from nemo_popsd.data.config import ColumnsConfig, SourceConfig
from nemo_popsd.data.published import LAYOUTS, convert
from nemo_popsd.data.sources import read_records
from nemo_popsd.errors import UserError
from tests.data import small

ASKED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
BOXED = "Return your final response within \\boxed{}. "
TAGGED = (
    "<|begin_of_thought|>\n\nHm, 1+1.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nTwo.\n\n<|end_of_solution|>"
)
THOUGHT = "<think>\nHm, 1+1.\n</think>\n\nTwo."


def turns(question: str, response: str, roles: tuple[str, str] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"from": roles[0], "value": question}, {"from": roles[1], "value": response}]


CASES: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, str]]]] = {
    "DASD": (
        "dasd",
        [
            {"uuid": "u1", "input": "What is 1+1?" + ASKED, "output": THOUGHT, "domain": "math", "meta": "{}"},
            {"uuid": "u2", "input": "Write a loop.", "output": "for", "domain": "code", "meta": "{}"},
        ],
        [{"id": "u1", "question": "What is 1+1?", "reference": THOUGHT}],
    ),
    "OpenThoughts-114k": (
        "openthoughts",
        [
            {"system": "s", "conversations": turns(BOXED + "What is 1+1?", TAGGED)},
            {"system": "s", "conversations": turns("Generate an executable Python function.", TAGGED)},
        ],
        [{"question": "What is 1+1?", "reference": "<think>\n\nHm, 1+1.\n\n</think>\n\n\n\nTwo."}],
    ),
    "OpenThoughts-114k, metadata": (
        "openthoughts",
        [
            {
                "problem": "What is 1+1?",
                "deepseek_reasoning": "Hm, 1+1.",
                "deepseek_solution": "Two.",
                "ground_truth_solution": "2",
                "domain": "math",
                "source": "numina_math",
            },
            {"problem": "Sort.", "deepseek_reasoning": "a", "deepseek_solution": "b", "domain": "code", "source": "x"},
        ],
        [{"question": "What is 1+1?", "reference": THOUGHT}],
    ),
    "OpenThoughts3": (
        "openthoughts",
        [
            {"difficulty": 7, "domain": "math", "conversations": turns("What is 1+1?", THOUGHT, ("human", "gpt"))},
            {"difficulty": 7, "domain": "science", "conversations": turns("Why?", "So.", ("human", "gpt"))},
        ],
        [{"question": "What is 1+1?", "reference": THOUGHT}],
    ),
    "Math-CoT-20k": (
        "math-cot-20k",
        [
            {
                "data_source": "openr1",
                "question": "What is 1+1?",
                "answer": "2",
                "message": [{"role": "user", "content": "What is 1+1?" + ASKED}],
                "response": THOUGHT,
                "response_length": 12,
                "advantage": 0.5,
            }
        ],
        [{"question": "What is 1+1?", "reference": THOUGHT, "answer": "2"}],
    ),
    "GSM8K": (
        "gsm8k",
        [{"question": "How many?", "answer": "1+1=<<1+1=2>>2 eggs.\n#### 2"}],
        [{"question": "How many?", "reference": "1+1=<<1+1=2>>2 eggs.\n#### 2", "answer": "2"}],
    ),
    "AIME 2024": (
        "aime",
        [{"id": 60, "problem": "Find n.", "solution": "It is 204.", "answer": "204", "url": "u", "year": "2024"}],
        [{"id": "60", "question": "Find n.", "reference": "It is 204.", "answer": "204"}],
    ),
    "AIME 2024, capital names": (
        "aime",
        [{"ID": "2024-I-1", "Problem": "Find n.", "Solution": "It is 204.", "Answer": 204}],
        [{"id": "2024-I-1", "question": "Find n.", "reference": "It is 204.", "answer": "204"}],
    ),
    "AIME 2025": (
        "aime",
        [{"problem_idx": 1, "problem": "Find b.", "answer": 70, "problem_type": ["Number Theory"]}],
        [{"id": "1", "question": "Find b.", "answer": "70"}],
    ),
    "HMMT February 2025": (
        "hmmt",
        [{"problem_idx": 2, "problem": "Compute.", "answer": "\\frac{1}{2}", "problem_type": ["Algebra"]}],
        [{"id": "2", "question": "Compute.", "answer": "\\frac{1}{2}"}],
    ),
}


def rows_in(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CASES)
def test_a_published_row_becomes_a_row(name: str, form: str, tmp_path: Path) -> None:
    layout, published, expected = CASES[name]
    folder = tmp_path / "copy" / "data"
    folder.mkdir(parents=True)
    if form == "jsonl":
        small.write_jsonl(folder / "train.jsonl", published)  # type: ignore[arg-type]
    else:
        pq.write_table(pa.Table.from_pylist(published), folder / "train-00000-of-00001.parquet")
    report = convert(layout, [str(tmp_path / "copy")], tmp_path / "rows.jsonl")
    assert rows_in(tmp_path / "rows.jsonl") == expected
    assert (report.read, report.written, report.malformed) == (len(published), len(expected), 0)
    assert report.columns == list(expected[0])
    columns = ColumnsConfig(
        id="id" if "id" in expected[0] else None,
        reference="reference" if "reference" in expected[0] else None,
        answer="answer" if "answer" in expected[0] else None,
    )
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), columns=columns)
    [record], _ = read_records(source, need_reference=False)
    assert record.question == expected[0]["question"]


def test_every_layout_is_named_on_the_command_line_and_has_a_case() -> None:
    assert list(NAMES) == list(LAYOUTS)
    assert {layout for layout, _, _ in CASES.values()} == set(LAYOUTS)


def test_a_malformed_row_is_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[object] = [{"question": "A?", "answer": "no mark"}, {"question": "B?", "answer": "#### 2"}]
    source = small.write_jsonl(tmp_path / "a.jsonl", rows)
    report = convert("gsm8k", [str(source)], tmp_path / "rows.jsonl")
    assert str(report) == (
        "1 of 2 rows written; columns question, reference, answer; "
        f"1 malformed and dropped (first: {source}:1: column 'answer' has no final answer after ####)"
    )


def test_a_sample_is_random_and_keeps_the_order(tmp_path: Path) -> None:
    rows: list[object] = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(50)]
    source = str(small.write_jsonl(tmp_path / "a.jsonl", rows))
    taken = []
    for seed in (0, 0, 1):
        report = convert("gsm8k", [source], tmp_path / "rows.jsonl", rows=10, seed=seed)
        taken.append([int(row["answer"]) for row in rows_in(tmp_path / "rows.jsonl")])
        assert "40 not in the sample" in str(report)
    assert taken[0] == taken[1] == sorted(taken[0])
    assert len(set(taken[0])) == 10
    assert taken[2] != taken[0]


def test_another_layout_is_refused_with_the_columns_of_both(tmp_path: Path) -> None:
    source = str(small.write_jsonl(tmp_path / "a.jsonl", [{"question": "A?", "solution": "#### 2"}]))
    with pytest.raises(UserError, match=r"got columns question, solution; need columns uuid, input, output, domain"):
        convert("dasd", [source], tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_files_without_mathematics_are_refused(tmp_path: Path) -> None:
    source = str(small.write_jsonl(tmp_path / "a.jsonl", [CASES["DASD"][1][1]]))
    with pytest.raises(UserError, match="1 dropped because they are not mathematics"):
        convert("dasd", [source], tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()
    (tmp_path / "earlier.jsonl").write_text("kept")
    with pytest.raises(UserError, match="not mathematics"):
        convert("dasd", [source], tmp_path / "earlier.jsonl")
    assert (tmp_path / "earlier.jsonl").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "earlier.jsonl"}


def test_the_command_converts_several_files_and_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [small.write_jsonl(tmp_path / f"{n}.jsonl", CASES["GSM8K"][1]) for n in "ab"]  # type: ignore[arg-type]
    command = ["data", "convert", "gsm8k", *map(str, names), str(tmp_path / "out" / "rows.jsonl")]
    assert main(command) == 0
    assert len(rows_in(tmp_path / "out" / "rows.jsonl")) == 2
    assert "2 of 2 rows written" in capsys.readouterr().out
    assert main(command) == 2
    assert "OUTPUT=" in capsys.readouterr().err
