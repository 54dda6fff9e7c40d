import pytest
from omegaconf import OmegaConf

from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.config import EvaluationConfig


def test_structured_configuration_round_trip() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(EvaluationConfig), {"problems": 8, "markers": ["Wait"]})
    made = OmegaConf.to_object(merged)
    assert isinstance(made, EvaluationConfig)
    assert (made.problems, made.markers) == (8, ["Wait"])


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
    ],
)
def test_bad_values_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"set evaluation.{next(iter(changes))}$"):
        EvaluationConfig(**changes)  # type: ignore[arg-type]
