"""Scoring of views of the embedded model: against the dense model, in layouts, from disk; and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import with_view
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import UserError
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.model.views import read_rows
from tests.harness import run_ranks
from tests.tiny_models import load_dense

TINY = Path(__file__).parents[2] / "conf" / "tiny.yaml"
SETTINGS = [
    "data.train.limit=12",
    "data.train.columns.answer=answer",
    "evaluation.max_response_tokens=160",
    "rollout.max_response_tokens=100",
    "rollout.batch_rows=16",
    "training.frozen_tokens=700",
    "diagnosis.chunk_tokens=64",
    "diagnosis.views.problems=10",
    "diagnosis.views.samples=4",
    "diagnosis.views.teacher_samples=1",
]


def configured(folder: Path, *more: str) -> PopsdConfig:
    return load_config(TINY, [f"output={folder}", *SETTINGS, *more])


def scored(rank: int, world_size: int, folder: Path, *more: str) -> dict[str, Any]:
    """The scores of three candidates, two of them with the same teacher, and the data to check them."""
    from nemo_popsd.commands.views import without_rows
    from nemo_popsd.config.loading import to_dict_config
    from nemo_popsd.model.views import score_candidates

    config = configured(folder, *more)
    model = PurifiedOPSDModel(to_dict_config(without_rows(config)))
    candidates = {
        "solution": config,
        "answer": with_view(config, "answer"),
        "opsd": configured(folder, *more, "distillation.target.family=opsd"),
    }
    found = {"scores": score_candidates(model, config, candidates, folder)}
    rows = read_rows(model, config, candidates)
    found["contexts"] = {row.record.id: row.contexts for row in rows.teachers["solution"]}
    if world_size == 1:
        cast(Any, model.engine).generate = None  # everything is on disk
        found["again"] = score_candidates(model, config, candidates, folder)
        short = configured(folder, "evaluation.max_response_tokens=1")
        model = PurifiedOPSDModel(to_dict_config(without_rows(short)))
        try:
            score_candidates(model, short, candidates, folder / "short")
        except UserError as error:
            found["nothing right"] = str(error)
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(scored, 1, folder)[0], folder


@pytest.mark.slow
def test_distance_and_accuracy_are_those_of_the_dense_model_and_of_the_answers_on_disk(
    one: tuple[dict[str, Any], Path],
) -> None:
    found, folder = one
    model = load_dense(asset("nemo_popsd:tiny_reasoner"))
    _, *answers = (json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines())
    assert len(answers) == found["scores"]["answers"] == 10 * 4
    total, tokens = 0.0, 0
    for answer in answers:
        response, contexts = answer["tokens"][:100], found["contexts"][answer["problem"]]
        logits = []
        for prompt in (contexts.student, contexts.privileged):
            with torch.no_grad():
                of_all = model(torch.tensor([[*prompt, *response]])).logits[0].double()
            logits.append(of_all[len(prompt) - 1 : -1, : model.config.vocab_size].log_softmax(-1))
        student, teacher = logits
        total, tokens = total + float((teacher.exp() * (teacher - student)).sum()), tokens + len(response)
    opsd = next(one for one in found["scores"]["candidates"] if one["name"] == "opsd")
    assert opsd["scores"]["distance"]["value"] == pytest.approx(total / tokens, rel=2e-3)
    assert opsd["family"] == "opsd"
    solution = found["scores"]["candidates"][0]["scores"]
    assert solution["accuracy"] == opsd["scores"]["accuracy"]  # the same teacher
    assert sorted(path.name for path in (folder / "teachers").iterdir()) == ["answer", "solution"]
    summary = json.loads((folder / "teachers" / "solution" / "summary.json").read_text())
    assert summary["accuracy"] == pytest.approx(solution["accuracy"]["value"])
    assert 2 <= found["scores"]["compared"] <= 10
    assert solution["fork_target"] is not None
    assert solution["uncertain_teacher_over_reference"] is not None


@pytest.mark.slow
def test_a_repeated_scoring_generates_nothing(one: tuple[dict[str, Any], Path]) -> None:
    found, _ = one
    assert found["again"] == found["scores"]


@pytest.mark.slow
def test_without_right_and_wrong_answers_it_says_how_many_problems_are_needed(
    one: tuple[dict[str, Any], Path],
) -> None:
    message = one[0]["nothing right"]
    assert "0 of 10 problems with right and wrong answers among 4 (accuracy 0.0 %)" in message
    assert "about 112 problems with 4 answers each, or 65 with 8" in message


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.tensor=1"], ids=["tensor", "data"])
def test_two_ranks_give_the_scores_of_one_process(
    one: tuple[dict[str, Any], Path], layout: str, tmp_path: Path
) -> None:
    want = one[0]["scores"]
    for found in run_ranks(scored, 2, tmp_path, layout):
        got = found["scores"]
        assert [(c["name"], c["kind"]) for c in got["candidates"]] == [
            (c["name"], c["kind"]) for c in want["candidates"]
        ]
        for mine, theirs in zip(got["candidates"], want["candidates"], strict=True):
            for name, score in theirs["scores"].items():
                assert mine["scores"][name] == pytest.approx(score, rel=2e-3, abs=2e-4), name


def rows(folder: Path, *more: str, lines: list[dict[str, Any]] | None = None, views: tuple[str, ...] = ()) -> Any:
    """The rows of a file that some views have in common; no model is built."""
    path = folder / "rows.jsonl"
    known = [
        {"question": f"{n} + 1?", "reference": f"It is {n + 1}.", "answer": str(n + 1), "hint": f"add {n}"}
        for n in range(3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines or known))
    words = [f"data.train.path={path}", "data.train.columns.id=null", "data.train.limit=null", *more]
    config = configured(folder, *words)
    model = SimpleNamespace(
        tokenizer=load_tokenizer(asset("nemo_popsd:tiny_reasoner")), architecture=SimpleNamespace(vocab_size=489)
    )
    candidates = {view: with_view(config, view) for view in views} or {"solution": config}
    return read_rows(cast(PurifiedOPSDModel, model), config, candidates)


def test_rows_are_those_that_fit_under_every_view(tmp_path: Path) -> None:
    lines = [
        {"question": "1 + 1?", "reference": "one " * 40, "answer": "2"},
        {"question": "1 + 2?", "reference": "It is 3.", "answer": "3"},
        {"question": "1 + 3?", "reference": "It is 4.", "answer": "4"},
    ]
    limits = ("data.max_reference_tokens=12", "data.long_references=drop")
    found = rows(tmp_path, *limits, lines=lines, views=("answer", "solution"))
    assert [row.record.answer for row in found.teachers["answer"]] == ["3", "4"]
    assert [row.record.answer for row in found.teachers["solution"]] == ["3", "4"]
    with pytest.raises(UserError, match=r"1 rows of data\.train that fit all of answer, solution"):
        rows(tmp_path, *limits, lines=lines[:2], views=("answer", "solution"))


@pytest.mark.parametrize(
    ("views", "change", "message"),
    [
        (("solution", "nowhere"), {}, "nowhere"),
        (("solution", "hint"), {"hint": None}, "hint"),
        (("answer",), {"answer": None}, "answer"),
    ],
    ids=["unknown", "missing", "no-answer"],
)
def test_a_view_that_a_row_lacks_is_refused_by_name(
    views: tuple[str, ...], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    known = {"question": "1 + 1?", "reference": "It is 2.", "answer": "2", "hint": "add"}
    other = {"question": "1 + 2?", "reference": "It is 3.", "answer": "3", "hint": "add two"} | change
    with pytest.raises(UserError, match=message) as raised:
        rows(tmp_path, lines=[known, {name: value for name, value in other.items() if value is not None}], views=views)
    assert "rows.jsonl" in str(raised.value)


def test_views_that_make_both_teachers_equal_are_refused(tmp_path: Path) -> None:
    family = "distillation.target.family=wrong_reference"
    with pytest.raises(UserError, match="the same prompt for both teachers"):
        rows(tmp_path, family, views=("other",))
