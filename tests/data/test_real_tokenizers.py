"""Contexts with the tokenizers and chat templates of Qwen3 and R1-Distill, and with GSM8K as published.

These files are not part of the repository; each test is skipped if they are absent.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from nemo_popsd.data.alignment import append_response, response_positions
from nemo_popsd.data.config import ColumnsConfig, DataConfig, SourceConfig, TeacherConfig
from nemo_popsd.data.contexts import ContextBuilder
from nemo_popsd.data.dataset import build_dataset, build_evaluation_prompts
from nemo_popsd.data.records import Record
from nemo_popsd.data.tokenizer import load_tokenizer, stop_token_ids
from nemo_popsd.errors import UserError
from tests.data.small import record

SHARED = Path(__file__).parents[2] / ".." / "shared"
QWEN3 = SHARED / "tokenizers" / "qwen3"
R1 = SHARED / "tokenizers" / "r1-distill-template"
GSM8K = SHARED / "data" / "gsm8k_train_1k.jsonl"


def needs(*paths: Path) -> pytest.MarkDecorator:
    absent = [path.name for path in paths if not path.exists()]
    return pytest.mark.skipif(bool(absent), reason=f"absent: {', '.join(absent)}")


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return load_tokenizer(QWEN3)


@pytest.fixture(scope="module")
def r1() -> Any:
    """Qwen3's vocabulary with R1's control tokens and template, as in R1-Distill-Qwen."""
    return with_tokens_of_r1(special=True)


@pytest.fixture(scope="module")
def r1_with_ordinary_marks() -> Any:
    """The same, but the marks of the roles are not special tokens."""
    return with_tokens_of_r1(special=False)


def with_tokens_of_r1(special: bool) -> Any:
    made = load_tokenizer(QWEN3)
    settings = json.loads((R1 / "tokenizer_config.json").read_text(encoding="utf-8"))
    marks = [AddedToken(mark, special=special, normalized=False) for mark in ("<｜User｜>", "<｜Assistant｜>")]  # noqa: RUF001
    ends = [AddedToken(settings[f"{end}_token"], special=True, normalized=False) for end in ("bos", "eos")]
    made.add_tokens(marks, special_tokens=special)
    made.add_tokens(ends, special_tokens=True)
    made.bos_token, made.eos_token = settings["bos_token"], settings["eos_token"]
    made.chat_template = settings["chat_template"]
    return made


def prompts_of(builder: ContextBuilder, row: Record) -> list[list[int]]:
    contexts = builder.build(row)
    return [contexts.student, contexts.privileged, contexts.reference]


@needs(QWEN3)
@pytest.mark.parametrize(
    ("thinking", "prefix"),
    [(True, "<|im_start|>assistant\n"), (False, "<|im_start|>assistant\n<think>\n\n</think>\n\n")],
)
def test_qwen3_prefix(qwen3: Any, thinking: bool, prefix: str) -> None:
    builder = ContextBuilder(qwen3, DataConfig(enable_thinking=thinking))
    assert builder.assistant_prefix == prefix
    assert not builder.template_ignores_thinking
    expected = qwen3(prefix, add_special_tokens=False)["input_ids"]
    for ids in prompts_of(builder, record()):
        assert ids[-len(expected) :] == expected


@needs(QWEN3)
@pytest.mark.parametrize(
    ("teacher", "probe", "closed"),
    [(True, None, [True, False, False]), (None, True, [True, True, False]), (True, False, [True, False, True])],
    ids=["teachers think", "probe thinks", "teacher thinks"],
)
def test_qwen3_thinking_by_role_aligned_by_response(
    qwen3: Any, teacher: bool | None, probe: bool | None, closed: list[bool]
) -> None:
    """The student's prompt closes its thought and a teacher's does not; the same response ids follow each prompt."""
    roles = {
        "privileged": TeacherConfig(enable_thinking=teacher),
        "reference_only": TeacherConfig(enable_thinking=probe),
    }
    response = qwen3("First, 2+3 = 5.", add_special_tokens=False)["input_ids"]
    prompts = prompts_of(ContextBuilder(qwen3, DataConfig(enable_thinking=False, **roles)), record())
    for prompt, is_closed in zip(prompts, closed, strict=True):
        end = "<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * is_closed
        assert qwen3.decode(prompt).endswith("<|im_end|>\n" + end)
        sequence = append_response(prompt, response)
        assert sequence[1:][response_positions(len(prompt), len(response))] == response


@needs(QWEN3, R1)
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("open_thought", [True, False], ids=["open thought", "assistant mark alone"])
def test_r1_distill_prefix(
    r1: Any,
    thinking: bool,
    open_thought: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not open_thought:
        assert "<think>\\n'" in r1.chat_template
        monkeypatch.setattr(r1, "chat_template", r1.chat_template.replace("<think>\\n'", "'"))
    builder = ContextBuilder(r1, DataConfig(enable_thinking=thinking))
    assert builder.assistant_prefix == "<｜Assistant｜>" + ("<think>\n" if open_thought else "")  # noqa: RUF001
    assert builder.template_ignores_thinking
    assert "ignores enable_thinking" in caplog.text
    expected = r1(builder.assistant_prefix, add_special_tokens=False)["input_ids"]
    for ids in prompts_of(builder, record()):
        assert ids[-len(expected) :] == expected
        assert ids.count(r1.bos_token_id) == 1
        assert ids[0] == r1.bos_token_id


@needs(QWEN3)
def test_qwen3_prompts_equal_those_of_apply_chat_template(qwen3: Any) -> None:
    builder = ContextBuilder(qwen3, DataConfig(enable_thinking=False))
    turn = "Problem: What is 2+3?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    expected = qwen3.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert prompts_of(builder, record())[0] == expected


@needs(QWEN3)
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 13, 21, 34])
def test_qwen3_truncation(qwen3: Any, limit: int) -> None:
    text = "Let me think: 3·4=12 naïve 汉字漢字 😀😀 so…\n\n\n   the   answer is \\boxed{12}. " * 2
    builder = ContextBuilder(qwen3, DataConfig(max_reference_tokens=limit))
    contexts = builder.build(record(reference=text))
    kept = contexts.reference_text
    assert text.startswith(kept)
    assert contexts.reference_truncated
    assert "\ufffd" not in kept
    assert max(1, limit - 4) <= len(qwen3(kept, add_special_tokens=False)["input_ids"]) <= limit
    for ids in (contexts.privileged, contexts.reference):
        assert f"Begin ===\n{kept}\n=== Reference Solution End" in qwen3.decode(ids)


@needs(QWEN3)
def test_a_reference_may_quote_a_thought(qwen3: Any) -> None:
    row = record(reference="<think>\nWait, 2+3.\n</think>\n\nIt is 5.")
    assert ContextBuilder(qwen3, DataConfig()).build(row).reference_text == row.reference


@needs(QWEN3, R1)
@pytest.mark.parametrize("mark", ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"])  # noqa: RUF001
@pytest.mark.parametrize("column", ["question", "reference"])
def test_control_tokens_of_r1_distill_are_refused_although_not_special(
    r1_with_ordinary_marks: Any, column: str, mark: str
) -> None:
    builder = ContextBuilder(r1_with_ordinary_marks, DataConfig())
    with pytest.raises(UserError, match=re.escape(f"the token {mark} in its {column}")):
        builder.fit([record(**{column: f"2+2?{mark}And 3+3?"})])
    builder.fit([record(reference="<think>\nhm\n</think>\n4")])


@needs(QWEN3, GSM8K)
def test_gsm8k_as_published(qwen3: Any) -> None:
    train = SourceConfig(path=str(GSM8K), columns=ColumnsConfig(reference="answer"), limit=40)
    held_out = replace(train, answer_pattern=r"####\s*(.+)")
    config = DataConfig(train=train, validation=held_out, max_reference_tokens=64)
    dataset, report = build_dataset(config, train, qwen3)
    assert report.rows_kept == 40
    assert 0 < report.references_truncated < 40
    for row in dataset:
        teacher, probe = (qwen3.decode(ids) for ids in (row.contexts.privileged, row.contexts.reference))
        assert teacher.replace(f"Problem: {row.record.question}\n\n", "", 1) == probe
    prompts, _ = build_evaluation_prompts(config, held_out, qwen3)
    assert len(prompts) == 40
    assert prompts[0].record.answer == "72"
    assert all(prompt.record.answer for prompt in prompts)


@needs(QWEN3)
def test_qwen3_stop_tokens(qwen3: Any) -> None:
    assert stop_token_ids(qwen3, {"eos_token_id": [151645, 151643]}) == (151643, 151645)
