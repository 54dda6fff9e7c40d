"""Loading a tokenizer from local files, and the tokens at which a response stops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_popsd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, *, setting: str = "student.source") -> PreTrainedTokenizerBase:
    """The fast tokenizer saved in directory `path`. Nothing is downloaded and no code from `path` is run.

    Args:
        path: directory in the Hugging Face layout.
        setting: dotted name of `path` in the configuration, for messages.

    Raises:
        UserError: no such directory, no tokenizer in it, or one that cannot be loaded.
    """
    directory = Path(path).expanduser()
    need = "a directory with tokenizer.json and tokenizer_config.json"
    if not directory.is_dir():
        raise UserError("tokenizer", got=f"{setting}={str(path)!r}, no directory", need=need, mend=f"set {setting}")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:20]) or "nothing"
        raise UserError("tokenizer", got=f"{setting}={str(path)!r} with {found}", need=need, mend=f"set {setting}")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except Exception as error:
        # The tokenizer libraries raise bare Exception, KeyError, OSError and more for a damaged file.
        raise UserError(str(directory), got=f"{type(error).__name__}: {error}", need=need, mend="mend it") from None
    return tokenizer


def read_generation_config(path: str | Path) -> dict[str, Any] | None:
    """The contents of ``generation_config.json`` in directory `path`; None when there is none.

    Raises:
        UserError: the file is not a JSON object.
    """
    file = Path(path).expanduser() / "generation_config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(file), got=str(error), need="a JSON object", mend="mend it") from None
    if not isinstance(content, dict):
        raise UserError(str(file), got=f"a JSON {type(content).__name__}", need="a JSON object", mend="mend it")
    return content


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Token ids that end a response, ascending: the tokenizer's and the generation configuration's together.

    A chat model often stops at either of two tokens, of which the tokenizer names one.

    Args:
        tokenizer: its ``eos_token_id`` may be None.
        generation_config: its ``eos_token_id`` may be absent, None, a number or a list of numbers.

    Raises:
        UserError: no stop token at all, so that every response would run to its limit; or one that is no token id.
    """
    found: list[Any] = [tokenizer.eos_token_id]
    if generation_config is not None:
        configured = generation_config.get("eos_token_id")
        found += configured if isinstance(configured, (list, tuple)) else [configured]
    ids = {token for token in found if token is not None}
    foreign = [token for token in ids if type(token) is not int or token < 0]
    if foreign or not ids:
        raise UserError(
            "stop tokens",
            got=f"eos_token_id {foreign[0]!r}" if foreign else "no eos_token_id",
            need="at least one token id at which a response ends",
            mend="set eos_token in tokenizer_config.json or eos_token_id in generation_config.json",
        )
    return tuple(sorted(ids))
