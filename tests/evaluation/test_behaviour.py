import math
import random
import time

import pytest

from nemo_popsd.evaluation.behaviour import (
    LOOP_WORDS,
    REPEATED_WORDS,
    closes_thinking,
    ends_in_loop,
    reflection_segments,
    repeated_share,
    words_of,
)

MARKERS = ["Wait", "Maybe", "Hmm", "Let me think"]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", 0),
        ("So 5. Then 6.", 0),
        ("Wait. Maybe 7? No, it is 8. Hmm.", 2),
        ("Wait, 3.5 is too much. So 3.", 1),
        ("So 5.\nWait\nMaybe 6\nSo 6\nHmm", 2),
        ("Wait.\n\n\nMaybe.", 1),  # blank lines are not sentences
        ("Waiting. wait.", 0),
        ("Let me\nthink", 0),  # a line break ends a sentence
        ("Hmm... Maybe… So 5. Wait!", 2),
    ],
)
def test_reflection_segments(text: str, segments: int) -> None:
    assert reflection_segments(text, MARKERS) == segments


def test_thinking_is_closed_by_its_tag() -> None:
    assert closes_thinking("so 5</think>\n\n5", "</think>")
    assert not closes_thinking("<think>so 5", "</think>")


def test_words() -> None:
    assert words_of("Let's see: 3.5+x_1 = 哈哈a ") == [
        *("Let", "'", "s", "see", ":", "3", ".", "5", "+", "x_1", "=", "哈", "哈", "a"),
    ]


def test_repeated_share_by_hand() -> None:
    distinct = [str(number) for number in range(40)]
    assert repeated_share(distinct) == 0.0
    twice = distinct + distinct
    # Sequences that start and end in the second copy occurred before.
    sequences = len(twice) - REPEATED_WORDS + 1
    assert repeated_share(twice) == pytest.approx((40 - REPEATED_WORDS + 1) / sequences)
    assert repeated_share(["a"] * REPEATED_WORDS) == 0.0
    assert repeated_share(["a"] * (REPEATED_WORDS + 9)) == pytest.approx(9 / 10)
    assert repeated_share([]) == 0.0


@pytest.mark.parametrize("turn", [1, 2, 7, 16, 100])
def test_loops_at_the_end_are_found(turn: int) -> None:
    lead = [f"w{number}" for number in range(50)]
    period = [f"p{number}" for number in range(turn)]
    times = max(4, math.ceil(LOOP_WORDS / turn))
    assert ends_in_loop(lead + period * times)
    assert ends_in_loop(lead + period[1:] + period * times + period[:1])  # it may be truncated anywhere
    assert not ends_in_loop(lead + period * times + ["end"])
    if turn >= 16:
        assert not ends_in_loop(lead + period * 3)


def test_careful_reasoning_is_not_a_loop() -> None:
    steps = " ".join(f"Check {n}: {n} + 3 = {n + 3}, so b = {n + 3}." for n in range(60))
    assert not ends_in_loop(words_of(steps))
    assert repeated_share(words_of(steps)) == 0.0
    assert not ends_in_loop(["a"] * (LOOP_WORDS - 1))
    assert ends_in_loop(["a"] * LOOP_WORDS)


def test_long_responses_take_a_moment() -> None:
    generator = random.Random(0)
    words = [str(generator.randrange(50)) for _ in range(40_000)]
    start = time.process_time()
    assert not ends_in_loop(words)
    assert repeated_share(words) < 0.01
    assert ends_in_loop(["a", "b"] * 20_000)
    assert time.process_time() - start < 3
