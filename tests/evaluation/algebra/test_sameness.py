"""Comparison of answers on pairs in both directions, and on references of GSM8K."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_popsd.evaluation.algebra.sameness import same_answer
from nemo_popsd.evaluation.equivalence import AnswerVerifier

PAIRS = [json.loads(line) for line in Path(__file__).with_name("answer_pairs.jsonl").read_text().splitlines()]
BEYOND_RULES = ("library", "hostile", "empty")
GSM8K = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def verifier() -> Iterator[AnswerVerifier]:
    with AnswerVerifier(seconds=20) as made:
        yield made


def test_the_pairs_cover_both_directions() -> None:
    assert len(PAIRS) >= 500
    assert len({(pair["expected"], pair["predicted"]) for pair in PAIRS}) == len(PAIRS)
    assert 200 <= sum(pair["equal"] for pair in PAIRS) <= len(PAIRS) - 200


@pytest.mark.parametrize("kind", dict.fromkeys(pair["kind"] for pair in PAIRS))
def test_pairs(kind: str, verifier: AnswerVerifier) -> None:
    pairs = [pair for pair in PAIRS if pair["kind"] == kind]
    wrong = [pair for pair in pairs if verifier.compare(pair["predicted"], pair["expected"]).correct != pair["equal"]]
    assert wrong == []


def test_an_answer_equals_itself() -> None:
    for pair in PAIRS:
        if pair["kind"] not in ("empty", "library"):
            assert same_answer(pair["expected"], pair["expected"]), pair["expected"]


def test_a_different_digit_is_a_different_answer() -> None:
    """Every digit of an answer matters, except in the first sides of chains, repeated elements and parity."""
    excepted = {"S = 2+3 = 5", r"\{1,1,2\}", "(-1)^{n+1}"}
    texts = {pair[side] for pair in PAIRS for side in ("expected", "predicted") if pair["kind"] not in BEYOND_RULES}
    wrong = []
    for text in sorted(texts - excepted):
        for place, digit in enumerate(text):
            if digit in "0123456789":
                other = f"{text[:place]}{(int(digit) + 1) % 10}{text[place + 1 :]}"
                if same_answer(other, text):
                    wrong.append((text, other))
    assert wrong == []


FORMS = (
    "{1}",
    "{0}",
    "${0}",
    r"\${0}",
    "{0}.00",
    "{0}.",
    "{0} dollars",
    r"{0}\text{{ eggs}}",
    "x = {0}",
    r"\text{{{0}}}",
    "{1}",
)


def test_references_of_gsm8k() -> None:
    """Each reference is correct in every usual form, and wrong for every row whose reference is a different number."""
    if not GSM8K.is_dir():
        pytest.skip("no references of GSM8K at ../shared/data")
    answers = []
    for name in ("gsm8k_test_200.jsonl", "gsm8k_train_1k.jsonl"):
        for line in (GSM8K / name).read_text(encoding="utf-8").splitlines():
            answers.append(json.loads(line)["answer"].rpartition("####")[2].strip())
    assert len(answers) == 1200
    for place, answer in enumerate(answers):
        plain = answer.replace(",", "")
        form = FORMS[place % len(FORMS)].format(plain, f"{int(plain):,}")
        assert same_answer(form, answer), (form, answer)
        other = answers[place - 1]
        assert same_answer(form, other) is (other.replace(",", "") == plain), (form, other)


def test_adversarial_answers_are_compared_quickly() -> None:
    answers = [
        "9^{9^{9^{9}}}",
        "9" * 199,
        "9" * 5000,
        "(" * 500,
        "-" * 900,
        "2500!" + "+2500!" * 150,
        "+".join(f"x^{{{3000 - n}}}" for n in range(80)),
        r"\frac{1}{" * 60 + "2" + "}" * 60,
        r"\sqrt{" * 60 + "2" + "}" * 60,
        r"\pm 1" * 100,
        ",".join(["1"] * 450),
        ",".join(f"x_{n}" for n in range(60)),
        r"\{" * 200,
        "e^{e^{e^{e^{e^e}}}}",
        r"\sin(10^{1000})",
        r"\arctan(e^{50})^{e^{50}}",
        r"\sqrt[1000]{" + "9" * 190 + "}",
        r"\lfloor e^{10000}\rfloor",
        r"\text{" * 50 + "a" + "}" * 50,
        "1e1000*1e1000*" * 30 + "1",
        r"\begin{pmatrix}" + "1&" * 150 + "1" + r"\end{pmatrix}",
    ]
    began = time.process_time()
    for answer in answers:
        same_answer(answer, "5")
        same_answer("x", answer)
        same_answer(answer + " ", "1+" + answer)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("texts_tried", [100, pytest.param(800, marks=pytest.mark.slow)])
def test_no_text_raises(texts_tried: int) -> None:
    drawn = random.Random(20)
    texts = [pair[side] for pair in PAIRS for side in ("expected", "predicted")]
    pieces = [
        *"{}()[]|^_!%$&,;:=<>+-/*'\\ ",
        "\\frac",
        "\\sqrt",
        "\\text{",
        "\\begin{pmatrix}",
        "\\circ",
        "\\cup",
        "9" * 40,
    ]
    for _ in range(texts_tried):
        text = drawn.choice(texts)
        for _ in range(drawn.randrange(1, 6)):
            place = drawn.randrange(len(text) + 1)
            text = text[:place] + drawn.choice(pieces) + text[place + drawn.randrange(3) :]
        same_answer(text, drawn.choice(texts))
        same_answer(drawn.choice(texts), text)
