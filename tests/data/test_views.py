"""Views of the reference and thinking by role: from the columns of a row to the prompts of the two teachers."""

import logging
import re
from pathlib import Path

import pytest

from nemo_popsd.data.config import ColumnsConfig, DataConfig, SourceConfig, TeacherConfig
from nemo_popsd.data.contexts import Borrowed, ContextBuilder
from nemo_popsd.data.dataset import PromptDataset, build_dataset
from nemo_popsd.data.views import Views
from nemo_popsd.errors import UserError
from tests.data import small

ROWS = [
    {"question": f"What is {n}+1?", "reference": f"It is {n + 1}.", "final": n + 1, "hint": f"Count up from {n}."}
    for n in range(4)
]


def config(path: Path, privileged: str | None, second: str | None = None, **changes: object) -> DataConfig:
    columns = ColumnsConfig(answer="final")
    return DataConfig(
        train=SourceConfig(path=str(path), columns=columns),
        privileged=TeacherConfig(view=privileged),
        reference_only=TeacherConfig(view=second),
        **changes,  # type: ignore[arg-type]
    )


def dataset(given: DataConfig, borrowed: Borrowed = Borrowed.NONE) -> PromptDataset:
    return build_dataset(given, given.train, small.tokenizer(), borrowed)[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return small.write_jsonl(tmp_path / "a.jsonl", list(ROWS))


def seen_by(text: str) -> str | None:
    found = re.search("Begin ===\n(.*)\n=== Reference Solution End", text)
    return found and found.group(1)


@pytest.mark.parametrize(
    ("privileged", "second", "seen"),
    [
        (None, None, ("It is 3.", "It is 3.")),
        ("answer", None, ("3", "3")),
        ("hint", None, ("Count up from 2.", "Count up from 2.")),
        ("none", None, (None, None)),
        ("final", "solution", ("3", "It is 3.")),
        ("solution", "none", ("It is 3.", None)),
    ],
)
def test_each_teacher_sees_its_view(
    path: Path, privileged: str | None, second: str | None, seen: tuple[str | None, str | None]
) -> None:
    row = dataset(config(path, privileged, second))[2]
    texts = [small.tokenizer().decode(ids) for ids in (row.contexts.privileged, row.contexts.reference)]
    assert tuple(map(seen_by, texts)) == seen
    assert ["What is 2+1?" in text for text in texts] == [True, False]
    assert row.contexts.reference_text == (seen[0] or "")


def test_a_view_of_another_row_is_the_same_for_both_teachers(path: Path) -> None:
    for row in dataset(config(path, "other")):
        texts = [small.tokenizer().decode(ids) for ids in (row.contexts.privileged, row.contexts.reference)]
        lent = {seen_by(text) for text in texts}
        assert len(lent) == 1
        assert lent < {other["reference"] for other in ROWS} - {row.record.reference}


def test_a_contrast_with_the_question_alone(path: Path) -> None:
    """`wrong_reference` with the view `none` for its second context: nothing is borrowed."""
    row = dataset(config(path, "answer", "none"), Borrowed.SECOND)[2]
    assert row.contexts.reference == row.contexts.student
    assert seen_by(small.tokenizer().decode(row.contexts.privileged)) == "3"


def test_a_borrowed_view_is_another_rows_text_in_that_view(path: Path) -> None:
    rows = dataset(config(path, "answer"), Borrowed.SECOND)
    for row in rows:
        own, lent = (seen_by(small.tokenizer().decode(x)) for x in (row.contexts.privileged, row.contexts.reference))
        assert own == row.record.answer
        assert lent in {str(other["final"]) for other in ROWS} - {own}


@pytest.mark.parametrize("view", ["none", "other"])
def test_equal_teachers_are_refused_by_row(path: Path, view: str) -> None:
    with pytest.raises(UserError, match=r"row a\.jsonl:1: got the same prompt for both teachers: .* is 0"):
        dataset(config(path, view), Borrowed.SECOND)


@pytest.mark.parametrize(
    ("view", "defect", "message"),
    [
        ("hint", {"hint": None}, r"a\.jsonl:3: got column 'hint' is null"),
        ("hint", {"hint": " "}, r"a\.jsonl:3: got column 'hint' is empty"),
        ("answer", {"final": None}, r"a\.jsonl:3: got column 'final' is null"),
        ("solution", {"reference": ""}, r"a\.jsonl:3: got column 'reference' is empty"),
        ("hint", {"hint": "<end>"}, r"row a\.jsonl:3: got the token <end> in its column hint"),
    ],
)
def test_a_row_without_its_view_is_an_error_that_names_it(
    tmp_path: Path, view: str, defect: dict[str, object], message: str
) -> None:
    rows = [*ROWS[:2], {**ROWS[2], **defect}]
    given = config(small.write_jsonl(tmp_path / "a.jsonl", list(rows)), view)
    with pytest.raises(UserError, match=message):
        dataset(given)
    given.malformed_rows = "skip"
    assert len(dataset(given)) == 2


def test_an_unknown_view_is_a_missing_column(path: Path) -> None:
    with pytest.raises(UserError, match="no column 'summary'"):
        dataset(config(path, "summary"))


def test_views_that_need_no_reference_read_none(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "reference"} for row in ROWS]
    given = config(small.write_jsonl(tmp_path / "a.jsonl", list(rows)), "answer")
    given.train.columns.reference = None
    assert len(dataset(given)) == 4
    given.privileged.view = "solution"
    with pytest.raises(UserError, match=r"columns\.reference=null"):
        dataset(given)


def test_an_answer_may_come_from_the_reference(path: Path) -> None:
    given = config(path, "answer")
    given.train = SourceConfig(path=str(path), answer_pattern=r"It is (\d+)")
    assert dataset(given)[1].contexts.reference_text == "2"
    given.train.answer_pattern = "is (9)"
    with pytest.raises(UserError, match=r"a\.jsonl:1: got no final answer"):
        dataset(given)


def test_every_view_is_truncated_to_the_limit_and_counted(path: Path) -> None:
    given = config(path, "hint", max_reference_tokens=8)
    made, report = build_dataset(given, given.train, small.tokenizer())
    assert [made[0].contexts.reference_text, report.references_truncated] == ["Count up", 4]


def test_the_digest_is_of_what_is_read_and_seen(path: Path) -> None:
    """So that a run is not resumed on other answers; it is that of the solution alone where nothing else is seen."""
    digests = {view: dataset(config(path, view)).data_digest() for view in (None, "solution", "answer", "hint", "none")}
    assert digests[None] == digests["solution"] == digests["none"]
    assert len(set(digests.values())) == 3


def test_answers_that_the_training_depends_on_are_needed_and_part_of_the_digest(tmp_path: Path) -> None:
    """Weights by right and wrong answers: `build_dataset(..., need_answer=True)`."""
    digests = {}
    for final in (1, 7):
        given = config(small.write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "final": final}]), None)
        for need in (False, True):
            made, _ = build_dataset(given, given.train, small.tokenizer(), need_answer=need)
            digests[final, need] = made.data_digest()
    assert digests[1, False] == digests[7, False]
    assert len(set(digests.values())) == 3
    given.train = SourceConfig(path=given.train.path, answer_pattern="is (9)")
    assert build_dataset(given, given.train, small.tokenizer())[0][0].record.answer is None
    with pytest.raises(UserError, match="got no final answer"):
        build_dataset(given, given.train, small.tokenizer(), need_answer=True)


def test_a_teacher_without_privilege_is_reported(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "nemo_popsd.data.dataset" and r.levelno >= 30]

    with caplog.at_level(logging.INFO):
        dataset(config(path, "answer"))
        assert not warnings()
        dataset(config(path, "none"))
    assert "the privileged teacher's prompt is the student's" in warnings()[0]
    caplog.clear()
    given = config(path, "none", enable_thinking=False)
    given.privileged.enable_thinking = True
    dataset(given)
    assert not warnings(), "it thinks and the student does not"


def test_texts_of_both_views_are_read_once() -> None:
    assert Views("answer", "answer").texts == ("answer",)
    assert Views("other", "solution").texts == ("solution",)
    assert Views("none", "none").texts == ()
    assert Views("hint", "answer").columns == ("hint",)


# Thinking


def test_thinking_by_role() -> None:
    tokenizer = small.tokenizer()

    def closed(**settings: object) -> list[bool]:
        made = ContextBuilder(tokenizer, DataConfig(**settings)).build(small.record())  # type: ignore[arg-type]
        prompts = (made.student, made.privileged, made.reference)
        return [tokenizer.decode(ids).endswith("<think></think>") for ids in prompts]

    on, off = TeacherConfig(enable_thinking=True), TeacherConfig(enable_thinking=False)
    assert closed() == [False, False, False]
    assert closed(privileged=off) == [False, True, True]
    assert closed(enable_thinking=False, privileged=on) == [True, False, False]
    assert closed(enable_thinking=False, privileged=on, reference_only=off) == [True, False, True]
    assert closed(reference_only=off) == [False, False, True]


def test_prompts_of_the_same_thinking_need_the_same_prefix() -> None:
    # The closed thought depends on the text, so that the two teachers, which both think, end differently.
    template = small.BODY + "{% if enable_thinking is false or '2+3?' in messages[-1]['content'] %}<think></think>"
    given = DataConfig(enable_thinking=False, privileged=TeacherConfig(enable_thinking=True))
    with pytest.raises(UserError, match=r"row row1: .*in every prompt of the same thinking"):
        ContextBuilder(small.tokenizer(template + "{% endif %}{% endif %}"), given).build(small.record())
