"""The chat template: rendering and tokenising prompts, and the assistant prefix with which they end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from nemo_popsd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_THOUGHT = ("<think>", "</think>")


class Encoded(NamedTuple):
    """Token ids of one text, and for each token the index of its first character."""

    ids: list[int]
    starts: list[int]


class ChatFormat:
    """The chat template of a tokenizer with a fixed system turn and a fixed `enable_thinking`.

    Attributes:
        assistant_prefix: the text with which every prompt must end: the text that `add_generation_prompt` adds or, for
            templates that ignore it, the text after the user's text.
        ignores_thinking: the template renders the same text with `enable_thinking` on and off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str | None, enable_thinking: bool) -> None:
        """Determine the template's behaviour from probe conversations.

        Raises:
            UserError: the tokenizer has no chat template or no character offsets, or the template cannot be rendered
                (with this system turn) or has no assistant prefix.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "tokenizer",
                got=f"{tokenizer.name_or_path or type(tokenizer).__name__} without a chat template",
                need="a chat template",
                fix="add chat_template to its tokenizer_config.json",
            )
        if not tokenizer.is_fast:
            raise UserError(
                "tokenizer",
                got=f"{type(tokenizer).__name__}, which has no character offsets",
                need="a fast tokenizer",
                fix="add tokenizer.json to the model's directory",
            )
        self._tokenizer = tokenizer
        self._system = system
        self.enable_thinking = enable_thinking
        self.assistant_prefix = self._find_assistant_prefix()
        self.ignores_thinking = self._render("?", True, thinking=True) == self._render("?", True, thinking=False)
        if self.ignores_thinking:
            logger.warning(
                "the chat template ignores enable_thinking (set to %s); every prompt ends in %r",
                str(enable_thinking).lower(),
                self.assistant_prefix,
            )
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        self._marks = self._find_marks()

    def render(self, user_turn: str) -> str:
        """Prompt text: system turn if any, the user turn, and the assistant prefix."""
        return self._render(user_turn, True, thinking=self.enable_thinking)

    def mark_in(self, text: str) -> str | None:
        """Return the first control token in `text` that could open or close a turn, or None.

        Control tokens are the tokenizer's special tokens and every added token that the chat template writes, whether
        or not the tokenizer declares it special. The thought tags are excluded, because a reference may quote them.
        """
        present = next((mark for mark in self._marks if mark in text), None)
        if present is None and self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
            present = next((mark for mark in self._marks if mark in text), None)
        return present

    def beyond(self, vocab_size: int) -> dict[int, str]:
        """Return the tokens without an embedding in a model with `vocab_size` embeddings, by id."""
        return {token_id: token for token, token_id in self._tokenizer.get_vocab().items() if token_id >= vocab_size}

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenise `texts` in one batch, without truncation and without adding a BOS (the chat template writes it)."""
        if not texts:
            return []
        batch = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            Encoded(ids, [start for start, _ in offsets])
            for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def prefix_ids(self, text: str, encoded: Encoded) -> list[int] | None:
        """Return the ids of the tokens inside the assistant prefix of `text`; None if `text` does not end with it.

        A token that crosses the start of the prefix belongs to the user's text and is excluded.
        """
        if not text.endswith(self.assistant_prefix):
            return None
        prefix_start = len(text) - len(self.assistant_prefix)
        return [token for token, start in zip(encoded.ids, encoded.starts, strict=True) if start >= prefix_start]

    def _find_marks(self) -> list[str]:
        template = self._tokenizer.chat_template
        written = [*template.values()] if isinstance(template, dict) else [str(template)]
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        system = {"role": "system", "content": "."}
        for messages in ([question], [question, answer, question], [question, answer], [system, question]):
            # A template may refuse a system turn or a final answer.
            with contextlib.suppress(UserError):
                written.append(self._apply(messages, True, thinking=self.enable_thinking))
        special = [token for token in self._tokenizer.all_special_tokens if token.strip()]
        added = [token for token in self._tokenizer.get_added_vocab() if token.strip() and token not in _THOUGHT]
        return [*special, *(t for t in added if t not in special and any(t in text for text in written))]

    def _find_assistant_prefix(self) -> str:
        probes = ("first probe 1", "second probe 2")
        added = []
        for probe in probes:
            opened, closed = (self._render(probe, flag, thinking=self.enable_thinking) for flag in (True, False))
            added.append(opened[len(closed) :] if opened.startswith(closed) else "")
        if added[0] and added[0] == added[1]:
            return added[0]
        after = [self._render(probe, True, thinking=self.enable_thinking).rpartition(probe)[2] for probe in probes]
        if after[0] and after[0] == after[1]:
            return after[0]
        raise UserError(
            "chat template",
            got=f"prompts that end in {after[0]!r} and {after[1]!r}",
            need="one assistant prefix in which every prompt ends",
            fix="use a chat template that supports add_generation_prompt",
        )

    def _render(self, user_turn: str, add_generation_prompt: bool, *, thinking: bool) -> str:
        messages = [{"role": "user", "content": user_turn}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        return self._apply(messages, add_generation_prompt, thinking=thinking)

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool, *, thinking: bool) -> str:
        import jinja2

        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=thinking
            )
        # A template is a program and may raise errors that are not from jinja2.
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise UserError(
                "chat template",
                got=f"{type(error).__name__}: {error}",
                need="a template that renders a user turn" + ("" if self._system is None else " after a system turn"),
                fix="fix the template" + ("" if self._system is None else " or set data.templates.system=null"),
            ) from None
        return str(rendered)
