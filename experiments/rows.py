"""The problems of the experiments: `python -m experiments.rows` writes experiments/data.

    train.jsonl      1,600 rows, 2 to 5 operations, four families
    tuning.jsonl     256 rows of the same kind, for the choice of learning rates; not in the others
    held_out.jsonl   384 rows of the same kind

Rows are a pure function of the seeds below. A digest of its text assigns each question to one split
(`nemo_popsd.testbed.problems.split_of`), so that pre-training, training and held-out rows cannot overlap.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_popsd.testbed.problems import FAMILIES, Difficulty, Problem, Split, problems

FOLDER = Path(__file__).parent / "data"
USUAL = Difficulty(families=FAMILIES, reference="versions")
"""Operations as in pre-training."""
_SEED = 11


def drawn(split: Split, count: int, difficulty: Difficulty, *, skip: int = 0) -> list[Problem]:
    """`count` problems of a split, the same number of each family, after the first `skip`."""
    of_family = dict.fromkeys(difficulty.families, 0)
    found: list[Problem] = []
    wanted = count // len(of_family)
    for number, (problem, _) in enumerate(problems(split, _SEED, difficulty)):
        if number >= skip and of_family[problem.family] < wanted:
            of_family[problem.family] += 1
            found.append(problem)
            if len(found) == wanted * len(of_family):
                break
    return found


def tuning_problems() -> list[Problem]:
    """Skipped problems of the training split, far more than the training rows use."""
    return drawn("train", 256, USUAL, skip=4000)


def rows(chosen: list[Problem], kind: str) -> list[dict[str, str]]:
    """Rows with ids KIND/FAMILY/NUMBER."""
    return [
        {
            "id": f"{kind}/{problem.family}/{number:04d}",
            "question": problem.question,
            "reference": problem.reference,
            "answer": problem.answer,
        }
        for number, problem in enumerate(chosen)
    ]


def write(folder: Path = FOLDER) -> None:
    """Writes the three files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train": rows(drawn("train", 1600, USUAL), "train"),
        "tuning": rows(tuning_problems(), "tuning"),
        "held_out": rows(drawn("validation", 384, USUAL), "validation"),
    }
    for name, found in files.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(found)} rows")


def main() -> None:
    """Runs the command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()


if __name__ == "__main__":
    main()
