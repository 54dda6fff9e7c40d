"""A byte tokenizer with a chat template, built in memory, and small rows for it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nemo_popsd.data.records import Record

SPECIAL = ["<s>", "<end>", "<user>", "<assistant>", "<system>"]
BODY = (
    "<s>{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
)
THINKING = BODY + "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
DEAF = BODY + "<think>\n{% endif %}"  # ignores enable_thinking
# The assistant prefix depends on the content, which the contexts must refuse.
FICKLE_CONDITION = "'Reference' in messages[-1]['content']"
FICKLE = BODY + "{% if " + FICKLE_CONDITION + " %}<think>{% endif %}{% endif %}"
# Ignores add_generation_prompt: the user's turn includes the assistant token.
ALWAYS = "<s>{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def tokenizer(
    template: str | None = THINKING, *, bos: bool = True, eos: str | None = "<end>"
) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8; like Llama's, it adds a BOS unless add_special_tokens is off."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, additional_special_tokens=SPECIAL[1:]
    )
    made.chat_template = template
    return made


def record(number: int = 1, *, question: str = "What is 2+3?", reference: str | None = "2+3=5. So 5.") -> Record:
    return Record(id=f"row{number}", question=question, reference=reference, answer="5")


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int) -> list[object]:
    return [{"question": f"What is {n}+1?", "reference": f"It is {n + 1}.", "answer": n + 1} for n in range(count)]
