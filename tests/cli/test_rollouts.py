"""`popsd rollouts show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_popsd.cli.main import main
from nemo_popsd.rollout.engine import Rollout
from nemo_popsd.rollout.storage import RolloutStore, StoredRollout


@pytest.fixture
def output(tmp_path: Path) -> Path:
    store = RolloutStore(tmp_path)
    for step in (1, 2):
        rows = [
            StoredRollout(name, step, [5, 6], Rollout([7, 8, 9 + step], [-1.0, -2.0, -3.0], name == "b", step - 1))
            for name in ("a", "b")
        ]
        store.write(step, rows, part=0, parts=1)
    (tmp_path / "config.yaml").write_text("student: {source: 'nemo_popsd:tiny_reasoner'}\n")
    return tmp_path


def test_summary_of_steps(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "show", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step 1: 2 rollouts by weights 0, 6 tokens, 1 truncated at the limit",
        "step 2: 2 rollouts by weights 1, 6 tokens, 1 truncated at the limit",
    ]


def test_rollouts_as_json(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "show", str(output), "--step", "2", "--row", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "step": 2,
        "id": "b",
        "weights_version": 1,
        "finish_reason": "length",
        "seed": 2,
        "prompt": [5, 6],
        "response": [7, 8, 11],
        "log_probs": [-1.0, -2.0, -3.0],
    }
    assert main(["rollouts", "show", str(output), "--row", "a", "--json"]) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [1, 2]


def test_unfinished_responses_and_responses_of_several_weights(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        StoredRollout("a", 1, [5], Rollout([], [], False, 2, unfinished=True)),
        StoredRollout("b", 2, [5], Rollout([7, 8], [-1.0, -2.0], False, 2, segments=((1, 1), (2, 1)))),
    ]
    RolloutStore(output).write(3, rows, part=0, parts=1)
    assert main(["rollouts", "show", str(output)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 3: 2 rollouts by weights 2, 2 tokens, 0 truncated at the limit, 1 left unfinished"
    assert main(["rollouts", "show", str(output), "--step", "3", "--json"]) == 0
    left, several = map(json.loads, capsys.readouterr().out.splitlines())
    assert (left["finish_reason"], left["response"]) == ("unfinished", [])
    assert several["segments"] == [[1, 1], [2, 1]]
    assert main(["rollouts", "show", str(output), "--step", "3", "--row", "a"]) == 0
    assert "0 tokens, unfinished" in capsys.readouterr().out


def test_several_responses_to_a_prompt(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        StoredRollout(name, seed, [5, 6], Rollout([7] * (seed + 1), [-1.0] * (seed + 1), False, 2))
        for name in ("a", "b")
        for seed in (10, 11, 12)
    ]
    RolloutStore(output).write(3, rows, part=0, parts=1)
    assert main(["rollouts", "show", str(output)]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("step 3: 6 rollouts of 2 prompts by weights 2, 72 tokens")
    )
    assert main(["rollouts", "show", str(output), "--step", "3", "--row", "b"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")]
    expected = [f"--- step 3, row b, response {number}: {number + 10} tokens" for number in (1, 2, 3)]
    assert [head.partition(",")[0] for head in heads] == ["--- step 3"] * 3
    assert [head.split(" tokens")[0] + " tokens" for head in heads] == expected


def test_rollouts_as_text(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_popsd.data.tokenizer import load_tokenizer
    from nemo_popsd.embedded.names import asset

    decode = load_tokenizer(asset("nemo_popsd:tiny_reasoner")).decode
    assert main(["rollouts", "show", str(output), "--step", "1", "--row", "a"]) == 0
    head, prompt, response = capsys.readouterr().out.split("\n", 2)
    assert head == "--- step 1, row a: 3 tokens, stop, mean log-probability -2.000"
    assert prompt == decode([5, 6])
    assert response == f">>> {decode([7, 8, 10])}\n"


def test_without_a_tokenizer_the_json_is_named(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "config.yaml").write_text(f"student: {{source: {output}/absent}}\n")
    assert main(["rollouts", "show", str(output), "--step", "1"]) == 2
    assert "print token ids with --json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "printed"),
    [(["--step", "3"], "no step 3, but steps 1 to 2"), (["--row", "c"], "no row 'c'")],
)
def test_missing_steps_and_rows(
    output: Path, capsys: pytest.CaptureFixture[str], words: list[str], printed: str
) -> None:
    assert main(["rollouts", "show", str(output), *words]) == 2
    assert printed in capsys.readouterr().err
    assert main(["rollouts", "show", str(output / "nowhere")]) == 2
