"""The embedded model's tokenizer: byte-level BPE in which every word of the testbed is one token.

Byte level means that any text is encoded and decoded without loss. Words include their leading space; digits are single
tokens. The chat template follows Qwen3's: same turns, same assistant prefix, same `enable_thinking=False` suffix.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_popsd.testbed.problems import DIFFICULTY, Difficulty, problems, response, terse_thoughts, thoughtful_thoughts
from nemo_popsd.testbed.templates import CONTEXTS, user_turn

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"

_WORDS = r" ?\p{L}+| ?\p{N}|\n| ?[^\s\p{L}\p{N}]+|\s"
_LARGEST_VOCABULARY = 1024
_CORPUS_SEED = 0
_CORPUS_PROBLEMS = 400

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' and '</think>' in message.content and not loop.last -%}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') -%}
    {%- else -%}
        {%- set content = message.content -%}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def build_tokenizer(difficulty: Difficulty = DIFFICULTY) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the testbed's texts for problems of `difficulty`; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(difficulty), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    # As in Qwen3, the thinking tags are single tokens that decoding keeps.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (THINK_START, THINK_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(directory: Path, difficulty: Difficulty = DIFFICULTY) -> PreTrainedTokenizerFast:
    """Build the tokenizer and save it in Hugging Face format, its chat template inside `tokenizer_config.json`."""
    tokenizer = build_tokenizer(difficulty)
    tokenizer.save_pretrained(str(directory), save_jinja_files=False)
    return tokenizer


def _corpus(difficulty: Difficulty) -> list[str]:
    """The texts whose words become tokens."""
    texts = ["user\n", "assistant\n", "system\n", "You are a helpful assistant."]
    for problem, rng in islice(problems("pretraining", _CORPUS_SEED, difficulty), _CORPUS_PROBLEMS):
        texts += [user_turn(context, problem.question, problem.reference) for context in CONTEXTS]
        texts += [
            response(t, problem.answer)
            for t in (terse_thoughts(problem), thoughtful_thoughts(problem, rng, difficulty))
        ]
    return texts
