r"""Small verifiable problems, their terse references, and worked solutions that hesitate, check and correct.

Four families of problems (`FAMILIES`) describe the same operations modulo 100 in different words. Each question ends
with the version of the problem that it asks for::

    Let a = 37, b = a * 3, c = b - 4, d = c + 5, all modulo 100. Find d. Version: red.
    A ring has 100 places. Start at place 37, go 4 back, then 5 on, then 2 on. Which place is it? Version: blue.
    A sequence begins with 37. For the next term take the last, times 3 minus 4, modulo 100. Find term 3. Version: red.
    A shop has 37 boxes. It sells 4, multiplies its stock by 3, buys 5. How many boxes, modulo 100? Version: blue.

Two families are harder (`HARDER`) and are for larger models (`nemo_popsd.testbed.reasoner`): a step may need the value
of an earlier variable, or depends on whether the last value is even::

    Let a = 37, b = a * 3, c = b + a, d = c - b, all modulo 100. Find d. Version: red.
    A ring has 100 places. Start at place 37. From an even place go 3 on, from an odd place go 4 back. Which place is it
    after 3 moves? Version: blue.

A **thoughtful** solution sometimes hesitates ("Maybe", "Perhaps"), recomputes by digits ("Check") and corrects itself
("Wait"). Recomputing by digits is easy and guessing is hard, so checks raise the accuracy. A **terse** solution states
the values only. The **reference** has another style: a sheet of the values of two versions of the problem, each with a
near miss next to it, and the answer::

    b blue 21, b red 11, c blue 97, c red 7, d blue 15, d red 12. Answer 12.

Only the question states which version applies: together they give the solution without arithmetic, and the reference
alone gives the answer.

Everything is a pure function of (seed, split, index) and does not use `hash()`: every process draws the same problems.
A digest of its text assigns each task to one split, so the splits cannot overlap.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import Literal

MODULUS = 100
"""All values are reduced to two digits."""
NAMES = (*ascii_lowercase, *(f"a{letter}" for letter in ascii_lowercase))
"""Variable names, in order of definition."""

Family = Literal["chain", "ring", "sequence", "stock", "graph", "parity"]
FAMILIES: tuple[Family, ...] = ("chain", "ring", "sequence", "stock")
"""The families of the embedded data and model."""
HARDER: tuple[Family, ...] = ("graph", "parity")
"""Families in which a step needs more than the last value and a constant."""

Split = Literal["pretraining", "train", "validation"]
_BUCKETS: dict[Split, range] = {"validation": range(8), "train": range(8, 32), "pretraining": range(32, 256)}
_VERSIONS = ("blue", "red")
_HESITATIONS = ("Maybe", "Perhaps")
_MOVES = {"+": "on", "-": "back"}
_RULE = {"+": "plus {}", "-": "minus {}", "*": "times {}"}
_EVENTS = {"+": "buys {}", "-": "sells {}", "*": "multiplies its stock by {}"}


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Parameters of the problems and of the worked solutions."""

    shortest: int = 2
    """Fewest steps of a chain."""
    longest: int = 5
    """Most steps of a chain."""
    multiply: float = 0.35
    """Share of steps that multiply by a digit; the rest add and subtract."""
    largest: int = 5
    """Largest constant that is added or subtracted; the smallest is 2."""
    largest_factor: int = 5
    """Largest constant that multiplies; the smallest is 2."""
    hesitate: float = 0.75
    """Share of steps of a thoughtful solution that begin with Maybe or Perhaps and are checked."""
    doubt: float = 0.2
    """Share of its other steps that are checked."""
    mistake: float = 0.2
    """Share of hesitant guesses that are wrong, and corrected."""
    families: tuple[Family, ...] = FAMILIES
    """Families of problems, with equal shares."""
    sheet: int = 8
    """Values on the sheets of the drills."""


DIFFICULTY = Difficulty()
"""The mixture of the embedded data and model."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One definition `name = left op y`, where the variable `left` has the value `x`."""

    name: str
    op: str
    left: str
    x: int
    y: int
    right: str = ""
    """The variable whose value is `y`; empty for a constant."""

    @property
    def value(self) -> int:
        """The value of the variable, modulo 100."""
        return apply(self.op, self.x, self.y)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem; `steps` excludes the first variable, which is given."""

    start: int
    steps: tuple[Step, ...]
    family: Family
    version: str
    """The version of the problem."""
    misses: tuple[int, ...]
    """The values of the other version."""
    rules: tuple[tuple[str, int], ...] = ()
    """For `parity`: operation and constant for an even value, and for an odd one."""

    @property
    def question(self) -> str:
        """The problem statement and the version."""
        return f"{self.task} {self.which}"

    @property
    def which(self) -> str:
        """The sentence that names the version."""
        return f"Version: {self.version}."

    @property
    def task(self) -> str:
        """The problem statement without the version."""
        if self.family in ("chain", "graph"):
            chain = "".join(f", {s.name} = {s.left} {s.op} {s.right or s.y}" for s in self.steps)
            return f"Let a = {self.start}{chain}, all modulo {MODULUS}. Find {self.steps[-1].name}."
        if self.family == "ring":
            moves = ", then ".join(f"{s.y} {_MOVES[s.op]}" for s in self.steps)
            return f"A ring has {MODULUS} places. Start at place {self.start}, go {moves}. Which place is it?"
        if self.family == "sequence":
            rule = " ".join(_RULE[s.op].format(s.y) for s in self.steps[:2])
            term = len(self.steps) // 2 + 1
            return (
                f"A sequence begins with {self.start}. For the next term take the last, {rule}, modulo {MODULUS}. "
                f"Find term {term}."
            )
        if self.family == "parity":
            even, odd = (f"place go {y} {_MOVES[op]}" for op, y in self.rules)
            return (
                f"A ring has {MODULUS} places. Start at place {self.start}. From an even {even}, from an odd {odd}. "
                f"Which place is it after {len(self.steps)} moves?"
            )
        events = ", ".join(_EVENTS[s.op].format(s.y) for s in self.steps)
        return f"A shop has {self.start} boxes. It {events}. How many boxes, modulo {MODULUS}?"

    @property
    def answer(self) -> str:
        """The value of the last variable."""
        return str(self.steps[-1].value)

    @property
    def reference(self) -> str:
        """The values of two versions, and the answer; only the question states which version applies."""
        pairs = zip(self.steps, self.misses, strict=True)
        values = ", ".join(
            f"{s.name} {version} {s.value if version == self.version else miss}"
            for s, miss in pairs
            for version in _VERSIONS
        )
        return f"{values}. Answer {self.answer}."


def apply(op: str, x: int, y: int) -> int:
    """`x op y` modulo 100 for op in `+ - *`."""
    if op == "+":
        return (x + y) % MODULUS
    if op == "-":
        return (x - y) % MODULUS
    return (x * y) % MODULUS


def draw_problem(rng: random.Random, difficulty: Difficulty = DIFFICULTY) -> Problem:
    """Draw one problem of any split."""
    families = difficulty.families
    family = families[0] if len(families) == 1 else rng.choice(families)
    start = value = rng.randrange(2, MODULUS)
    steps: list[Step] = []
    count = rng.randint(difficulty.shortest, difficulty.longest)
    if family == "sequence":
        count = max(2, count - count % 2)  # two operations make a term
    if family in ("ring", "parity"):
        difficulty = replace(difficulty, multiply=0.0)
    rules = tuple((s.op, s.y) for s in (_draw_step(rng, difficulty, 0, 0) for _ in range(2 * (family == "parity"))))
    for i in range(count):
        if family == "sequence" and i >= 2:
            steps.append(_step(i, value, steps[i - 2].op, steps[i - 2].y))
        elif family == "parity":
            steps.append(_step(i, value, *rules[value % 2]))
        elif family == "graph" and i and (i == count - 1 or rng.random() < 0.5):
            earlier = rng.randrange(i)
            y = steps[earlier - 1].value if earlier else start
            steps.append(_step(i, value, rng.choice("+-"), y, NAMES[earlier]))
        else:
            steps.append(_draw_step(rng, difficulty, i, value))
        value = steps[-1].value
    misses = tuple(_mistake(step, rng) for step in steps)
    return Problem(
        start=start, steps=tuple(steps), family=family, version=rng.choice(_VERSIONS), misses=misses, rules=rules
    )


def _draw_step(rng: random.Random, difficulty: Difficulty, i: int, x: int) -> Step:
    """Draw the definition after variable `i`, whose value is `x`."""
    op = "*" if rng.random() < difficulty.multiply else rng.choice("+-")
    return _step(i, x, op, rng.randint(2, difficulty.largest_factor if op == "*" else difficulty.largest))


def _step(i: int, x: int, op: str, y: int, right: str = "") -> Step:
    return Step(name=NAMES[i + 1], op=op, left=NAMES[i], x=x, y=y, right=right)


def split_of(task: str) -> Split:
    """The split of a task, by the first byte of the SHA-256 digest of its text."""
    bucket = hashlib.sha256(task.encode()).digest()[0]
    return next(split for split, buckets in _BUCKETS.items() if bucket in buckets)


def problems(split: Split, seed: int, difficulty: Difficulty = DIFFICULTY) -> Iterator[tuple[Problem, random.Random]]:
    """Endless distinct problems of a split, each with a generator for its worked solution.

    Each task is yielded once, in one version, so memory grows with the number of problems drawn.
    """
    seen: set[bytes] = set()
    index = 0
    while True:
        rng = random.Random(f"{seed}/{split}/{index}")
        index += 1
        problem = draw_problem(rng, difficulty)
        digest = hashlib.sha256(problem.task.encode()).digest()[:8]
        if split_of(problem.task) == split and digest not in seen:
            seen.add(digest)
            yield problem, rng


def balanced(
    split: Split, count: int, seed: int, difficulty: Difficulty = DIFFICULTY, *, skip: int = 0
) -> list[Problem]:
    """`count` problems of a split, as many of each family (at most one more), after the first `skip`."""
    room = dict.fromkeys(difficulty.families, -(-count // len(difficulty.families)))
    found: list[Problem] = []
    for number, (problem, _) in enumerate(problems(split, seed, difficulty)):
        if len(found) == count:
            break
        if number >= skip and room[problem.family]:
            room[problem.family] -= 1
            found.append(problem)
    return found


def records(name: str, chosen: Sequence[Problem]) -> list[dict[str, str]]:
    """Problems as rows `id`, `question`, `reference`, `answer`, with ids NAME/FAMILY/NUMBER."""
    return [
        {
            "id": f"{name}/{problem.family}/{number:04d}",
            "question": problem.question,
            "reference": problem.reference,
            "answer": problem.answer,
        }
        for number, problem in enumerate(chosen)
    ]


def terse_thoughts(problem: Problem) -> str:
    """Thoughts that state the known values, one line per step."""
    return "".join(f"Then {s.name} = {s.value}\n" for s in problem.steps)


def thoughtful_thoughts(problem: Problem, rng: random.Random, difficulty: Difficulty = DIFFICULTY) -> str:
    """Thoughts without known values: guesses of some steps, checks by digits, corrections of mistakes."""
    lines: list[str] = []
    for s in problem.steps:
        if rng.random() < difficulty.hesitate:
            guess = _mistake(s, rng) if rng.random() < difficulty.mistake else s.value
            lines.append(f"{rng.choice(_HESITATIONS)} {s.name} = {guess}")
            lines.append(f"Check {digits(s)}")
            lines.append(f"{'So' if guess == s.value else 'Wait'} {s.name} = {s.value}")
        elif rng.random() < difficulty.doubt:
            lines.append(f"Then {s.name} = {s.value}")
            lines.append(f"Wait, check {digits(s)}")
            lines.append(f"So {s.name} = {s.value}")
        else:
            lines.append(f"Then {s.name} = {s.value}")
    return "".join(line + "\n" for line in lines)


def digits(step: Step) -> str:
    """The step recomputed by digits: units first, then tens; each partial result is easy."""
    tens, units = step.x // 10 * 10, step.x % 10
    low = apply(step.op, units, step.y)
    line = f"{step.x} {step.op} {step.y}: {units} {step.op} {step.y} = {low}"
    if step.op == "*":
        high = apply("*", tens, step.y)
        return f"{line}, {tens} * {step.y} = {high}, {high} + {low} = {step.value}"
    return f"{line}, {tens} + {low} = {step.value}"


def drill(rng: random.Random, difficulty: Difficulty = DIFFICULTY, lines: int = 14) -> str:
    """Single operations outside of problems, half of them on one digit, for the start of pre-training."""
    text = ""
    for _ in range(lines):
        x = rng.choice((rng.randrange(10), rng.randrange(10), 10 * rng.randrange(10), rng.randrange(MODULUS)))
        step = _draw_step(rng, difficulty, 0, x)
        text += f"{step.x} {step.op} {step.y} = {step.value}\n"
    return text


def response(thoughts: str, answer: str, *, thinking: bool = True) -> str:
    r"""The assistant turn without its end token: thoughts, then the answer in `\boxed{}`.

    With `thinking` off, the chat template writes the empty thoughts, and the steps are part of the answer.
    """
    return f"<think>\n{thoughts}</think>\n\n\\boxed{{{answer}}}" if thinking else f"{thoughts}\\boxed{{{answer}}}"


def _mistake(step: Step, rng: random.Random) -> int:
    """A near miss: the tens digit or the units digit off."""
    value = step.value
    if rng.random() < 0.7:
        return (value + 10 * rng.choice((-2, -1, 1, 2))) % MODULUS
    return value // 10 * 10 + (value + rng.randint(1, 9)) % 10
