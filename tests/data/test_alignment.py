import pytest
import torch

from nemo_popsd.data.alignment import append_response, response_positions

LIMIT = 6  # longest response in these tests


def test_positions_by_hand() -> None:
    assert response_positions(4, 3) == slice(3, 6)


@pytest.mark.parametrize("response_length", [1, 2, 5, LIMIT])
@pytest.mark.parametrize("prompt_lengths", [(3, 9, 5), (1, 1, 1), (7, 20, 1)])
def test_each_response_token_is_predicted_from_the_text_before_it(
    prompt_lengths: tuple[int, int, int], response_length: int
) -> None:
    response = list(range(1000, 1000 + response_length))
    for prompt_length in prompt_lengths:
        context = append_response(range(prompt_length), response)
        # A causal model with perfect memory: the state at i contains tokens 0..i and predicts token i + 1.
        predicted_by_state = torch.tensor([*context[1:], -1])
        assert predicted_by_state[response_positions(prompt_length, response_length)].tolist() == response


def test_first_token_comes_from_the_last_prompt_position() -> None:
    assert response_positions(10, 1) == slice(9, 10)


def test_empty_response_has_no_positions() -> None:
    context = append_response([1, 2, 3], [])
    assert context == [1, 2, 3]
    assert torch.tensor(context)[response_positions(3, 0)].tolist() == []


def test_a_truncated_response_has_as_many_positions_as_tokens() -> None:
    positions = response_positions(3, LIMIT)
    assert len(range(100)[positions]) == LIMIT
    assert positions.stop == 3 + LIMIT - 1


def test_response_ids_are_appended_unchanged() -> None:
    assert append_response([5], [7, 7, 0]) == [5, 7, 7, 0]


@pytest.mark.parametrize(("prompt", "response"), [(0, 1), (-1, 2), (3, -1)])
def test_impossible_lengths_are_refused(prompt: int, response: int) -> None:
    with pytest.raises(ValueError, match="prompt_length"):
        response_positions(prompt, response)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        append_response([], [1])
