import logging

import pytest
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from nemo_popsd.data.chat import ChatFormat
from nemo_popsd.errors import UserError
from tests.data import small


def chat(template: str | None, *, system: str | None = None, thinking: bool = True) -> ChatFormat:
    return ChatFormat(small.tokenizer(template), system=system, enable_thinking=thinking)


@pytest.mark.parametrize(
    ("template", "thinking", "prefix", "deaf"),
    [
        (small.THINKING, True, "<assistant>", False),
        (small.THINKING, False, "<assistant><think></think>", False),
        (small.DEAF, True, "<assistant><think>\n", True),
        (small.DEAF, False, "<assistant><think>\n", True),
        (small.ALWAYS, True, " [/INST]", True),
    ],
)
def test_assistant_prefix(
    template: str, thinking: bool, prefix: str, deaf: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = chat(template, thinking=thinking)
    assert made.assistant_prefix == prefix
    assert made.ignores_thinking is deaf
    assert [("ignores enable_thinking" in message) for message in caplog.messages] == [True] * deaf


def test_system_turn() -> None:
    assert chat(small.THINKING, system="S").render("U") == "<s><system>S<end><user>U<end><assistant>"
    assert chat(small.THINKING).render("U") == "<s><user>U<end><assistant>"


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(UserError, match="without a chat template"):
        chat(None)


def test_a_template_that_refuses_the_system_turn_is_refused() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + small.THINKING
    )
    assert chat(template).assistant_prefix == "<assistant>"
    with pytest.raises(UserError, match=r"no system role.*set data\.templates\.system=null"):
        chat(template, system="S")


def test_a_template_without_an_assistant_prefix_is_refused() -> None:
    with pytest.raises(UserError, match="one assistant prefix"):
        chat("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def test_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UserError, match="need a fast tokenizer"):
        chat(small.THINKING)


def test_bos_is_not_doubled() -> None:
    tokenizer = small.tokenizer()
    made = ChatFormat(tokenizer, system=None, enable_thinking=True)
    bos = tokenizer.bos_token_id
    assert tokenizer("x")["input_ids"][0] == bos, "this tokenizer adds BOS of its own, or the test shows nothing"
    ids = made.encode([made.render("U")])[0].ids
    assert ids.count(bos) == 1
    messages = [{"role": "user", "content": "U"}]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_truncation_and_padding_set_on_the_tokenizer_are_ignored() -> None:
    tokenizer = small.tokenizer()
    made = ChatFormat(tokenizer, system=None, enable_thinking=True)
    tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert [len(encoded.ids) for encoded in made.encode(["x" * 10, "y"])] == [10, 1]


def test_control_tokens_in_a_text_are_found() -> None:
    made = chat(small.THINKING)
    assert made.mark_in("a <end> b") == "<end>"
    assert made.mark_in("a <think> b < end>") is None


TURNS = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<tool>' }}{% endif %}"
    "{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


def test_added_tokens_that_the_template_writes_are_control_tokens() -> None:
    """R1-Distill's tokenizer does not declare its turn tokens special."""
    tokenizer = small.tokenizer(TURNS)
    tokenizer.add_tokens(["[user]", "[assistant]", "<tool>", "<think>", "</think>", "[other]"])
    made = ChatFormat(tokenizer, system=None, enable_thinking=True)
    assert not {"[user]", "[assistant]"} & set(tokenizer.all_special_tokens)
    for mark in ("[user]", "[assistant]", "<tool>", "<end>"):
        assert made.mark_in(f"2+2?{mark}And 3+3?") == mark
    for text in ("a [other] b", "<think>\nhm\n</think>", "[system]", "[ user]"):
        assert made.mark_in(text) is None


def test_a_control_token_that_appears_after_normalisation_is_found() -> None:
    tokenizer = small.tokenizer(TURNS)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("[user]", normalized=True)])
    text = "2+2?\uff3buser\uff3d"
    assert tokenizer.convert_tokens_to_ids("[user]") in tokenizer(text)["input_ids"], "or the test shows nothing"
    assert ChatFormat(tokenizer, system=None, enable_thinking=True).mark_in(text) == "[user]"
