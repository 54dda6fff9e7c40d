import pytest
from omegaconf import OmegaConf

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.config import EndpointConfig, EvaluationConfig


def test_structured_configuration_round_trip() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(EvaluationConfig), {"problems": 8, "markers": ["Wait"]})
    config = OmegaConf.to_object(merged)
    assert isinstance(config, EvaluationConfig)
    assert (config.problems, config.markers) == (8, ["Wait"])


@pytest.mark.parametrize(
    "changes",
    [
        {"problems": 0},
        {"samples_per_problem": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_response_tokens": 0},
        {"answer_pattern": "no group"},
        {"markers": ["Wait", " "]},
        {"markers": ["Wait", "Wait"]},
        {"sets": {"aime23": ""}},
        {"sets": {"a/b": "rows.jsonl"}},
        {"sets": {"..": "rows.jsonl"}},
        {"pass_k": [4, 0]},
        {"without_box": "guess"},
        {"verify_seconds": 0.0},
        {"thinking_end": ""},
        {"resamples": 99},
        {"confidence": 1.0},
    ],
)
def test_bad_values_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"set evaluation.{next(iter(changes))}$"):
        EvaluationConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": "chat"},
        {"dialect": "tgi"},
        {"concurrency": 0},
        {"timeout_seconds": 0.0},
        {"retries": -1},
    ],
)
def test_bad_endpoints_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"set evaluation.endpoint.{next(iter(changes))}$"):
        EndpointConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://h/v1", "http:///v1", "http://u:secret@h/v1", "http://h/v1?key=secret"]
)
def test_bad_addresses_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(UserError, match=r"set evaluation\.endpoint\.url") as raised:
        EndpointConfig(url=url)
    assert "secret" not in str(raised.value)
    EndpointConfig(url="https://host:8000/v1")
