"""Compares names and shapes of the weights for vLLM with those of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_popsd.errors import UserError
from nemo_popsd.megatron.config import LoRAConfig
from nemo_popsd.rehearsal.handover import Handover, adapter_shapes, of_stage, rehearse_handover

TENSORS = {"embed": torch.zeros(4, 2), "norm": torch.zeros(2)}
SHAPES: dict[str, tuple[int, ...]] = {"embed": (4, 2), "norm": (2,)}
WEIGHTS: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (9, 8),
    "model.layers.0.self_attn.q_proj.weight": (6, 8),
    "model.layers.0.self_attn.q_proj.bias": (6,),
    "model.layers.11.mlp.down_proj.weight": (8, 5),
    "model.norm.weight": (8,),
}


def test_equal_names_and_shapes_are_counted() -> None:
    assert rehearse_handover(TENSORS.items(), SHAPES, adapters=True) == Handover(True, 2, 4 * (8 + 2))


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({**SHAPES, "head": (4, 2)}, r"got no head; need head \[4, 2\]"),
        ({**SHAPES, "norm": (3,)}, r"got norm \[2\]; need norm \[3\]"),
        ({"embed": (4, 2)}, r"got norm \[2\]; need no norm"),
    ],
)
def test_other_names_and_shapes_are_refused(expected: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rehearse_handover(TENSORS.items(), expected, adapters=False)


def test_a_tensor_that_comes_twice_is_refused() -> None:
    with pytest.raises(UserError, match="got norm twice; need each tensor once"):
        rehearse_handover([*TENSORS.items(), ("norm", TENSORS["norm"])], SHAPES, adapters=False)


def test_adapters_have_pefts_names() -> None:
    found = adapter_shapes(WEIGHTS, LoRAConfig(rank=3, targets=["linear_qkv", "linear_fc2"]))
    assert found == {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (3, 8),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (6, 3),
        "base_model.model.model.layers.11.mlp.down_proj.lora_A.weight": (3, 5),
        "base_model.model.model.layers.11.mlp.down_proj.lora_B.weight": (8, 3),
    }


def test_a_stage_has_its_layers_and_its_ends() -> None:
    def chunk(*layers: int, first: bool = False, last: bool = False) -> Any:
        decoder = SimpleNamespace(layers=[SimpleNamespace(layer_number=layer + 1) for layer in layers])
        return SimpleNamespace(decoder=decoder, pre_process=first, post_process=last)

    def names(*chunks: Any) -> list[str]:
        return [name.removeprefix("model.") for name in of_stage(WEIGHTS, chunks)]

    assert names(chunk(0, first=True)) == [
        "embed_tokens.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.bias",
    ]
    assert names(chunk(1)) == []
    assert names(chunk(1), chunk(11, last=True)) == ["layers.11.mlp.down_proj.weight", "norm.weight"]
