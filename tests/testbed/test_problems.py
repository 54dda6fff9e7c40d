"""The problem generator: an evaluator that shares no code with it checks every line of arithmetic."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest

from nemo_popsd.testbed.problems import (
    FAMILIES,
    HARDER,
    Difficulty,
    Problem,
    balanced,
    drill,
    problems,
    records,
    response,
    split_of,
    terse_thoughts,
    thoughtful_thoughts,
)

SPLITS = ("pretraining", "train", "validation")
_EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def evaluate(x: int, op: str, y: int) -> int:
    return {"+": x + y, "-": x - y, "*": x * y}[op] % 100


CHAINS = Difficulty(families=("chain",))
"""The problems whose text the evaluator reads."""


def solve(question: str) -> dict[str, int]:
    """The values of all variables of a chain, from the text of the question alone."""
    match = re.fullmatch(r"Let (.+), all modulo 100\. Find ([a-i])\. Version: (?:blue|red)\.", question)
    assert match
    values: dict[str, int] = {}
    for definition in match[1].split(", "):
        name, expression = definition.split(" = ")
        parts = expression.split(" ")
        terms = [values[p] if p.isalpha() else int(p) for p in parts[::2]]
        values[name] = terms[0] if len(parts) == 1 else evaluate(terms[0], parts[1], terms[1])
    assert list(values)[-1] == match[2]
    return values


def drawn(split: str, count: int = 300, seed: int = 3) -> list[tuple[Problem, str]]:
    return [(p, thoughtful_thoughts(p, rng)) for p, rng in islice(problems(split, seed, CHAINS), count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_references_are_right(split: str) -> None:
    for problem, _ in drawn(split):
        values = solve(problem.question)
        assert problem.answer == str(list(values.values())[-1])
        listed, answer = re.fullmatch(r"(.+)\. Answer (\d+)\.", problem.reference).groups()  # type: ignore[union-attr]
        pairs = [part.split(f" {problem.version} ") for part in listed.split(", ") if f" {problem.version} " in part]
        assert [(name, int(value)) for name, value in pairs] == list(values.items())[1:]
        assert answer == problem.answer


def test_the_question_names_the_version_of_the_reference_that_applies() -> None:
    versions = []
    for problem, _ in islice(problems("train", 3), 200):
        task, version = re.fullmatch(r"(.+) Version: (blue|red)\.", problem.question).groups()  # type: ignore[union-attr]
        values, answer = re.fullmatch(r"(.+)\. Answer (\d+)\.", problem.reference).groups()  # type: ignore[union-attr]
        listed = [part.split(" ") for part in values.split(", ")]
        assert [(n, int(v)) for n, of, v in listed if of == version] == [(s.name, s.value) for s in problem.steps]
        for (name, other, value), step in zip((p for p in listed if p[1] != version), problem.steps, strict=True):
            assert (name, {other, version}) == (step.name, {"blue", "red"})
            near = divmod(int(value), 10), divmod(step.value, 10)
            assert sum(x == y for x, y in zip(*near, strict=True)) == 1, "one digit is right"
        assert (task, answer) == (problem.task, problem.answer)
        versions.append(version)
    assert 60 < versions.count("blue") < 140


def test_every_worked_line_is_right_or_corrected() -> None:
    mistakes = 0
    for problem, thoughts in drawn("pretraining"):
        values = solve(problem.question)
        guess: tuple[str, int] | None = None
        final: dict[str, int] = {}
        for line in thoughts.splitlines():
            if line.startswith(("Check ", "Wait, check ")):
                equation, partial = line.split("heck ")[1].split(": ")
                x, op, y = equation.split(" ")
                equations = _EQUATION.findall(partial)
                assert len(equations) == (3 if op == "*" else 2)
                for left, sign, right, result in equations:
                    assert evaluate(int(left), sign, int(right)) == int(result), line
                assert guess is not None
                assert int(equations[-1][-1]) == evaluate(int(x), op, int(y)) == values[guess[0]]
                continue
            word, name, value = re.fullmatch(r"(\w+) ([a-i]) = (\d+)", line).groups()  # type: ignore[union-attr]
            if word in ("Maybe", "Perhaps"):
                guess = (name, int(value))
            else:
                assert int(value) == values[name], line
                if word == "Wait":
                    assert guess is not None
                    assert guess[1] != int(value)
                    mistakes += 1
                elif word == "So":
                    assert guess == (name, int(value))
                else:
                    assert word == "Then"
                    guess = (name, int(value))
                final[name] = int(value)
        assert final == {name: v for name, v in values.items() if name != "a"}
    assert mistakes > 30, "the self-corrections are part of what the model learns"


def test_terse_solution_is_right_and_shorter() -> None:
    for problem, thoughts in drawn("train", 100):
        terse = terse_thoughts(problem)
        values = solve(problem.question)
        assert re.findall(r"Then ([a-i]) = (\d+)\n", terse) == [(n, str(v)) for n, v in values.items() if n != "a"]
        assert len(terse) <= len(thoughts)


def test_drills_are_right() -> None:
    lines = drill(random.Random("drill"), lines=400).splitlines()
    assert len(lines) == 400
    for line in lines:
        x, op, y, value = re.fullmatch(_EQUATION, line).groups()  # type: ignore[union-attr]
        assert evaluate(int(x), op, int(y)) == int(value)


def test_responses_end_in_the_box() -> None:
    problem, thoughts = drawn("train", 1)[0]
    assert response(thoughts, problem.answer) == f"<think>\n{thoughts}</think>\n\n\\boxed{{{problem.answer}}}"
    assert "<think>" not in response(thoughts, problem.answer, thinking=False)


def test_splits_are_disjoint_for_any_seeds() -> None:
    tasks = {
        (split, seed): {problem.task for problem in balanced(split, 400, seed)}  # type: ignore[arg-type]
        for split in SPLITS
        for seed in (7, 8)
    }
    for (split, _), texts in tasks.items():
        assert len(texts) == 400
        assert {split_of(text) for text in texts} == {split}
    assert not tasks["train", 7] & tasks["validation", 7]
    assert not tasks["train", 7] & tasks["pretraining", 8]


def test_a_set_has_as_many_problems_of_each_family_and_can_skip_those_of_another() -> None:
    first, later = balanced("train", 40, 7), balanced("train", 40, 7, skip=400)
    for chosen in (first, later):
        families = [problem.family for problem in chosen]
        assert {families.count(family) for family in FAMILIES} == {10}
    assert not {problem.task for problem in first} & {problem.task for problem in later}
    assert len(balanced("train", 6, 7)) == 6
    assert balanced("train", 4, 7, CHAINS)[0].family == "chain"


def test_rows_do_not_depend_on_the_process_or_the_hash_seed() -> None:
    code = (
        "import json; from nemo_popsd.testbed.problems import *; from itertools import islice;"
        "print(json.dumps([[p.question, p.reference, thoughtful_thoughts(p, r)]"
        " for p, r in islice(problems('train', 5, Difficulty(families=('chain',))), 40)]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    here = [[p.question, p.reference, t] for p, t in drawn("train", 40, seed=5)]
    assert json.loads(outputs[0]) == here


def test_rows_have_the_four_fields() -> None:
    chosen = balanced("validation", 3, 7)
    rows = records("some", chosen)
    assert all(list(row) == ["id", "question", "reference", "answer"] for row in rows)
    assert [row["id"] for row in rows] == [f"some/{problem.family}/{n:04d}" for n, problem in enumerate(chosen)]


HARD = Difficulty(longest=8, largest=20, largest_factor=9, families=HARDER)
"""Problems of the harder families."""


def values_of_text(task: str) -> list[int]:
    """The value after each step of a problem of the harder families, from its text alone."""
    if task.startswith("Let"):
        known: dict[str, int] = {}
        definitions, asked = re.fullmatch(r"Let (.+), all modulo 100\. Find (\w+)\.", task).groups()  # type: ignore[union-attr]
        for definition in definitions.split(", "):
            name, _, expression = definition.partition(" = ")
            terms = [known[word] if word.isalpha() else word for word in expression.split(" ")]
            known[name] = int(terms[0]) if len(terms) == 1 else evaluate(int(terms[0]), str(terms[1]), int(terms[2]))
        assert list(known)[-1] == asked
        return list(known.values())[1:]
    place, *rules, count = re.fullmatch(
        r"A ring has 100 places\. Start at place (\d+)\. From an even place go (\d+) (on|back), from an odd place go "
        r"(\d+) (on|back)\. Which place is it after (\d+) moves\?",
        task,
    ).groups()  # type: ignore[union-attr]
    moves = [int(rules[i]) * (1 if rules[i + 1] == "on" else -1) for i in (0, 2)]
    found = [int(place)]
    for _ in range(int(count)):
        found.append((found[-1] + moves[found[-1] % 2]) % 100)
    return found[1:]


@pytest.mark.parametrize("difficulty", [HARD, replace(HARD, shortest=32, longest=40)], ids=["short", "long"])
def test_harder_problems_are_solved_by_their_text(difficulty: Difficulty) -> None:
    borrowed = 0
    for problem, rng in islice(problems("train", 5, difficulty), 120):
        values = values_of_text(problem.task)
        assert [step.value for step in problem.steps] == values
        assert problem.answer == str(values[-1])
        assert re.findall(r"Then (\w+) = (\d+)\n", terse_thoughts(problem)) == [
            (step.name, str(value)) for step, value in zip(problem.steps, values, strict=True)
        ]
        listed = re.findall(rf"(\w+) {problem.version} (\d+)", problem.reference)
        assert [int(value) for _, value in listed] == values
        for left, sign, right, result in _EQUATION.findall(thoughtful_thoughts(problem, rng, difficulty)):
            assert evaluate(int(left), sign, int(right)) == int(result)
        borrowed += sum(step.right != "" for step in problem.steps)
    assert borrowed > 120, "steps of two variables"


def test_a_long_problem_has_distinct_names() -> None:
    problem = balanced("train", 1, 7, replace(HARD, shortest=40, longest=40))[0]
    assert len({step.name for step in problem.steps}) == 40
