import pytest

from nemo_popsd.evaluation.markers import DEFAULT_MARKERS, count_markers


def test_every_default_marker_is_counted_once() -> None:
    text = "Wait, Maybe. Perhaps! Check: Let me think; Hmm... Alternatively"
    assert count_markers(text) == dict.fromkeys(DEFAULT_MARKERS, 1)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Wait", 1),
        ("Wait, wait. WAIT", 1),
        ("Waiting Waiter Await Wait_1 Wait2 éWait", 0),
        ("**Wait**\nWait-Wait", 3),
        ("", 0),
    ],
)
def test_word_boundaries_and_case(text: str, count: int) -> None:
    assert count_markers(text, ["Wait"]) == {"Wait": count}


def test_phrases_span_any_white_space() -> None:
    assert count_markers("Let me think. Let  me\nthink, Let me thinking", ["Let me think"]) == {"Let me think": 2}


def test_markers_are_literal_and_counted_independently() -> None:
    assert count_markers("a.c abc Let me think", ["a.c", "Let me", "Let me think"]) == {
        "a.c": 1,
        "Let me": 1,
        "Let me think": 1,
    }
