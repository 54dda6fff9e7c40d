"""The paper's table: averages over sets, pooled seeds, notes and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.paper_table import main, read_arms, table
from experiments.published import PUBLISHED
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import Evaluation
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import COMPARISON_RULES
from nemo_popsd.evaluation.records import EvaluationDirectory
from tests.evaluation.scores import score

ROOT = Path(__file__).parents[2]


def saved(folder: Path, right: dict[str, int], *, tokens: int = 100, problems: int = 20) -> str:
    """An evaluation of each set, in which the first `right` problems are solved."""
    for name, count in right.items():
        scores = [score(f"p{n:02}", n < count, tokens=tokens) for n in range(problems)]
        found = Evaluation.of(scores, EvaluationConfig(resamples=200))
        labels = {"model": "m", "set": name, "scoring": {"comparison": COMPARISON_RULES}}
        EvaluationDirectory(folder / name).conclude(found.scores, {**labels, **found.summary.as_dict()})
    return str(folder)


def cells(text: str) -> dict[str, list[str]]:
    lines = [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line.startswith("|")
    ]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_sets_count_equally_and_changes_are_paired(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", {"a": 10, "b": 4})
    arm = saved(tmp_path / "arm", {"a": 10, "b": 8}, tokens=150)
    found = cells(table(read_arms([f"base={base}", f"OPSD={arm}"]), ("paper", "Qwen3-8B"), resamples=200))
    assert found["base"][:4] == ["50.0", "20.0", "35.0", ""]
    assert found["OPSD"][:3] == ["50.0", "40.0", "45.0"]
    change, ends = found["OPSD"][3].split(" ", 1)
    low, high = map(float, ends.strip("[]").split(","))
    assert change == "+10.0"
    assert 0 <= low < 10 < high < 25  # set a does not change in any resample
    assert found["OPSD"][4:6] == ["150", "+50 [+50, +50]"]
    assert found["base"][-2:] == ["61.8", ""]
    assert found["OPSD"][-2:] == ["60.9", "-0.9"]


def test_several_seeds_are_pooled_and_listed(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", {"a": 10})
    arms = [saved(tmp_path / str(n), {"a": n}) for n in (10, 14)]
    text = table(read_arms([f"base={base}", *(f"arm={path}" for path in arms)]), None, resamples=200)
    assert cells(text)["arm"][:2] == ["60.0", "60.0"]
    assert "arm, change with each of 2 seeds: +0.0, +20.0." in text
    assert "20 problems, 1 responses to each by base" in text


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(tmp_path / "base", {"a": 1})
    other = saved(tmp_path / "other", {"b": 1})
    with pytest.raises(UserError, match="NAME=DIR"):
        read_arms([base])
    with pytest.raises(UserError, match="a base and an arm"):
        read_arms([f"base={base}", f"base={base}"])
    with pytest.raises(UserError, match="the same sets"):
        read_arms([f"base={base}", f"arm={other}"])
    with pytest.raises(SystemExit):
        main([f"base={base}", f"arm={base}", "--published", "paper", "GPT"])
    assert "choose one of paper Qwen3-8B" in capsys.readouterr().err
    main([f"base={base}", f"arm={base}", "--write", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out.removesuffix("\n")


def test_published_scores_are_those_of_the_documents() -> None:
    assert all((ROOT / "conf" / f"{scores.protocol}.yaml").is_file() for scores in PUBLISHED.values())
    readme = (ROOT / "README.md").read_text()
    for (source, _), scores in PUBLISHED.items():
        if source == "paper":
            assert f"{scores.base}" in readme
            assert all(f"{value}" in readme for value in scores.arms.values())
