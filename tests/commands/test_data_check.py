"""`popsd data check`: rows as the branches see them, and each defect with its fix and exit status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_popsd.cli.main import main
from nemo_popsd.commands.data_check import DataCheck, check_data
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import ColumnsConfig, DataConfig, SourceConfig
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation import equivalence
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.rollout.config import RolloutConfig
from tests.data import small

TRAIN = [{"question": f"What is {n}+1?", "reference": f"{n}+1={n + 1}. So {n + 1}."} for n in range(4)]
HELD_OUT = [{"question": f"What is {n}+2?", "answer": n + 2} for n in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1000, "max_position_embeddings": 40_000}))
    return folder


def config(
    model: Path, folder: Path, train: list[dict] | None = None, held_out: list[dict] | None = None, **data: object
) -> PopsdConfig:
    sources: dict[str, object] = {}
    if train is not None:
        sources["train"] = SourceConfig(path=str(small.write_jsonl(folder / "train.jsonl", train)))  # type: ignore[arg-type]
    if held_out is not None:
        path = str(small.write_jsonl(folder / "held_out.jsonl", held_out))  # type: ignore[arg-type]
        sources["validation"] = SourceConfig(path=path, columns=ColumnsConfig(reference=None, answer="answer"))
    return PopsdConfig(
        student=StudentConfig(source=str(model)),
        data=DataConfig(**{"max_prompt_tokens": 200, "max_reference_tokens": 60, **sources, **data}),  # type: ignore[arg-type]
        rollout=RolloutConfig(max_response_tokens=100),
        evaluation=EvaluationConfig(max_response_tokens=100),
    )


def wrong(check: DataCheck) -> str:
    [only] = check.wrong
    return only


def test_rows_are_shown_through_every_template(model: Path, tmp_path: Path) -> None:
    check = check_data(config(model, tmp_path, TRAIN, HELD_OUT), shown=1)
    text = str(check)
    student = "      | <s><user>Problem: What is 0+1?"
    assert text.count(student) == 2  # the student's prompt and the privileged teacher's
    assert text.count("      | 0+1=1. So 1.") == 2  # both teachers
    assert "      | <s><user>Here is a reference solution:" in text
    assert "      | <s><user>Problem: What is 0+2?" in text
    assert "What is 1+1?" not in text
    assert "answer, compared as value: 2" in text
    assert text.endswith("nothing is wrong")


def test_lengths_are_shown_with_their_limits(model: Path, tmp_path: Path) -> None:
    lines = str(check_data(config(model, tmp_path, TRAIN, HELD_OUT))).splitlines()
    [reference] = [line for line in lines if line.startswith("  reference, before")]
    assert reference.split()[-4:] == ["12", "12", "12", "60"]  # one token per byte
    assert [line.split()[-1] for line in lines if line.startswith("  student's prompt")] == ["200", "200"]


def test_a_question_of_the_evaluation_that_is_trained_on_is_wrong(model: Path, tmp_path: Path) -> None:
    leak = {"question": "what is  2+1?", "answer": 3}
    check = check_data(config(model, tmp_path, TRAIN, [*HELD_OUT, leak]))
    assert wrong(check) == (
        "1 questions of data.validation are also in data.train (row held_out.jsonl:4 of data.validation is row "
        "train.jsonl:3 of data.train); remove these rows from one of the two"
    )


def test_a_solution_in_place_of_an_answer_is_wrong(model: Path, tmp_path: Path) -> None:
    rows = [{"question": "A?", "answer": "First.\n#### 18"}, {"question": "B?", "answer": "7"}]
    assert "1 answers of data.validation have several lines" in wrong(check_data(config(model, tmp_path, None, rows)))


def test_an_answer_that_does_not_parse_is_named(model: Path, tmp_path: Path) -> None:
    rows = [{"question": "A?", "answer": "It is 18. Or so it seems."}, {"question": "B?", "answer": "7"}]
    check = check_data(config(model, tmp_path, None, rows))
    assert check.wrong == []
    assert check.notes == [
        "1 answers of data.validation are compared as text, since the grammar does not parse them "
        "('It is 18. Or so it seems.')"
    ]


def test_answers_that_the_checker_does_not_accept_are_wrong(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "load_checker", lambda name: lambda answer, expected: answer == expected != "3")
    given = config(model, tmp_path, None, HELD_OUT)
    given.evaluation.checker = "mine"
    assert "evaluation.checker=mine rejects 1 answers of data.validation compared with themselves ('3')" in wrong(
        check_data(given)
    )


def test_repetitions_are_noted_in_training_and_wrong_in_evaluation(model: Path, tmp_path: Path) -> None:
    check = check_data(config(model, tmp_path, [*TRAIN, TRAIN[1]], [*HELD_OUT, HELD_OUT[0]]))
    assert check.notes == [
        "1 rows of data.train repeat a question, 1 of them with the same reference "
        "(row train.jsonl:5 that of train.jsonl:2)"
    ]
    assert "repeat a question (row held_out.jsonl:4 that of held_out.jsonl:1)" in wrong(check)


def test_truncation_is_wrong_where_it_is_the_rule(model: Path, tmp_path: Path) -> None:
    long = {"question": "Long?", "reference": "It is long. " * 20}
    assert check_data(config(model, tmp_path, [*TRAIN, long])).notes == [
        "1 of 5 references are truncated to 60 tokens (data.max_reference_tokens)"
    ]
    other = {"question": "Longer?", "reference": "It is long. " * 20}
    check = check_data(config(model, tmp_path, [TRAIN[0], long, other]))
    assert "2 of 3 references are truncated to 60 tokens; set data.max_reference_tokens higher" in wrong(check)


def test_a_limit_that_leaves_most_rows_out_is_wrong(model: Path, tmp_path: Path) -> None:
    rows = [{"question": "Why? " * 40, "reference": "So."}] * 3
    check = check_data(config(model, tmp_path, [*TRAIN[:2], *rows]))
    assert "3 of 5 rows of data.train are dropped" in wrong(check)


def test_more_tokens_than_positions_are_wrong(model: Path, tmp_path: Path) -> None:
    check = check_data(config(model, tmp_path, TRAIN, max_reference_tokens=50_000))
    assert "40000 positions" in wrong(check)


def test_a_defect_of_one_set_does_not_hide_the_other(model: Path, tmp_path: Path) -> None:
    check = check_data(config(model, tmp_path, [{"question": "A?"}], HELD_OUT))
    assert wrong(check).startswith(f"data.train: {tmp_path}/train.jsonl:1: got no column 'reference'")
    assert "data.validation" in check.lines


def test_a_long_text_is_shortened_unless_it_is_wanted(model: Path, tmp_path: Path) -> None:
    given = config(model, tmp_path, [{"question": "A?", "reference": "x" * 3000}], max_reference_tokens=4000)
    assert "x" * 3000 not in str(check_data(given))
    assert "characters ...]" in str(check_data(given))
    assert "x" * 3000 in str(check_data(given, full=True))


def test_without_data_there_is_nothing_to_check(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data\.train\.path, data\.validation\.path or evaluation\.sets"):
        check_data(config(model, tmp_path))


def test_the_command_exits_with_2_if_something_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = str(Path(__file__).parents[2] / "conf" / "tiny.yaml")
    overrides = ["data.train.limit=20", "data.validation.limit=5", "--rows", "0"]
    assert main(["data", "check", conf, *overrides]) == 0
    assert "20 of 20 rows kept" in capsys.readouterr().out
    assert main(["data", "check", conf, "data.validation.path=nemo_popsd:tiny_train", *overrides]) == 2
    assert "5 questions of data.validation are also in data.train" in capsys.readouterr().out
