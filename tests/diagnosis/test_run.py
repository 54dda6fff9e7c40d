"""A diagnosis of the embedded model, end to end: compared with the dense model, in every layout, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.diagnosis.groups import MEASURES
from nemo_popsd.embedded.names import asset
from nemo_popsd.errors import UserError
from nemo_popsd.report import write_diagnosis_page
from tests.harness import run_ranks
from tests.tiny_models import load_dense

TINY = Path(__file__).parents[2] / "conf" / "tiny.yaml"
ROWS = ["train/ring/0002", "train/sequence/0000"]


def diagnosed(rank: int, world_size: int, folder: Path, *more: str) -> tuple[Any, list[Any], list[Any]]:
    """Diagnosis of three rows, two of which are shown, with their contexts and responses."""
    from nemo_popsd.config.loading import load_config, to_dict_config
    from nemo_popsd.diagnosis.run import choose_rows
    from nemo_popsd.model import PurifiedOPSDModel

    settings = [
        f"output={folder}",
        "data.train.limit=5",
        "data.validation.path=''",
        "rollout.max_response_tokens=40",
        "training.frozen_tokens=64",
        "diagnosis.rows=3",
        f"diagnosis.shown_rows=[{', '.join(ROWS)}]",
        "diagnosis.alternatives=3",
        "diagnosis.listed_tokens=4",
        "diagnosis.chunk_tokens=16",
    ]
    model = PurifiedOPSDModel(to_dict_config(load_config(TINY, [*settings, *more])))
    found = model.diagnose("the embedded model")
    rows = choose_rows(model.training_data.dataset, model.settings.diagnosis)
    tokenizer = model.tokenizer
    ids = [tokenizer.encode("".join(r["pieces"]), add_special_tokens=False) for r in found.rollouts]
    return found, [row.row.contexts for row in rows], ids


def dense_log_probs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities at each response token, [R, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    return torch.log_softmax(logits[len(prompt) - 1 : -1, : model.config.vocab_size], -1)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(diagnosed, 1, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.slow
def test_the_results_of_each_token_equal_those_of_the_dense_model(one: Any) -> None:
    found, contexts, ids = one
    model = load_dense(asset("nemo_popsd:tiny_reasoner"))
    seen = 0
    for rollout, context, response in zip(found.rollouts, contexts, ids, strict=True):
        assert len(response) == len(rollout["pieces"])  # the text on disk has the same tokens
        student = dense_log_probs(model, context.student, response)
        teacher = dense_log_probs(model, context.privileged, response)
        reference_only = dense_log_probs(model, context.reference, response)
        at = torch.tensor(response)[:, None]
        delta = teacher - reference_only
        shift = 10 * torch.tanh((delta - delta.mean(-1, keepdim=True)) / 10)
        target = torch.log_softmax(student + shift, -1)
        want = {
            "log_student": student.gather(1, at),
            "log_base": student.gather(1, at),
            "log_privileged": teacher.gather(1, at),
            "log_reference": reference_only.gather(1, at),
            "log_target": target.gather(1, at),
            "delta_question": delta.gather(1, at),
            "norm_ratio": (reference_only - student).norm(dim=-1) / (teacher - student).norm(dim=-1),
            "forward_kl": (target.exp() * (target - student)).sum(-1),
            "student_entropy": -(student.exp() * student).sum(-1),
        }
        for name, values in want.items():
            got = torch.tensor(rollout["values"][name], dtype=torch.float64)
            torch.testing.assert_close(got, values.flatten(), rtol=2e-3, atol=2e-3)
        if rollout["alternatives"]:
            seen += 1
            best = [rollout["alternatives"]["privileged"][t][1] for t in range(len(response))]
            torch.testing.assert_close(torch.tensor(best).double(), teacher.exp().max(-1).values, rtol=6e-3, atol=1e-3)
    assert seen == 2


@pytest.mark.slow
def test_shown_rows_are_shown_and_come_first(one: Any) -> None:
    found, _, _ = one
    assert [r["row"] for r in found.rollouts] == [*ROWS, "train/chain/0001"]
    assert [r["alternatives"] is not None for r in found.rollouts] == [True, True, False]
    assert found.summary["tokens"] == sum(len(r["pieces"]) for r in found.rollouts)
    assert found.summary["groups"]["markers"]["tokens"] == sum(sum(r["marked"]) for r in found.rollouts) > 0
    assert found.summary["push"]["markers"]["Wait"]["mass"] > 0
    assert found.summary["push"]["markers"]["Let me think"] is None
    for lists in found.summary["push"]["components"].values():
        assert [len(lists[direction]) for direction in ("promoted", "suppressed")] == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2"],
        [],
        ["parallel.pipeline=2"],
        ["parallel.context=2"],
        ["parallel.context=2", "training.packing=true"],
    ],
    ids=["tensor", "data", "pipeline", "context", "context-packed"],
)
def test_two_ranks_give_the_figures_of_one(one: Any, tmp_path: Path, layout: list[str], layers: str) -> None:
    want = one[0]
    for got, _, _ in run_ranks(diagnosed, 2, tmp_path, *layout, layers=layers):
        assert [r["pieces"] for r in got.rollouts] == [r["pieces"] for r in want.rollouts]
        for mine, theirs in zip(got.rollouts, want.rollouts, strict=True):
            for name in MEASURES:
                # fp32 differences of 489 log-probabilities around -30: cosines of small differences lose digits.
                assert mine["values"][name] == pytest.approx(theirs["values"][name], rel=1e-3, abs=5e-4), name
            if theirs["alternatives"]:
                first = [row[1] for row in theirs["alternatives"]["target"]]
                assert [row[1] for row in mine["alternatives"]["target"]] == pytest.approx(first, abs=2e-3)
        for name, lists in want.summary["push"]["components"].items():
            for direction, entries in lists.items():
                there = got.summary["push"]["components"][name][direction]
                assert [e["push"][name] for e in there] == pytest.approx([e["push"][name] for e in entries], rel=1e-2)
        assert got.summary["tokens"] == want.summary["tokens"]


@pytest.mark.slow
def test_the_files_contain_the_diagnosis_and_a_page_is_built_from_them(one: Any, tmp_path: Path) -> None:
    found = one[0]
    found.write(tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written.keys() - found.summary.keys() == {"rollouts_sha256", "sum"}
    assert {key: written[key] for key in found.summary} == found.summary
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.rollouts
    page = write_diagnosis_page(tmp_path).read_text()
    assert "the embedded model" in page
    assert page.count('class="tokens"') == 2


def missing(rank: int, world_size: int, folder: Path) -> str:
    try:
        diagnosed(rank, world_size, folder, "diagnosis.shown_rows=[train/chain/0001, nowhere]")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_missing_row_is_refused_by_name(tmp_path: Path) -> None:
    (message,) = run_ranks(missing, 1, tmp_path)
    assert "'nowhere' is not among the 5 rows" in message
    assert "set diagnosis.shown_rows" in message
