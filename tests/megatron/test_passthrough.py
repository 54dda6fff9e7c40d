"""The section `megatron`: fields that are passed through, refused fields with reasons, and their effect on a model."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from nemo_popsd.config.loading import from_dict_config, load_config, to_dict_config
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.installed_fields import SOURCES, installed_fields
from nemo_popsd.megatron.passthrough import _HOW, _REASONS, MegatronConfig, refusal
from nemo_popsd.megatron.plain_fields import DEFAULT_ONLY, IMPLEMENTED
from tests.harness import run_ranks
from tests.tiny_models import build_student, save_tiny_model


def _imported(section: str) -> set[str]:
    import importlib

    found: set[str] = set()
    for file, name in SOURCES[section]:
        module = importlib.import_module("megatron.core." + file.removesuffix(".py").replace("/", "."))
        found |= {item.name for item in dataclasses.fields(getattr(module, name))}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("section", SOURCES)
def test_the_fields_are_those_of_the_installed_classes(section: str) -> None:
    assert set(installed_fields(section)) == _imported(section)


@pytest.mark.parametrize("section", SOURCES)
def test_every_field_is_allowed_or_refused_with_a_reason(section: str) -> None:
    fields = installed_fields(section)
    allowed = {name for name, kind in fields.items() if not refusal(section, name, kind)}
    assert {"model": "moe_router_dtype", "ddp": "average_in_collective", "optimizer": "pin_cpu_grads"}[
        section
    ] in allowed
    patterns = [pattern for several in _REASONS[section].values() for pattern in several.split()]
    assert len(patterns) > 5
    for name in fields:
        assert sum(fnmatchcase(name, pattern) for pattern in patterns) <= 1, f"{name}: one reason"
    for name in allowed:
        assert fields[name].settable, name
        assert section != "model" or name in _HOW.split() or name not in IMPLEMENTED | DEFAULT_ONLY, name


def test_nothing_that_the_builder_sets_may_be_set() -> None:
    """`build_chunks`, `wrap_for_training` and `StudentOptimizer` would have a value of theirs replaced."""
    import ast
    import inspect

    from nemo_popsd.megatron import build, optimizer

    tree = ast.parse(inspect.getsource(build))
    assigned = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "provider"
    }
    model = installed_fields("model")
    free = {name for name in assigned & set(model) if not refusal("model", name, model[name])}
    assert assigned >= {"tensor_model_parallel_size", "recompute_granularity"}
    assert free == set()
    for section, call in (("ddp", "DistributedDataParallelConfig"), ("optimizer", "MegatronOptimizerConfig")):
        calls = [n for n in ast.walk(ast.parse(inspect.getsource(optimizer))) if isinstance(n, ast.Call)]
        [made] = [node for node in calls if ast.unparse(node.func) == call]
        given = {keyword.arg for keyword in made.keywords if keyword.arg}
        fields = installed_fields(section)
        assert len(given) >= 5
        assert {name for name in given if not refusal(section, name, fields[name])} == set()


@pytest.mark.parametrize(
    ("section", "name", "text", "message"),
    [
        (
            "model",
            "moe_router_dtyp",
            "fp32",
            r"unknown key megatron\.model\.moe_router_dtyp.*nearest is moe_router_dtype",
        ),
        ("model", "average_in_collective", "true", r"megatron\.ddp has this one"),
        ("model", "tensor_model_parallel_size", "2", r"set parallel\.\* instead"),
        ("model", "hidden_size", "64", "the checkpoint's architecture decides"),
        ("model", "hidden_dropout", "0.1", "no dropout"),
        ("model", "fp8", "hybrid", r"set fp8\.\* instead"),
        ("model", "fp8_param", "true", "weights, attention and output matrix stay bf16"),
        ("model", "qk_clip", "true", "it changes what a layer computes"),
        ("model", "init_method", "x", r"a configuration cannot hold its value \(Optional\[Callable\]\)"),
        ("model", "moe_router_dtype", "fp8", r"need fp32 or fp64 or null"),
        ("model", "deterministic_mode", "1", "need true or false"),
        ("ddp", "use_megatron_fsdp", "true", "Megatron-FSDP is not supported"),
        ("ddp", "bucket_size", "3", r"set optimizer\.\* instead"),
        ("optimizer", "optimizer", "sgd", "the optimizer is AdamW"),
    ],
)
def test_refused_by_name_with_the_reason(section: str, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MegatronConfig(**{section: {name: text}})


def test_values_have_the_types_of_their_fields() -> None:
    config = MegatronConfig(
        model={"moe_router_dtype": "null", "min_offloaded_tensor_size": "7", "config_logger_dir": "logs"},
        optimizer={"log_num_zeros_in_grad": "true"},
    )
    assert config.values("model") == {
        "moe_router_dtype": None,
        "min_offloaded_tensor_size": 7,
        "config_logger_dir": "logs",
    }
    assert config.values("optimizer") == {"log_num_zeros_in_grad": True}


def test_a_file_and_overrides_are_merged_and_kept_in_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("megatron:\n  model: {moe_router_dtype: fp32, moe_permute_fusion: false}\n")
    config = load_config(path, ["megatron.model.moe_permute_fusion=true", "megatron.ddp.average_in_collective=true"])
    assert config.megatron.model == {"moe_router_dtype": "fp32", "moe_permute_fusion": "true"}
    assert config.megatron.ddp == {"average_in_collective": "true"}
    assert from_dict_config(to_dict_config(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("megatron: {model: [a]}", "got megatron.model=a list; need a mapping of names to values"),
        ("megatron: {model: {a: [1]}}", "need names with one value each"),
        ("megatron: {model: {moe_router_dtype: fp32, moe_router_dtype: fp64}}", "moe_router_dtype again"),
        ("megatron: {modle: {}}", "nearest is megatron.model"),
    ],
)
def test_files_with_another_form_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert message in str(refused.value)


def _built(rank: int, world_size: int, source: Path) -> dict[str, Any]:
    from nemo_popsd.megatron.config import OptimizerConfig
    from nemo_popsd.megatron.optimizer import StudentOptimizer

    fields = MegatronConfig(
        model={"disable_parameter_transpose_cache": "true"},
        ddp={"pad_buckets_for_high_nccl_busbw": "true"},
        optimizer={"log_num_zeros_in_grad": "true"},
    )
    student = build_student(source, megatron=fields)
    settings = OptimizerConfig()
    wrapped = student.wrap(settings)
    optimizer = StudentOptimizer(wrapped, settings, steps=1, bf16=False, fields=fields.values("optimizer"))
    with student.base.model() as [base]:
        frozen = base.config.disable_parameter_transpose_cache
    wrong = None
    try:
        build_student(
            source, megatron=MegatronConfig(model={"cpu_offloading": "true", "cpu_offloading_num_layers": "9"})
        )
    except UserError as error:
        wrong = str(error)
    return {
        "model": student.gpt.config.disable_parameter_transpose_cache,
        "frozen": frozen,
        "ddp": wrapped[0].ddp_config.pad_buckets_for_high_nccl_busbw,
        "optimizer": optimizer.megatron.chained_optimizers[0].config.log_num_zeros_in_grad
        if hasattr(optimizer.megatron, "chained_optimizers")
        else optimizer.megatron.config.log_num_zeros_in_grad,
        "wrong": wrong,
    }


def test_values_reach_the_model_its_frozen_copy_ddp_and_the_optimizer(tmp_path: Path) -> None:
    [seen] = run_ranks(_built, 1, save_tiny_model(tmp_path, "qwen3"))
    assert all(seen[name] is True for name in ("model", "frozen", "ddp", "optimizer"))
    assert "megatron.model.cpu_offloading=True" in seen["wrong"]
    assert "offloading can be done only for layers less than 2" in seen["wrong"], "Megatron's own words"
