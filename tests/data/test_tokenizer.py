import json
from pathlib import Path

import pytest

from nemo_popsd.data.tokenizer import load_tokenizer, read_generation_config, stop_token_ids
from nemo_popsd.errors import UserError
from tests.data import small


def test_saved_tokenizer_is_loaded_with_its_template(tmp_path: Path) -> None:
    small.tokenizer().save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    assert loaded.is_fast
    assert loaded.chat_template == small.THINKING


def test_missing_directory_and_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student\.source='.*absent', no directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"with config\.json; need a directory with tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    small.tokenizer().save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="need a directory with"):
        load_tokenizer(tmp_path)


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
def test_stop_tokens_that_are_no_token_ids(wrong: object) -> None:
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
