"""The steps of an evaluation between its prompts and its tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.config import ColumnsConfig, SourceConfig
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.equivalence import COMPARISON_RULES, AnswerVerifier
from nemo_popsd.evaluation.records import EvaluationDirectory, Sample
from nemo_popsd.evaluation.run import (
    ProblemSet,
    begin,
    conclude,
    conclude_all,
    prepare_sets,
    sample_settings,
    weights_digest,
)
from nemo_popsd.rollout.engine import SamplingParams
from tests.data.small import rows, tokenizer, write_jsonl
from tests.evaluation.test_sampling import prompts

SAMPLING = SamplingParams(1.0, 1.0, 0, max_response_tokens=8, stop_token_ids=frozenset({2}))


def test_digests_depend_on_the_weights_and_not_on_their_path(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    weights = model / "inner" / "weights"
    weights.write_bytes(bytes(5 << 20))
    first = weights_digest(model)
    shutil.copytree(model, tmp_path / "copy")
    assert weights_digest(tmp_path / "copy") == first
    assert weights_digest(weights) != first
    with weights.open("r+b") as file:  # training changes all weights slightly
        for position in range(0, 5 << 20, 1 << 16):
            file.seek(position)
            file.write(b"\x01")
    second = weights_digest(model)
    weights.rename(model / "weights")
    assert len({first, second, weights_digest(model)}) == 3


def config(tmp_path: Path) -> PopsdConfig:
    made = PopsdConfig(output=str(tmp_path))
    made.data.validation.path = str(write_jsonl(tmp_path / "rows.jsonl", rows(5)))
    made.data.validation.columns.reference = None
    made.data.validation.columns.answer = "answer"
    made.evaluation.resamples = 100
    return made


def prepared(config: PopsdConfig, model: str) -> list[ProblemSet]:
    return prepare_sets(config.evaluation, config.data, tokenizer(), model=model, output=config.output)


def test_prepared_sets_have_names_directories_and_problems(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.evaluation.problems = 3
    (one,) = prepared(settings, "nemo_popsd:runs/a/")
    assert (one.name, len(one.prompts)) == ("validation", 3)
    assert one.directory.path == tmp_path / "evaluation" / "nemo_popsd_runs_a" / "validation"
    assert not one.directory.path.exists()


def test_a_named_set_must_be_complete(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.evaluation.sets, settings.evaluation.sets_directory = {"aime24": ""}, str(tmp_path)
    write_jsonl(tmp_path / "aime24.jsonl", rows(29))
    with pytest.raises(UserError, match="got 29 usable problems; need 30"):
        prepared(settings, "m")
    write_jsonl(tmp_path / "aime24.jsonl", rows(30))
    settings.evaluation.problems = 2
    (one,) = prepared(settings, "m")
    assert (one.name, len(one.prompts)) == ("aime24", 2)


def test_sets_of_the_user_have_their_own_directories(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.data.validation = SourceConfig()
    contest: list[object] = [{"problem": f"Contest {n}?", "answer": n} for n in range(3)]
    own = write_jsonl(tmp_path / "mine.jsonl", contest)
    settings.evaluation.sets = {"mine": str(own), "other": str(write_jsonl(tmp_path / "o.jsonl", rows(4)))}
    sets = prepared(settings, "m")
    assert [(one.name, len(one.prompts)) for one in sets] == [("mine", 3), ("other", 4)]
    assert [one.directory.path.name for one in sets] == ["mine", "other"]
    assert sets[0].prompts[1].record.question == "Contest 1?"


def test_a_set_of_the_user_has_the_columns_of_the_validation_set_where_they_fit(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.data.validation.columns = ColumnsConfig(question="q", reference="r", answer=None)
    settings.data.validation.answer_pattern = r"####\s*(.+)"
    solved = write_jsonl(tmp_path / "s.jsonl", [{"q": "A?", "r": "So.\n#### 4", "answer": "no"}])
    settings.evaluation.sets = {"solved": str(solved), "usual": str(write_jsonl(tmp_path / "o.jsonl", rows(1)))}
    assert [one.prompts[0].record.answer for one in prepared(settings, "m")] == ["4", "1"]
    settings.evaluation.sets = {"bad": str(write_jsonl(tmp_path / "b.jsonl", [{"q": "A?", "solution": "4"}]))}
    with pytest.raises(UserError, match=r"got columns q, solution; .*; set data\.validation\.columns"):
        prepared(settings, "m")


def test_a_file_under_the_name_of_a_published_set_must_be_complete(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.evaluation.sets = {"aime24": str(write_jsonl(tmp_path / "a.jsonl", rows(29)))}
    with pytest.raises(UserError, match="got 29 usable problems; need 30"):
        prepared(settings, "m")


def test_two_files_of_the_validation_set_are_not_mixed(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.evaluation.problems = 2
    begun(*prepared(settings, "m"))
    settings.evaluation.problems = 4
    begun(*prepared(settings, "m"))  # more of the same set
    settings.data.validation.limit = 1
    begun(*prepared(settings, "m"))  # fewer of it
    settings.data.validation.path = str(write_jsonl(tmp_path / "other.jsonl", rows(5)))
    with pytest.raises(UserError, match=r"got problems of another set \(4, including 'rows\.jsonl:1'\)"):
        begun(*prepared(settings, "m"))


def begun(one: ProblemSet) -> None:
    begin(one, sample_settings(one.prompts, SAMPLING, seed=1, model="m", weights_digest="f", engine="e"))
    names = {sample.problem for sample in one.directory.samples().values()}
    with one.directory.append_to(0) as file:
        missing = (p.record.id for p in one.prompts if p.record.id not in names)
        file.add(Sample(name, 0, "\\boxed{1}", 4, truncated=False) for name in missing)


def drawn(tmp_path: Path, numbers: list[int]) -> ProblemSet:
    one = ProblemSet("s", prompts(2), EvaluationDirectory(tmp_path / "s"), frozenset(("p0", "p1")))
    begin(one, sample_settings(one.prompts, SAMPLING, seed=1, model="m", weights_digest="f", engine="e"))
    with one.directory.append_to(0) as file:
        file.add(Sample(p, n, f"\\boxed{{{3 + n}}}", 4, truncated=False) for p in ("p0", "p1") for n in numbers)
    return one


def test_the_requested_samples_are_concluded(tmp_path: Path) -> None:
    settings = EvaluationConfig(samples_per_problem=2)
    table = conclude_all([drawn(tmp_path, [2, 1, 0])], settings, model="m")
    summary = EvaluationDirectory(tmp_path / "s").summary()
    assert (summary["samples"], summary["accuracy"], summary["pass_at"]) == (4, 0.5, {"2": 1.0})
    assert (summary["model"], summary["set"], summary["scoring"]["without_box"]) == ("m", "s", "none")
    assert summary["scoring"]["comparison"] == COMPARISON_RULES
    assert table.splitlines()[-1] == f"written to {tmp_path / 's'}"
    assert "average" not in table


def test_samples_that_other_ranks_wrote_elsewhere_are_reported_missing(tmp_path: Path) -> None:
    settings = EvaluationConfig(samples_per_problem=2)
    with AnswerVerifier(1) as verifier, pytest.raises(UserError, match=r"2 of 4 missing.*all of them share"):
        conclude(drawn(tmp_path, [0]), settings, verifier, model="m")
