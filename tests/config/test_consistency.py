import os
from pathlib import Path

import pytest

from nemo_popsd.config.consistency import (
    check_checkpoint,
    check_evaluation_run,
    check_layout,
    check_model_directory,
    check_output,
    check_training_run,
)
from nemo_popsd.config.loading import save_resolved
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.distillation.config import TokensConfig
from nemo_popsd.errors import UserError
from nemo_popsd.files.ownership import EXPORT, RUN, write_mark
from nemo_popsd.rollout.config import RolloutConfig
from nemo_popsd.training.config import TrainingConfig


@pytest.fixture
def runnable(tmp_path: Path) -> PopsdConfig:
    config = PopsdConfig(output=str(tmp_path / "new" / "run"))
    config.student.source = "nemo_popsd:tiny_reasoner"
    config.data.train.path = "nemo_popsd:tiny_train"
    config.data.validation.path = "nemo_popsd:tiny_validation"
    config.data.validation.columns.answer = "answer"
    return config


def test_a_valid_run_passes_and_nothing_is_created(runnable: PopsdConfig) -> None:
    check_training_run(runnable, world_size=4)
    check_evaluation_run(runnable, world_size=1)
    assert not Path(runnable.output).parent.exists()


def test_settings_of_the_data_are_checked_before_any_model_is_built(runnable: PopsdConfig) -> None:
    runnable.data.validation.answer_pattern = "#### (.+)"
    for check in (check_training_run, check_evaluation_run):
        with pytest.raises(UserError, match=r"data\.validation\.columns\.answer='answer', which overrides it"):
            check(runnable, world_size=1)
    runnable.data.validation.answer_pattern = None
    runnable.data.privileged.view = "answer"
    with pytest.raises(UserError, match=r"neither data\.train\.columns\.answer nor data\.train\.answer_pattern"):
        check_training_run(runnable, world_size=1)
    runnable.data.train.answer_pattern = "#### (.+)"
    check_training_run(runnable, world_size=1)
    runnable.data.train.columns.reference, runnable.data.train.answer_pattern = None, None
    runnable.data.privileged.view = "solution"
    with pytest.raises(UserError, match=r"data\.train\.columns\.reference=null"):
        check_training_run(runnable, world_size=1)
    runnable.distillation.target.family, runnable.data.privileged.view = "reference_free", None
    check_training_run(runnable, world_size=1)
    runnable.distillation.tokens = TokensConfig(wrong=0.5)
    with pytest.raises(UserError, match=r"neither data\.train\.columns\.answer nor data\.train\.answer_pattern"):
        check_training_run(runnable, world_size=1)
    runnable.data.train.columns.answer = "answer"
    check_training_run(runnable, world_size=1)


@pytest.mark.parametrize(("tensor", "prompts", "world"), [(1, 32, 1), (2, 32, 2), (2, 30, 6), (4, 1, 4)])
def test_layouts_that_fit(tensor: int, prompts: int, world: int) -> None:
    config = PopsdConfig()
    config.parallel.tensor, config.training.prompts_per_step = tensor, prompts
    check_layout(config, world_size=world)


@pytest.mark.parametrize(
    ("tensor", "prompts", "world", "message"),
    [
        (2, 32, 1, "parallel.tensor=2 with 1 rank;"),
        (2, 32, 3, "parallel.tensor=2 with 3 ranks;"),
        (2, 32, 6, "with 3 data-parallel replicas .* set training.prompts_per_step=30 or 33"),
        (1, 2, 4, "set training.prompts_per_step=4$"),
    ],
)
def test_layouts_that_do_not_fit(tensor: int, prompts: int, world: int, message: str) -> None:
    config = PopsdConfig()
    config.parallel.tensor, config.training.prompts_per_step = tensor, prompts
    with pytest.raises(UserError, match=message):
        check_layout(config, world_size=world)


def test_the_values_that_a_message_proposes_are_valid() -> None:
    config = PopsdConfig()
    config.training.prompts_per_step, config.training.updates_per_step = 30, 3
    with pytest.raises(UserError, match=r"set training\.prompts_per_step=24 or 36$"):
        check_layout(config, world_size=4)
    config.parallel.tensor, config.parallel.expert = 3, 2
    with pytest.raises(UserError, match=r"a multiple of 6 ranks \(torchrun --nproc-per-node 6\)"):
        check_layout(config, world_size=4)
    config.training.prompts_per_step = 6
    check_layout(config, world_size=6)


def test_the_best_checkpoint_needs_a_metric_that_is_measured(runnable: PopsdConfig) -> None:
    runnable.data.validation.path = ""
    runnable.training.keep_best = 1
    with pytest.raises(UserError, match=r"training\.keep_best=1 .*without data\.validation\.path"):
        check_training_run(runnable, world_size=1)
    runnable.training.best_metric = "train/loss"
    check_training_run(runnable, world_size=1)
    with pytest.raises(UserError, match=r"set training\.best_metric$"):
        TrainingConfig(best_metric="nope")


@pytest.mark.parametrize("source", ["", "no/such/model", "nemo_popsd:tiny_resoner"])
def test_a_missing_student_is_refused(runnable: PopsdConfig, source: str) -> None:
    runnable.student.source = source
    with pytest.raises(UserError, match="nemo_popsd:tiny_reasoner"):
        check_training_run(runnable, world_size=1)


@pytest.mark.parametrize("section", ["train", "validation"])
@pytest.mark.parametrize("path", ["no/such/file.jsonl", "nemo_popsd:tiny"])
def test_missing_data_is_refused(runnable: PopsdConfig, section: str, path: str) -> None:
    getattr(runnable.data, section).path = path
    with pytest.raises(UserError):
        check_training_run(runnable, world_size=1)


def test_training_needs_rows_and_evaluation_needs_problems(runnable: PopsdConfig) -> None:
    runnable.data.validation.path = ""
    check_training_run(runnable, world_size=1)
    with pytest.raises(UserError, match=r"set data\.validation\.path"):
        check_evaluation_run(runnable, world_size=1)
    runnable.data.train.path = ""
    with pytest.raises(UserError, match=r"set data\.train\.path"):
        check_training_run(runnable, world_size=1)


def test_named_sets_replace_the_validation_set(
    runnable: PopsdConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    runnable.data.validation.path = ""
    runnable.evaluation.sets = {"aime24": ""}
    with pytest.raises(UserError, match="problem set aime24"):
        check_evaluation_run(runnable, world_size=1)
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    runnable.evaluation.sets_directory = str(tmp_path)
    check_evaluation_run(runnable, world_size=1)


def test_an_endpoint_needs_one_process_and_no_checkpoint(runnable: PopsdConfig, tmp_path: Path) -> None:
    runnable.evaluation.endpoint.url = "http://localhost:8000/v1"
    check_evaluation_run(runnable, world_size=1)
    with pytest.raises(UserError, match=r"evaluation\.endpoint\.url with 2 ranks"):
        check_evaluation_run(runnable, world_size=2)
    with pytest.raises(UserError, match="--checkpoint"):
        check_evaluation_run(runnable, world_size=1, checkpoint=str(tmp_path))
    runnable.evaluation.top_k = 20
    check_evaluation_run(runnable, world_size=1)
    runnable.evaluation.endpoint.dialect = "openai"
    with pytest.raises(UserError, match=r"evaluation\.top_k=20 with evaluation\.endpoint\.dialect=openai"):
        check_evaluation_run(runnable, world_size=1)


def test_a_missing_checkpoint_is_refused(runnable: PopsdConfig, tmp_path: Path) -> None:
    runnable.student.source = ""
    check_evaluation_run(runnable, world_size=1, checkpoint=str(tmp_path))
    with pytest.raises(UserError, match=r"--checkpoint '.*nothing', which does not exist"):
        check_evaluation_run(runnable, world_size=1, checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="CHECKPOINT"):
        check_checkpoint(str(tmp_path / "nothing"), setting="CHECKPOINT")


def test_an_output_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    check_output(str(tmp_path))
    check_output(str(tmp_path / "a" / "b"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"file is a file; .*set output"):
            check_output(str(path))
    with pytest.raises(UserError, match="output=''"):
        check_output("")


def test_an_output_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # root can write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(UserError, match="cannot be written"):
        check_output(str(tmp_path / "run"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_no_run_wrote_are_neither_mixed_with_a_run_nor_removed(
    runnable: PopsdConfig, overwrite: bool
) -> None:
    output, runnable.overwrite = Path(runnable.output), overwrite
    (output / "checkpoints" / "my_model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints and no \.nemo_popsd to mark them as written by a run"):
        check_training_run(runnable, world_size=1)
    write_mark(output, EXPORT)
    with pytest.raises(UserError, match="has checkpoints and no"):
        check_training_run(runnable, world_size=1)
    write_mark(output, RUN)
    check_training_run(runnable, world_size=1)


def test_a_run_of_an_earlier_version_is_resumed_but_not_removed(runnable: PopsdConfig) -> None:
    output = Path(runnable.output)
    (output / "checkpoints").mkdir(parents=True)
    save_resolved(runnable, output / "config.yaml")
    check_training_run(runnable, world_size=1)
    runnable.overwrite = True
    with pytest.raises(UserError, match="if it is a run of an earlier version, remove it yourself"):
        check_training_run(runnable, world_size=1)


def test_a_foreign_configuration_is_not_replaced(runnable: PopsdConfig) -> None:
    Path(runnable.output).mkdir(parents=True)
    (Path(runnable.output) / "config.yaml").write_text("seed: 7  # my own\n")
    with pytest.raises(UserError, match=r"has a config\.yaml that no run wrote"):
        check_training_run(runnable, world_size=1)


def test_an_export_does_not_overwrite_foreign_files(runnable: PopsdConfig) -> None:
    exported = Path(runnable.output) / "huggingface"
    exported.mkdir(parents=True)
    write_mark(exported.parent, RUN)
    (exported / "weights.bin").write_text("three weeks")
    with pytest.raises(UserError, match=r"huggingface: got a directory without the mark \.nemo_popsd"):
        check_training_run(runnable, world_size=1)
    runnable.training.export_huggingface = False
    check_training_run(runnable, world_size=1)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("setting", ["student.source", "data.train.path", "data.validation.path"])
def test_a_run_does_not_remove_what_it_reads(runnable: PopsdConfig, setting: str, overwrite: bool) -> None:
    inside = Path(runnable.output) / "checkpoints" / "final"
    inside.mkdir(parents=True)
    (inside / "rows.jsonl").write_text("")
    write_mark(Path(runnable.output), RUN)
    runnable.overwrite = overwrite
    *sections, name = setting.split(".")
    owner = runnable
    for section in sections:
        owner = getattr(owner, section)
    setattr(owner, name, str(inside))
    with pytest.raises(UserError, match=f"{setting}=.*(overwrite=true would remove|the run would replace)"):
        check_training_run(runnable, world_size=1)


def test_an_engine_that_cannot_run_is_refused_before_anything_is_created(runnable: PopsdConfig, tmp_path: Path) -> None:
    runnable.rollout.vllm.python = str(tmp_path / "no" / "python")
    check_training_run(runnable, world_size=1)  # not checked for the other engine
    runnable.rollout.engine = "vllm"
    for check in (check_training_run, check_evaluation_run):
        with pytest.raises(UserError, match=r"rollout\.vllm\.python=.*cannot be run.*make vllm-env"):
            check(runnable, world_size=1)
    assert not Path(runnable.output).parent.exists()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.14.1\n")
    python.chmod(0o755)
    runnable.rollout.vllm.python = str(python)
    check_training_run(runnable, world_size=1)
    runnable.rollout.vllm.tensor = 4
    runnable.parallel.tensor = 2
    with pytest.raises(UserError, match=r"rollout\.vllm\.tensor=4 on the 2 ranks of a replica"):
        check_training_run(runnable, world_size=2)
    runnable.rollout.vllm.launcher = ["srun", "--overlap"]
    check_training_run(runnable, world_size=2)


def test_overlap_needs_another_process_and_an_age() -> None:
    with pytest.raises(UserError, match=r"rollout\.overlap=true with rollout\.engine=megatron"):
        RolloutConfig(overlap=True)
    with pytest.raises(UserError, match=r"rollout\.max_age=0 with rollout\.overlap=true"):
        RolloutConfig(overlap=True, engine="vllm", max_age=0)
    assert RolloutConfig(overlap=True, engine="vllm").age_bound == 1
    assert RolloutConfig(tokens_per_step=5, max_age=3).age_bound == 3
    assert RolloutConfig(max_age=3).age_bound == 0, "without overlap or a token budget, every response is on-policy"


def test_a_run_in_place_of_a_model_is_refused_with_its_checkpoint(runnable: PopsdConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("step-000010", "step-000020"):
        (run / "checkpoints" / name).mkdir(parents=True)
    save_resolved(runnable, run / "config.yaml")
    with pytest.raises(UserError, match="it has no complete checkpoint"):
        check_checkpoint(str(run), setting="--checkpoint")
    (run / "checkpoints" / "step-000010" / "manifest.json").touch()
    runnable.student.source = str(run)
    with pytest.raises(UserError, match=r"student\.source '.*', which is the output of a run; .*use .*/step-000010$"):
        check_training_run(runnable, world_size=1)
    (run / "checkpoints" / "final").mkdir()
    (run / "checkpoints" / "final" / "manifest.json").touch()
    with pytest.raises(UserError, match=r"use .*/checkpoints/final$"):
        check_checkpoint(str(run), setting="--checkpoint")
    check_checkpoint(str(run / "checkpoints" / "final"), setting="--checkpoint")


@pytest.mark.parametrize(
    ("setting", "fix"),
    [("--checkpoint", "set student.source to it"), ("CHECKPOINT", "hf-to-nemo"), ("SRC", "hf-to-nemo")],
)
def test_a_model_in_the_other_format_is_refused_with_the_command(setting: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=f"which is a Hugging Face directory; .*{fix}"):
        check_checkpoint(str(tmp_path), setting=setting)
    check_model_directory(str(tmp_path), setting="SRC")
    (tmp_path / "manifest.json").touch()
    check_checkpoint(str(tmp_path), setting=setting)
    with pytest.raises(UserError, match=r"which is a NeMo checkpoint; .*nemo-to-hf"):
        check_model_directory(str(tmp_path), setting="SRC")
