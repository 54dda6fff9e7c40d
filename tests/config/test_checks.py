import math
from collections.abc import Callable

import pytest

from nemo_popsd.config.checks import above, at_least, fraction, one_of, pattern
from nemo_popsd.errors import UserError


def test_message_says_got_need_set() -> None:
    with pytest.raises(UserError) as caught:
        one_of("a.b", "z", ("x", "y"))
    assert str(caught.value) == "configuration: got a.b='z'; need one of x, y; set a.b"


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (lambda v: at_least("n", v, 1), [1, 1.5, None], [0, -1, math.nan]),
        (lambda v: above("n", v, 0), [1e-9, None], [0, -1, math.nan]),
        (lambda v: fraction("n", v), [0, 0.5, 1, None], [-0.1, 1.1, math.nan]),
        (lambda v: fraction("n", v, allow_zero=False), [1, 1e-9], [0, math.nan]),
        (lambda v: fraction("n", v, allow_one=False), [0, 0.999], [1]),
        (lambda v: pattern("n", v), [r"(\d+)", "(?:a)(b)", None], ["(", "a", "(a)(b)"]),
    ],
)
def test_bounds(check: Callable[[object], None], good: list[object], bad: list[object]) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(UserError, match="set n"):
            check(value)
