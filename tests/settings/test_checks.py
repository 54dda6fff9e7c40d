import pytest

from nemo_popsd.errors import UserError
from nemo_popsd.settings.checks import one_of, pattern, shown


def test_a_message_has_the_form_got_need_set() -> None:
    with pytest.raises(UserError) as caught:
        one_of("a.b", "z", ("x", "y"))
    assert str(caught.value) == "configuration: got a.b='z'; need one of x, y; set a.b"


def test_a_long_value_is_shortened_to_one_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) < 200
    assert "1,000,002 characters" in shown("x" * 10**6)


def test_patterns_have_one_group() -> None:
    for good in (r"(\d+)", "(?:a)(b)", None):
        pattern("n", good)
    for bad in ("(", "a", "(a)(b)", "(" * 5000 + ")" * 5000, "(a{99999999999999999999})"):
        with pytest.raises(UserError, match="set n"):
            pattern("n", bad)
