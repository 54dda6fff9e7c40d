"""Loading a tokenizer from local files, and the tokens that end a response."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import read_strict_json, unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer and its chat template."""
_GENERIC = "PreTrainedTokenizerFast"


def load_tokenizer(path: str | Path, *, setting: str = "student.source") -> PreTrainedTokenizerBase:
    """Load the fast tokenizer saved in directory `path`, without downloads and without running code from `path`.

    Args:
        path: directory in the Hugging Face layout, as transformers 4 or 5 writes it.
        setting: dotted name of `path` in the configuration, for messages.

    Raises:
        UserError: the directory does not exist, or has no tokenizer that can be loaded.
    """
    directory = Path(path).expanduser()
    need = "a directory with tokenizer.json and tokenizer_config.json"
    if not directory.is_dir():
        raise UserError("tokenizer", got=f"{setting}={str(path)!r}, not a directory", need=need, fix=f"set {setting}")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        entries = ", ".join(sorted(entry.name for entry in directory.iterdir())[:20]) or "no files"
        raise UserError("tokenizer", got=f"{setting}={str(path)!r} with {entries}", need=need, fix=f"set {setting}")
    for name in TOKENIZER_FILES:
        file = directory / name
        if (file.exists() or file.is_symlink()) and (reason := unreadable(file)):
            raise UserError(str(directory), got=f"{name}, which {reason}", need=need, fix="download the file again")
    content: dict[str, object] = {}
    if (directory / TOKENIZER_CONFIG).is_file():
        content = read_strict_json(directory / TOKENIZER_CONFIG, str(directory), fix="repair the file")
    translated = for_transformers_4(content, str(directory))
    if translated == content:
        return _load(directory, directory, need)
    with tempfile.TemporaryDirectory(prefix="nemo_popsd_") as temporary:
        for name in TOKENIZER_FILES:
            if name != TOKENIZER_CONFIG and (directory / name).is_file():
                (Path(temporary) / name).symlink_to((directory / name).absolute())
        (Path(temporary) / TOKENIZER_CONFIG).write_text(json.dumps(translated), encoding="utf-8")
        tokenizer = _load(Path(temporary), directory, need)
    tokenizer.name_or_path = str(directory)
    return tokenizer


def for_transformers_4(content: Mapping[str, Any], what: str) -> dict[str, object]:
    """Convert ``tokenizer_config.json`` to a form that both transformers 4 and 5 read.

    Transformers 5 writes a list of special tokens under a key that contains an object in transformers 4, and the name
    of a new class. Tokenisation itself depends only on ``tokenizer.json``.

    Args:
        content: content of the file.
        what: owner of the file, for the message.

    Raises:
        UserError: the tokenizer does not use ``tokenizer.json``.
    """
    translated = dict(content)
    extra = content.get("extra_special_tokens")
    if isinstance(extra, list):
        older = content.get("additional_special_tokens") or []
        translated["additional_special_tokens"] = [*older, *(token for token in extra if token not in older)]
        del translated["extra_special_tokens"]
    backend = content.get("backend")
    if backend is not None and backend != "tokenizers":
        raise UserError(
            what,
            got=f"{TOKENIZER_CONFIG} of transformers 5 with backend={backend!r}",
            need="backend='tokenizers', which uses tokenizer.json",
            fix="save the tokenizer as a fast one with transformers 5",
        )
    if backend is not None or content.get("tokenizer_class") == "TokenizersBackend":
        translated.pop("backend", None)
        translated["tokenizer_class"] = _GENERIC
    return translated


def _load(source: Path, directory: Path, need: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source), local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except Exception as error:
        # For a damaged file, the tokenizer libraries raise bare Exception, KeyError, OSError and others.
        reason = " ".join(f"{type(error).__name__}: {error}".replace(str(source), str(directory)).split())
        raise UserError(str(directory), got=reason, need=need, fix="repair or download the file again") from None
    return tokenizer


def read_generation_config(path: str | Path) -> dict[str, object] | None:
    """Return the content of ``generation_config.json`` in directory `path`; None if there is none.

    Raises:
        UserError: the file is not a JSON object.
    """
    file = Path(path).expanduser() / "generation_config.json"
    if not file.exists():
        return None
    content: dict[str, object] = read_strict_json(file, str(file), fix="repair the file")
    return content


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, object] | None = None
) -> tuple[int, ...]:
    """Return the token ids that end a response, ascending: those of the tokenizer and of the generation configuration.

    Chat models often stop at either of two tokens, and the tokenizer names only one of them.

    Args:
        tokenizer: its ``eos_token_id`` may be None.
        generation_config: its ``eos_token_id`` may be absent, None, a number or a list of numbers.

    Raises:
        UserError: there is no stop token, so every response would run to its limit; or a value is not a token id.
    """
    candidates: list[Any] = [tokenizer.eos_token_id]
    if generation_config is not None:
        configured = generation_config.get("eos_token_id")
        candidates += configured if isinstance(configured, (list, tuple)) else [configured]
    ids = {token for token in candidates if token is not None}
    invalid = [token for token in ids if type(token) is not int or token < 0]
    if invalid or not ids:
        raise UserError(
            "stop tokens",
            got=f"eos_token_id {invalid[0]!r}" if invalid else "no eos_token_id",
            need="at least one token id at which a response ends",
            fix="set eos_token in tokenizer_config.json or eos_token_id in generation_config.json",
        )
    return tuple(sorted(ids))


def refuse_tokens_beyond(
    tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, object] | None, vocab_size: int
) -> None:
    """Refuse special tokens for which the model has no embedding.

    Args:
        tokenizer: its eos and pad tokens are checked.
        generation_config: its ``eos_token_id`` is checked.
        vocab_size: number of embeddings.

    Raises:
        UserError: a token has no embedding; the message names the token, its id and its source.
    """
    special = [
        ("eos_token of the tokenizer", tokenizer.eos_token_id),
        ("pad_token of the tokenizer", tokenizer.pad_token_id),
    ]
    configured = (generation_config or {}).get("eos_token_id")
    for token_id in configured if isinstance(configured, list) else [configured]:
        special.append(("eos_token_id of generation_config.json", token_id))
    for name, token_id in special:
        if type(token_id) is int and token_id >= vocab_size:
            raise UserError(
                "special tokens",
                got=f"{name} with id {token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r})",
                need=f"ids below the model's vocab_size={vocab_size} (config.json)",
                fix="set it to a token that has an embedding in the model",
            )
