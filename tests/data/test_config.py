import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from nemo_popsd.data.config import DataConfig, SourceConfig
from nemo_popsd.errors import UserError


def test_structured_configuration_round_trip() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), {"train": {"columns": {"reference": "answer"}}})
    made = OmegaConf.to_object(merged)
    assert isinstance(made, DataConfig)
    assert made.train.columns.reference == "answer"


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(OmegaConf.structured(DataConfig), {"train": {"columns": {"referense": "answer"}}})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"long_references": "cut"}, "data.long_references='cut'"),
        ({"overlong_rows": "truncate"}, "data.overlong_rows='truncate'"),
        ({"malformed_rows": "drop"}, "data.malformed_rows='drop'"),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens=0"),
        ({"max_reference_tokens": 0}, "data.max_reference_tokens=0"),
    ],
)
def test_bad_values_are_named(changes: dict[str, object], name: str) -> None:
    with pytest.raises(UserError) as caught:
        DataConfig(**changes)  # type: ignore[arg-type]
    assert caught.value.got == name


@pytest.mark.parametrize("section", ["train", "validation"])
@pytest.mark.parametrize("changes", [{"answer_pattern": "("}, {"answer_pattern": "x"}, {"limit": 0}])
def test_a_bad_source_is_named_with_its_section(section: str, changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"set data\.{section}\.{next(iter(changes))}$"):
        DataConfig(**{section: SourceConfig(**changes)})  # type: ignore[arg-type]


def test_further_paths_need_a_first_one() -> None:
    with pytest.raises(UserError, match=r"data\.train\.more_paths without data\.train\.path"):
        DataConfig(train=SourceConfig(more_paths=["b.jsonl"]))
