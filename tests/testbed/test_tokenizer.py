"""The tokenizer is lossless and deterministic, and its chat template follows Qwen3's."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_popsd.testbed.problems import problems, response, terse_thoughts, thoughtful_thoughts
from nemo_popsd.testbed.templates import CONTEXTS, TEMPLATES, user_turn
from nemo_popsd.testbed.tokenizer import build_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_round_trip_of_all_generated_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for problem, rng in islice(problems("validation", 11), 200):
        for thoughts in (terse_thoughts(problem), thoughtful_thoughts(problem, rng)):
            for context in CONTEXTS:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": user_turn(context, problem.question, problem.reference)}],
                    tokenize=False,
                    add_generation_prompt=True,
                ) + response(thoughts, problem.answer)
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.decode(ids) == text
                # Words and digits are single tokens; only other text is encoded as bytes.
                assert len(ids) <= len(text) / 2


@pytest.mark.parametrize("text", ["  two  spaces , and a tab\t.\n\n", "naïve 数学 🙂", "x=3.14;\r\n", ""])
def test_round_trip_of_foreign_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"):
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.decode(tokenizer.encode("<think>a</think><|im_end|>"), skip_special_tokens=True).startswith(
        "<think>"
    )


def test_calls_return_the_inputs_of_generate(tokenizer: PreTrainedTokenizerBase) -> None:
    assert set(tokenizer(["a = 3"])) == {"input_ids", "attention_mask"}


def test_vocabulary_needs_padding_and_is_reproducible(tokenizer: PreTrainedTokenizerBase) -> None:
    assert 384 < len(tokenizer) < 512
    assert len(tokenizer) % 128
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_template_follows_qwen3(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    suffix = "" if thinking else "<think>\n\n</think>\n\n"
    assert prompt == f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n{suffix}"


def test_chat_template_keeps_the_last_thoughts_and_drops_earlier_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nA"},
        {"role": "user", "content": "V"},
        {"role": "assistant", "content": "<think>\nnew\n</think>\n\nB"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n<think>\nnew\n</think>\n\nB<|im_end|>\n"
    )


def test_teachers_differ_only_in_the_question_block() -> None:
    both, alone = user_turn("question+reference", "Q?", "R."), user_turn("reference", "Q?", "R.")
    assert both == TEMPLATES.question_block.replace("{question}", "Q?") + alone
    assert "Q?" not in alone
    assert "R." not in user_turn("question", "Q?", "R.")
