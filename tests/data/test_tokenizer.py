import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.data.tokenizer import (
    for_transformers_4,
    load_tokenizer,
    read_generation_config,
    refuse_tokens_beyond,
    stop_token_ids,
)
from nemo_popsd.errors import UserError
from tests.data import small


def test_saved_tokenizer_is_loaded_with_its_template(tmp_path: Path) -> None:
    small.tokenizer().save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    assert loaded.is_fast
    assert loaded.chat_template == small.THINKING


def test_missing_directory_and_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student\.source='.*absent', not a directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"with config\.json; need a directory with tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    small.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="need a directory with"):
        load_tokenizer(tmp_path)


def _like_5(folder: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A tokenizer's files as transformers 5 writes them: fewer files and fewer keys."""
    small.tokenizer().save_pretrained(str(folder))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    template = content.pop("chat_template", None)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    content.pop("added_tokens_decoder", None)
    extra = content.pop("additional_special_tokens", None) or small.SPECIAL[1:]  # transformers 4 wrote the former
    content.update(backend="tokenizers", tokenizer_class="TokenizersBackend", is_local=True, extra_special_tokens=extra)
    change(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        lambda content: content.update(tokenizer_class="PreTrainedTokenizerFast"),
        lambda content: content.update(tokenizer_class="Qwen2Tokenizer"),
        lambda content: content.pop("backend"),
        lambda content: content.pop("extra_special_tokens"),
    ],
    ids=["as it is", "generic class", "class of a model", "no backend", "no further tokens"],
)
def test_the_files_of_transformers_5_are_read(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = _like_5(tmp_path, change)
    loaded, expected = load_tokenizer(tmp_path), small.tokenizer()
    text = "<user>2+2?<end><assistant>Ünï 4"
    assert loaded(text)["input_ids"] == expected(text)["input_ids"]
    assert loaded.get_vocab() == expected.get_vocab()
    assert loaded.eos_token == expected.eos_token
    assert loaded.chat_template == expected.chat_template
    if "extra_special_tokens" in content:
        assert set(loaded.all_special_tokens) == set(expected.all_special_tokens)
    assert loaded.name_or_path == str(tmp_path)
    # The tokenizer that is saved for other programs equals the one that was loaded.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(for_transformers_4(content, "model")))
    again = load_tokenizer(tmp_path)
    assert again.all_special_tokens == loaded.all_special_tokens
    assert again(text)["input_ids"] == loaded(text)["input_ids"]


def test_a_tokenizer_of_transformers_5_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    _like_5(tmp_path, lambda content: content.update(backend="sentencepiece"))
    with pytest.raises(UserError, match=r"of transformers 5 with backend='sentencepiece'; need .*save the tokenizer"):
        load_tokenizer(tmp_path)


def test_the_files_of_transformers_4_are_unchanged(tmp_path: Path) -> None:
    small.tokenizer().save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if "backend" in content:  # transformers 5 is installed
        content = for_transformers_4(content, "model")
        assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert for_transformers_4(content, "model") == content


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"])
def test_a_pipe_or_a_pointer_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    small.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=f"{name}, which is a git-lfs pointer"):
        load_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    if name == "tokenizer.json":
        (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=f"{name}, which is a pipe"):
        load_tokenizer(tmp_path)


def test_special_tokens_beyond_the_vocabulary_are_refused() -> None:
    tokenizer = small.tokenizer()
    size = len(tokenizer)
    refuse_tokens_beyond(tokenizer, {"eos_token_id": [1, 2]}, size)
    with pytest.raises(UserError, match=rf"eos_token_id of generation_config\.json with id {size} .*vocab_size={size}"):
        refuse_tokens_beyond(tokenizer, {"eos_token_id": [1, size]}, size)
    with pytest.raises(UserError, match=r"eos_token of the tokenizer with id 257 \('<end>'\)"):
        refuse_tokens_beyond(tokenizer, None, 257)
    tokenizer.add_tokens(["<pad>"])
    refuse_tokens_beyond(tokenizer, None, size)
    tokenizer.pad_token = "<pad>"
    with pytest.raises(UserError, match=r"pad_token of the tokenizer with id"):
        refuse_tokens_beyond(tokenizer, None, size)


def test_stop_tokens_are_those_of_both_sources() -> None:
    tokenizer = small.tokenizer()
    eos = tokenizer.eos_token_id
    assert stop_token_ids(tokenizer) == (eos,)
    assert stop_token_ids(tokenizer, {}) == (eos,)
    assert stop_token_ids(tokenizer, {"eos_token_id": None}) == (eos,)
    assert stop_token_ids(tokenizer, {"eos_token_id": 3}) == (3, eos)
    assert stop_token_ids(tokenizer, {"eos_token_id": [eos, 3, 0]}) == (0, 3, eos)
    assert stop_token_ids(small.tokenizer(eos=None), {"eos_token_id": [3]}) == (3,)


@pytest.mark.parametrize("configured", [None, {"eos_token_id": []}])
def test_no_stop_token_is_an_error(configured: dict[str, object] | None) -> None:
    with pytest.raises(UserError, match="no eos_token_id"):
        stop_token_ids(small.tokenizer(eos=None), configured)


@pytest.mark.parametrize("wrong", ["</s>", -1, [2, True]])
def test_stop_tokens_that_are_not_token_ids_are_refused(wrong: object) -> None:
    with pytest.raises(UserError, match="got eos_token_id"):
        stop_token_ids(small.tokenizer(), {"eos_token_id": wrong})


def test_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 2]}
    for damaged in ("{", "[]"):
        file.write_text(damaged)
        with pytest.raises(UserError, match="need a JSON object"):
            read_generation_config(tmp_path)
