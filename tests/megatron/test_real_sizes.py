"""Models of the sizes that users train, without memory: names, shapes, counts and shards against transformers.

On the meta device, one tensor-parallel rank and every pipeline stage in turn, under torch's process group that sends
nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.harness import LOCAL, run_ranks
from tests.layers import BOTH
from tests.training.layouts import local_name

_MODELS = Path(__file__).parents[2] / "nemo_popsd" / "planning" / "models"
_OLMO3 = {
    "model_type": "olmo3",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 100278,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "max_position_embeddings": 65536,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
PARAMETERS = {
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "Olmo-3-7B": 7_298_011_136,
}
"""Values from the cards and files of the models."""
STAGES = 4
TENSOR = dict.fromkeys(PARAMETERS, 8) | {"Qwen3-30B-A3B": 4}
"""Four key-value heads are split over four ranks at most."""


def _configuration(name: str) -> Any:
    from transformers import AutoConfig

    fields = dict(_OLMO3) if name.startswith("Olmo") else json.loads((_MODELS / f"{name}.json").read_text())
    if "num_experts" in fields:
        fields["norm_topk_prob"] = True
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def whole_shapes(name: str, directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of transformers' model; writes its configuration and tensor names to `directory`."""
    from transformers import AutoModelForCausalLM

    from nemo_popsd.compat.transformers import saved_tensors

    config = _configuration(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in saved_tensors(model).items()}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    (directory / "tensor_names.json").write_text(json.dumps(sorted(shapes)))
    return shapes


@contextmanager
def without_memory(rank: int, size: int) -> Iterator[None]:
    """Context in which this process is one rank of `size` without peers, and models are built on the meta device."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_popsd.runtime.torch_on_cpu import TORCH_ON_CPU

    new_group = dist.new_group

    def silent(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return new_group(ranks=ranks, backend="fake")

    meta = torch.device("meta")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with (
            mock.patch.object(dist, "new_group", silent),
            mock.patch.object(TORCH_ON_CPU.cuda, "current_device", return_value=meta),
            mock.patch("nemo_popsd.megatron.build.device", return_value=meta),
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def observe(rank: int, world_size: int, name: str, directory: Path) -> dict[str, Any]:
    """Shape, and the dimension that is split, of every parameter of all stages, by its name in local layers."""
    from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
    from nemo_popsd.megatron.adapters import full_model_name
    from nemo_popsd.megatron.build import build_chunks
    from nemo_popsd.megatron.config import StudentConfig
    from nemo_popsd.parallel.config import ParallelConfig
    from nemo_popsd.parallel.distributed import initialize

    dist.destroy_process_group()
    shapes = whole_shapes(name, directory)
    source = HuggingFaceModel(directory)
    seen: dict[str, Any] = {"shapes": shapes, "vocabulary": source.vocabulary_tensors(), "parameters": {}}
    seen["map"] = {local_name(tensor.name): tensor.parts for tensor in source.tensor_map().tensors}
    tensor = TENSOR[name]
    parallel = ParallelConfig(tensor=tensor, pipeline=STAGES)
    for stage in range(STAGES):
        with without_memory(stage * tensor, tensor * STAGES):
            initialize(parallel, seed=1)
            provider = source.provider()
            provider.init_model_with_meta_device = True
            with torch.device("meta"):
                [gpt] = build_chunks(provider, StudentConfig(precision="bf16", adaptation="full"), parallel)
            for own, parameter in gpt.named_parameters():
                assert parameter.device.type == "meta", own
                assert parameter.dtype == torch.bfloat16, own
                split = getattr(parameter, "tensor_model_parallel", False)
                seen["parameters"][full_model_name(gpt, local_name(own))] = tuple(parameter.shape), split
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("layers", BOTH)
@pytest.mark.parametrize("name", PARAMETERS)
def test_names_shapes_counts_and_shards_are_those_of_transformers(name: str, layers: str, tmp_path: Path) -> None:
    [seen] = run_ranks(observe, 1, name, tmp_path, layers=layers, timeout=300.0)
    shapes, size = seen["shapes"], TENSOR[name]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == PARAMETERS[name]
    assert seen["parameters"].keys() == seen["map"].keys(), "all parameters, each on one stage"
    multiple, count = 128 * size, 0
    for parameter, parts in seen["map"].items():
        shape, split = seen["parameters"][parameter]
        rows, columns = sum(shapes[part][0] for part in parts), shapes[parts[0]][1:]
        if set(parts) & seen["vocabulary"]:
            rows = math.ceil(rows / multiple) * multiple
        whole = (rows, *columns)
        if not parameter.endswith(NOT_SPLIT):
            # Row-parallel linears are split along their inputs, everything else along the first dimension.
            dimension = 1 if parameter.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
            assert whole[dimension] % size == 0, parameter
            whole = tuple(n // size if d == dimension else n for d, n in enumerate(whole))
        # Transformer Engine marks its weights when it fills them, which it puts off on the meta device.
        assert layers != LOCAL or split == (not parameter.endswith(NOT_SPLIT)), parameter
        assert shape == whole, parameter
        count += sum(torch.Size(shapes[part]).numel() for part in parts)
    assert count == PARAMETERS[name]


NOT_SPLIT = ("layernorm.weight", "router.weight")
"""Norms except OLMo-3's of projections, and routers: complete on every rank."""
