import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_popsd.config.loading import from_dict_config, load_config, save_resolved, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert type(caught.value) is UserError
    return str(caught.value)


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    defaults = PopsdConfig(name="run", output="runs/run")
    assert load_config(write(tmp_path, "")) == defaults
    assert load_config(write(tmp_path, "# nothing\n")) == defaults


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", [], ("run", "runs/run")),
        ("name: a", [], ("a", "runs/a")),
        ("name: a", ["name=b"], ("b", "runs/b")),
        ("name: a\noutput: x", ["name=b"], ("b", "x")),
        ("", ["output=y"], ("run", "y")),
    ],
)
def test_the_output_has_the_name_of_the_run_and_the_run_that_of_its_file(
    tmp_path: Path, text: str, overrides: list[str], expected: tuple[str, str]
) -> None:
    config = load_config(write(tmp_path, text), overrides)
    assert (config.name, config.output) == expected


def test_the_name_of_a_file_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "${seed}.yaml"
    path.write_text("output: x")
    assert load_config(path).name == "${seed}"


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  steps: 7\noptimizer:\n  lr: 1e-4\n")
    config = load_config(path, ["training.steps=8", "training.steps=9", "rollout.top_k=0"])
    assert (config.training.steps, config.optimizer.lr, config.rollout.top_k) == (9, 1e-4, 0)
    assert config.training.prompts_per_step == PopsdConfig().training.prompts_per_step


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("distillation.target.cap=null", lambda c: c.distillation.target.cap, None),
        ("distillation.chunk_tokens=512", lambda c: c.distillation.chunk_tokens, 512),
        ("distillation.fused=never", lambda c: c.distillation.fused, "never"),
        ("optimizer.lr=3e-4", lambda c: c.optimizer.lr, 3e-4),
        ("optimizer.lr=1", lambda c: c.optimizer.lr, 1.0),
        ("student.recompute=true", lambda c: c.student.recompute, "full"),
        ("evaluation.markers=[Wait, 'Let me think']", lambda c: c.evaluation.markers, ["Wait", "Let me think"]),
        ("student.lora={rank: 8, alpha: 16}", lambda c: (c.student.lora.rank, c.student.lora.alpha), (8, 16.0)),
        # Text is taken literally: none of these may be read as a comment, a mapping, a number or a boolean.
        (r"data.train.answer_pattern=#### (.+)", lambda c: c.data.train.answer_pattern, "#### (.+)"),
        ("data.train.answer_pattern=null", lambda c: c.data.train.answer_pattern, None),
        ("data.templates.student=Q: {question}", lambda c: c.data.templates.student, "Q: {question}"),
        (r'data.templates.student="Q\n{question}"', lambda c: c.data.templates.student, "Q\n{question}"),
        ("name='a b'", lambda c: c.name, "a b"),
        ("name=12", lambda c: c.name, "12"),
        ("name=on", lambda c: c.name, "on"),
        ("name=a=b", lambda c: c.name, "a=b"),
        ("data.validation.path=", lambda c: c.data.validation.path, ""),
    ],
)
def test_values_of_overrides(tmp_path: Path, override: str, read, value: object) -> None:
    assert read(load_config(write(tmp_path, "data: {validation: {path: somewhere}}"), [override])) == value


def test_unknown_key_of_a_file_names_line_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ntraining:\n  steps: 3\n  promts_per_step: 4\n")
    message = refusal(path)
    assert message.startswith(f"{path}:4: got unknown key training.promts_per_step; ")
    assert "nearest is training.prompts_per_step" in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("traning.steps=3", "training.steps"),
        ("training.step=3", "training.steps"),
        ("prompts_per_step=3", "training.prompts_per_step"),
        ("student.lora.rnak=3", "student.lora.rank"),
        ("student={lora: {rnak: 3}}", "student.lora.rank"),
        ("distillation.beta=3", "distillation.target.beta"),
        ("optimizer.weight=3", "optimizer.weight_decay"),
        ("trainin={steps: 3}", "training"),
    ],
)
def test_unknown_key_of_an_override_names_the_nearest(tmp_path: Path, override: str, nearest: str) -> None:
    message = refusal(write(tmp_path, ""), override)
    assert message.startswith(f"override {override!r}: got unknown key ")
    assert f"nearest is {nearest};" in message


def test_unknown_key_without_a_near_one_lists_the_section(tmp_path: Path) -> None:
    assert "a key of rollout: engine, per_prompt, temperature" in refusal(write(tmp_path, ""), "rollout.zzz=1")
    assert "sections are student, parallel" in refusal(write(tmp_path, "zzz: 1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {steps: many}", "got training.steps=many; need a whole number"),
        ("training: {steps: 2.5}", "got training.steps=2.5; need a whole number"),
        ("training: {steps: true}", "got training.steps=true; need a whole number"),
        ("optimizer: {lr: fast}", "got optimizer.lr=fast; need a number"),
        ("overwrite: maybe", "need true or false"),
        ("overwrite: 1", "need true or false"),
        ("name: [a]", "got name=a list; need text"),
        ("seed: null", "got seed=null; need a whole number"),
        ("evaluation: {markers: Wait}", "need a list of texts"),
        ("evaluation: {markers: [[a]]}", "need a list of texts"),
        ("evaluation: {markers: [a, null]}", "need a list of texts"),
        ("distillation: {target: {cap: big}}", "need a number (0.5, 1e-5) or null"),
        ("training: 3", "got training=3; need a section"),
        ("training:\n", "got training=nothing; need a section"),
    ],
)
def test_wrong_types(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "\n" + text)
    printed = refusal(path)
    assert printed.startswith(f"{path}:2: ")
    assert message in printed


def test_the_checks_of_the_sections_are_applied(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "training: {steps: 0}")) == (
        "configuration: got training.steps=0; need a whole number from 1 to 100,000,000; set training.steps"
    )
    assert "set optimizer.beta1" in refusal(write(tmp_path, ""), "optimizer.beta1=1.0")
    assert "optimizer.warmup_steps=9 with training.steps=8" in refusal(
        write(tmp_path, ""), "optimizer.warmup_steps=9", "training.steps=8"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", ":2: got while parsing a flow sequence, expected"),
        ("training:\n  steps: 1\n  steps: 2\n", ":3: got training.steps again, first in line 2"),
        ("- a\n- b\n", "got no keys at the top"),
        ("\ttraining: 1", ":1: got while scanning for the next token, found character"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.yaml")
    assert "a directory" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    assert "not UTF-8" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["training.steps", "=3", "--steps", "training=[1", "evaluation.markers=[a"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert refusal(write(tmp_path, ""), override).startswith(f"override {override!r}: ")


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPSD_TEST_STEPS", "12")
    config = load_config(write(tmp_path, "training: {steps: '${oc.env:POPSD_TEST_STEPS}'}\noutput: runs/${name}"))
    assert (config.training.steps, config.output) == (12, "runs/run")
    monkeypatch.setenv("POPSD_TEST_STEPS", "many")
    assert "training.steps" in refusal(tmp_path / "run.yaml")
    monkeypatch.delenv("POPSD_TEST_STEPS")
    assert "POPSD_TEST_STEPS" in refusal(tmp_path / "run.yaml")


def test_saved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "name: 'on'"), ["distillation.target.cap=null", "optimizer.lr=5e-6"])
    saved = tmp_path / "made" / "config.yaml"
    save_resolved(config, saved)
    assert load_config(saved) == config
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]
    assert stat.S_IMODE(saved.stat().st_mode) & 0o444 == 0o444
    assert OmegaConf.to_object(to_dict_config(config)) == config


def test_the_configuration_of_a_model_may_contain_keys_of_nemo(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""), ["training.steps=3", "distillation.target.cap=null"])
    tree = OmegaConf.create(OmegaConf.to_yaml(to_dict_config(config)))
    tree.target, tree.nemo_version = "nemo_popsd.model.PurifiedOPSDModel", "3.0.0"
    assert from_dict_config(tree) == config
    assert from_dict_config(to_dict_config(config)) == config
    tree.training.stpes = 4
    with pytest.raises(UserError, match=r"nearest is training\.steps"):
        from_dict_config(tree)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_resolved(PopsdConfig(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_loading_and_checking_import_no_torch(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    path = write(tmp_path, f"output: {tmp_path}\nstudent: {{source: {tmp_path}}}\ndata: {{train: {{path: {rows}}}}}")
    code = f"""
import sys
from nemo_popsd.config.loading import load_config
from nemo_popsd.config.consistency import check_training_run
check_training_run(load_config({str(path)!r}), world_size=1)
heavy = [name for name in ("torch", "megatron", "transformers", "lightning", "nemo") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_home_is_expanded_when_the_configuration_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = write(tmp_path, "output: ~/runs\nstudent: {source: ~/model}\ndata: {train: {path: ~/rows.jsonl}}")
    config = load_config(path)
    assert config.output == "/home/somebody/runs"
    assert config.student.source == "/home/somebody/model"
    assert config.data.train.path == "/home/somebody/rows.jsonl"


@pytest.mark.parametrize(
    ("text", "overrides", "sets"),
    [
        ("[aime24, hmmt25]", [], {"aime24": "", "hmmt25": ""}),
        ("{mine: ~/rows.jsonl, aime24: ''}", [], {"mine": os.path.expanduser("~/rows.jsonl"), "aime24": ""}),
        ("{mine: '${oc.env:POPSD_TEST_ROWS}/a.jsonl'}", [], {"mine": "/rows/a.jsonl"}),
        ("[aime24]", ["evaluation.sets.mine=rows.jsonl"], {"aime24": "", "mine": "rows.jsonl"}),
        ("[aime24]", ["evaluation.sets={mine: rows.jsonl}"], {"aime24": "", "mine": "rows.jsonl"}),
        ("{mine: rows.jsonl}", ["evaluation.sets=[aime25]"], {"aime25": ""}),
        ("[aime24]", ["evaluation.sets=[]"], {}),
    ],
)
def test_problem_sets_are_a_list_of_names_or_a_mapping_to_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, overrides: list[str], sets: dict[str, str]
) -> None:
    monkeypatch.setenv("POPSD_TEST_ROWS", "/rows")
    config = load_config(write(tmp_path, f"evaluation:\n  sets: {text}\n"), overrides)
    assert config.evaluation.sets == sets
    assert from_dict_config(to_dict_config(config)).evaluation.sets == sets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[aime24, aime24]", "each name once"),
        ("[[aime24]]", "got evaluation.sets=a list; need a list of texts"),
        ("aime24", "got evaluation.sets=aime24; need a mapping of names"),
        ("{mine: $HOME/rows.jsonl}", "got evaluation.sets.mine='$HOME/rows.jsonl', with a `$`"),
        ("[mine]", "need names among aime24, aime25, hmmt25, math500, gsm8k, or {NAME: PATH} for a file"),
    ],
)
def test_wrong_problem_sets_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path, f"evaluation:\n  sets: {text}\n"))


def test_a_checkpoint_of_an_earlier_version_has_a_list_of_sets() -> None:
    tree = OmegaConf.create({"evaluation": {"sets": ["aime24"]}})
    assert from_dict_config(tree).evaluation.sets == {"aime24": ""}
