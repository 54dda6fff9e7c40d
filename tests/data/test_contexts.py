import re

import pytest
from transformers import PreTrainedTokenizerFast

from nemo_popsd.data.alignment import append_response, response_positions
from nemo_popsd.data.config import DataConfig, TemplatesConfig
from nemo_popsd.data.contexts import ContextBuilder, FittedRow, Misfit, RejectedRow
from nemo_popsd.errors import UserError
from tests.data import small
from tests.data.small import record

LONG = "abcdefghijklmnopqrstuvwxyz"


def builder(
    template: str = small.THINKING, tokenizer: PreTrainedTokenizerFast | None = None, **changes: object
) -> ContextBuilder:
    return ContextBuilder(tokenizer or small.tokenizer(template), DataConfig(**changes))  # type: ignore[arg-type]


def test_the_three_prompts_in_full() -> None:
    templates = TemplatesConfig(
        student="{question}!", question_block="Q={question};", teacher="{question_block}R={reference}!"
    )
    tokenizer = small.tokenizer()
    contexts = builder(tokenizer=tokenizer, templates=templates).build(record(question="q", reference="r"))
    assert tokenizer.decode(contexts.student) == "<s><user>q!<end><assistant>"
    assert tokenizer.decode(contexts.privileged) == "<s><user>Q=q;R=r!<end><assistant>"
    assert tokenizer.decode(contexts.reference) == "<s><user>R=r!<end><assistant>"


def test_one_bos_in_each_prompt() -> None:
    tokenizer = small.tokenizer()
    contexts = builder(tokenizer=tokenizer).build(record())
    for ids in (contexts.student, contexts.privileged, contexts.reference):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("template", [small.THINKING, small.DEAF, small.ALWAYS])
def test_all_prompts_end_in_the_same_assistant_prefix(template: str, thinking: bool) -> None:
    tokenizer = small.tokenizer(template)
    made = builder(tokenizer=tokenizer, enable_thinking=thinking)
    prefix = tokenizer(made.assistant_prefix, add_special_tokens=False)["input_ids"]
    contexts = made.build(record())
    for ids in (contexts.student, contexts.privileged, contexts.reference):
        assert ids[-len(prefix) :] == prefix
    assert ("</think>" in made.assistant_prefix) is (template == small.THINKING and not thinking)


@pytest.mark.parametrize(
    "condition",
    [
        "'Reference' in CONTENT",  # both teachers
        "'Problem' in CONTENT",  # student and privileged teacher
        "'Problem' in CONTENT and 'Reference' in CONTENT",  # privileged teacher
        "'Problem' not in CONTENT and 'Reference' in CONTENT",  # reference-only teacher
        "'Problem' in CONTENT and 'Reference' not in CONTENT",  # student
    ],
)
def test_prompts_that_end_differently_are_refused_by_name(condition: str) -> None:
    # The template opens a thought only in some of the contexts, depending on the text of the user turn.
    template = small.FICKLE.replace(small.FICKLE_CONDITION, condition.replace("CONTENT", "messages[-1]['content']"))
    with pytest.raises(UserError) as caught:
        builder(template).build(record(7))
    assert caught.value.what == "row row7"
    assert "student prompt ends in" in str(caught.value)
    assert "<assistant><think>" in str(caught.value.got)
    assert "'<assistant>'" in caught.value.need


def test_prefix_tokens_are_compared_and_not_only_its_text() -> None:
    # Merges across the boundary: " [/INST]" follows "." in one prompt and "!" in the others, and "! [/" is one token.
    from tokenizers import AddedToken

    tokenizer = small.tokenizer(small.ALWAYS)
    tokenizer.add_tokens([AddedToken("! [/", normalized=False)])
    templates = TemplatesConfig(student="{question}.", teacher="{question_block}{reference}!")
    with pytest.raises(UserError, match=r"row row1: .*token ids \["):
        builder(tokenizer=tokenizer, templates=templates).build(record())
    alike = TemplatesConfig(student="{question}!", teacher="{question_block}{reference}!")
    assert builder(tokenizer=tokenizer, templates=alike).build(record()).student


def test_template_that_ignores_thinking_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert builder(small.DEAF).template_ignores_thinking
    assert not builder(small.THINKING).template_ignores_thinking
    assert caplog.text.count("ignores enable_thinking") == 1


def test_template_that_alters_the_text_is_refused() -> None:
    shout = small.THINKING.replace("m['content']", "m['content'] | upper")
    with pytest.raises(UserError, match="row row1: got a rendered prompt without the unchanged question"):
        builder(shout).build(record())


def test_template_that_truncates_the_prompt_is_refused() -> None:
    cut = small.THINKING.replace("m['content']", "m['content'][-200:]")
    with pytest.raises(UserError, match="row row1: got a rendered prompt without the unchanged question"):
        builder(cut).build(record())


# Truncation: of the reference only, at its end, identical for both teachers


def test_the_reference_is_truncated_identically_for_both_teachers() -> None:
    tokenizer = small.tokenizer()
    made = builder(tokenizer=tokenizer, max_reference_tokens=10)
    contexts = made.build(record(question="What is the long question?", reference=LONG))
    assert contexts.reference_truncated
    assert contexts.reference_text == "abcdefghij"
    texts = [tokenizer.decode(ids) for ids in (contexts.privileged, contexts.reference)]
    for text in texts:
        assert re.findall("Begin ===\n(.*)\n=== Reference Solution End", text) == ["abcdefghij"]
    assert "What is the long question?" in texts[0]
    assert texts[0].replace("Problem: What is the long question?\n\n", "") == texts[1]
    assert "What is the long question?" in tokenizer.decode(contexts.student)


def test_a_short_reference_is_unchanged() -> None:
    made = builder(max_reference_tokens=len(LONG))
    contexts = made.build(record(reference=LONG))
    assert contexts.reference_text == LONG
    assert not contexts.reference_truncated


@pytest.mark.parametrize("limit", range(1, 13))
def test_truncation_never_splits_a_character(limit: int) -> None:
    text = "a€b😀cd"  # 1 + 3 + 1 + 4 + 1 + 1 bytes, one token each
    expected = {1: 1, 2: 1, 3: 1, 4: 2, 5: 3, 6: 3, 7: 3, 8: 3, 9: 4, 10: 5}.get(limit, 6)
    contexts = builder(max_reference_tokens=limit).build(record(reference=text))
    assert contexts.reference_text == text[:expected]
    assert contexts.reference_truncated is (expected < 6)


def test_truncation_keeps_complete_tokens_up_to_the_limit() -> None:
    tokenizer = small.tokenizer()
    tokenizer.add_tokens(["xyz"])
    made = builder(tokenizer=tokenizer, max_reference_tokens=4)
    assert made.build(record(reference="xyz" * 10)).reference_text == "xyz" * 4
    assert made.build(record(reference="a" + "xyz" * 10)).reference_text == "a" + "xyz" * 3


def test_a_reference_truncated_to_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="row row1: got nothing left of the reference"):
        builder(max_reference_tokens=2).build(record(reference="😀 and more"))


def test_long_references_follow_the_setting() -> None:
    rows = [record(1), record(2, reference=LONG)]
    fitted = builder(max_reference_tokens=15, long_references="drop").fit(rows)
    assert isinstance(fitted[0], FittedRow)
    assert isinstance(fitted[1], RejectedRow)
    assert fitted[1].why is Misfit.LONG_REFERENCE
    assert "26 tokens" in fitted[1].detail
    with pytest.raises(UserError, match="row row2: got a reference of 26 tokens"):
        builder(max_reference_tokens=15, long_references="error").fit(rows)


def test_overlong_prompts_follow_the_setting_and_are_never_truncated() -> None:
    rows = [record(1), record(2, question="What? " * 30)]
    fitted = builder(max_prompt_tokens=150).fit(rows)
    assert isinstance(fitted[0], FittedRow)
    assert isinstance(fitted[1], RejectedRow)
    assert fitted[1].why is Misfit.OVERLONG
    with pytest.raises(UserError, match=r"row row2: got a prompt of \d+ tokens"):
        builder(max_prompt_tokens=150, overlong_rows="error").fit(rows)
    with pytest.raises(UserError, match=r"row row2: got .*prompt of \d+ tokens"):
        builder(max_prompt_tokens=150).build(rows[1])


def test_the_limit_is_on_the_complete_student_prompt() -> None:
    length = len(builder().build(record()).student)
    assert isinstance(builder(max_prompt_tokens=length).fit([record()])[0], FittedRow)
    assert isinstance(builder(max_prompt_tokens=length - 1).fit([record()])[0], RejectedRow)


@pytest.mark.parametrize("field", ["question", "reference"])
def test_a_row_with_control_tokens_is_malformed(field: str) -> None:
    bad = record(3, **{field: "He said <end><assistant> 5"})
    with pytest.raises(UserError, match=f"row row3: got the token <end> in its {field}"):
        builder().fit([bad])
    rejected = builder(malformed_rows="skip").fit([bad])[0]
    assert isinstance(rejected, RejectedRow)
    assert rejected.why is Misfit.MALFORMED


def test_a_token_without_an_embedding_is_refused_where_it_is_used() -> None:
    tokenizer = small.tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["modulo", "<tool>"])
    made = ContextBuilder(tokenizer, DataConfig(malformed_rows="skip"), vocab_size=size)
    assert isinstance(made.fit([record()])[0], FittedRow), "tokens that nothing uses may be there"
    for column in ("question", "reference"):
        row = record(3, **{column: "What is 7 modulo 3?"})
        with pytest.raises(
            UserError, match=rf"row row3: got the token 'modulo' with id {size} in its {column}.*={size}"
        ):
            made.fit([record(), row])
    assert isinstance(made.fit([record(3, reference="7 modulo 3")], with_reference=False)[0], FittedRow)
    ContextBuilder(tokenizer, DataConfig(), vocab_size=len(tokenizer)).fit([record(3, question="7 modulo 3?")])
    tokenizer.chat_template = "<tool>" + small.THINKING
    with pytest.raises(UserError, match=r"the prompt around a row: got the token '<tool>' with id"):
        ContextBuilder(tokenizer, DataConfig(), vocab_size=size)


def test_missing_reference_is_an_error_naming_the_row() -> None:
    with pytest.raises(UserError, match="row row4: got no reference"):
        builder().build(record(4, reference=None))
    assert isinstance(builder().fit([record(4, reference=None)], with_reference=False)[0], FittedRow)


def test_many_rows_keep_their_order() -> None:
    rows = [record(n, question=f"What is {n}?", reference=LONG * (n % 3 + 1)) for n in range(150)]
    made = builder(max_reference_tokens=30)
    fitted = made.fit(rows)
    for row, given in zip(fitted, rows, strict=True):
        assert isinstance(row, FittedRow)
        assert row.record is given
        assert row.texts == {"solution": (given.reference or "")[:30]}
        assert row.reference_truncated is (len(given.reference or "") > 30)
        assert row.student_length == len(made.student_prompt(given))


@pytest.mark.parametrize(
    "templates",
    [
        TemplatesConfig(),
        TemplatesConfig(teacher="{question_block}{reference} {reference}"),
        TemplatesConfig(question_block="{question} Again: {question}\n"),
    ],
    ids=["default", "reference twice", "question twice"],
)
def test_longest_context_is_a_bound_that_is_nearly_reached(templates: TemplatesConfig) -> None:
    made = builder(templates=templates, max_prompt_tokens=300, max_reference_tokens=50)
    free = 300 - len(made.student_prompt(record(question="x"))) + 1
    contexts = made.build(record(question="y" * free, reference="z" * 80))
    assert len(contexts.student) == 300
    assert made.longest_context - 20 <= len(contexts.privileged) <= made.longest_context


@pytest.mark.parametrize("response", [[], [65], [65, 66, 67]])
def test_the_same_response_continues_each_context(response: list[int]) -> None:
    contexts = builder().build(record())
    prompts = (contexts.student, contexts.privileged, contexts.reference)
    assert len({len(ids) for ids in prompts}) == 3
    for ids in prompts:
        context = append_response(ids, response)
        positions = response_positions(len(ids), len(response))
        assert context[1:][positions] == response
        assert context[: len(ids)] == ids


def test_bad_template_is_refused_by_the_constructor() -> None:
    with pytest.raises(UserError, match=r"student without \{question\}"):
        builder(templates=TemplatesConfig(student="?"))
