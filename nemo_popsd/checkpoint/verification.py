"""Checks that two sources contain the same model: compares all tensors bit for bit, and the logits.

The tensors are compared by means of the mapping of names. For the logits, transformers computes one side; for the other
side Megatron's model is built and loaded in the layout of this run, as in training. A mapping that is wrong in both
directions leaves the tensors equal, but changes the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from nemo_popsd.checkpoint.conversion import DTYPES
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.source import Source
from nemo_popsd.compat.transformers import unscale_windowed_layers
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.build import build_chunks
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import device, initialize, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest accepted difference of two logits, relative to the greatest logit, by precision. Kernels that sum in another
order differ by about 1e-6 in fp32 and 1e-2 in bf16; a wrong rotation, norm or order of heads by 1e-1 or more."""

_TEXT = (
    "Let x be a positive integer with x² + 3x = 40. Then (x + 8)(x - 5) = 0, so x = 5. Wait, check: 25 + 15 = 40. "
    "def area(r):\n    return 3.14159 * r ** 2\n"
    "Der Beweis folgt durch Induktion über n. 因此答案是 42。 The answer is \\boxed{5}.\n"
)
_TOKENS = 256


@dataclass(frozen=True)
class Verification:
    """Result of a successful comparison."""

    tensors: int
    """Number of tensors that are equal bit for bit (after rounding to the precision)."""
    tokens: int
    """Number of tokens for which logits were compared."""
    text: bool
    """Whether the tokens are text; without a tokenizer they are random ids."""
    difference: float
    """Largest difference of two logits, relative to the greatest."""
    same_choice: float
    """Fraction of positions at which both sides have the same most likely token."""


def verify(
    huggingface: HuggingFaceModel,
    other: Source,
    precision: str,
    *,
    trust_remote_code: bool = False,
    compared: Callable[[], object] = lambda: None,
) -> Verification:
    """Compares a Hugging Face directory with another source of the same model. Collective over all ranks.

    First rank 0 loads the model of transformers; then all ranks load Megatron's model with tensor parallelism over the
    world.

    Args:
        huggingface: the model that transformers loads.
        other: the source that Megatron loads.
        precision: precision of both computations, `bf16` or `fp32`.
        trust_remote_code: whether Python files of the Hugging Face directory may be run.
        compared: called on rank 0 after each tensor.

    Raises:
        UserError: on every rank; names the difference.
    """
    initialize(ParallelConfig(tensor=world_size()), seed=0)
    tensors = other.tensors()
    outcome: list[tuple[list[str], list[int], bool, Tensor | None]] = [([], [], False, None)]
    if dist.get_rank() == 0:
        different = _different_tensors(huggingface, tensors, DTYPES[precision], compared)
        ids, text = _token_ids(huggingface)
        expected = None if different else _transformers_logits(huggingface, ids, DTYPES[precision], trust_remote_code)
        outcome = [(different, ids, text, expected)]
    dist.broadcast_object_list(outcome, src=0)
    different, ids, text, expected = outcome[0]
    if different:
        raise _unequal(huggingface, f"{len(different)} different tensors, the first is {different[0]}")
    assert expected is not None
    logits = _megatron_logits(other, ids, precision)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE[precision]:
        raise _unequal(
            huggingface,
            f"logits that differ by {difference:.2g} of the greatest logit (limit {TOLERANCE[precision]:g})",
        )
    same = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    return Verification(len(huggingface.tensor_names), len(ids), text, difference, same)


def _different_tensors(
    huggingface: HuggingFaceModel, other: Mapping[str, Tensor], dtype: torch.dtype, compared: Callable[[], object]
) -> list[str]:
    files, different = huggingface.tensors(), []
    for name in huggingface.tensor_names:
        if not torch.equal(files[name].to(dtype), other[name].to(dtype)):
            different.append(name)
        compared()
    return different


def _token_ids(model: HuggingFaceModel) -> tuple[list[int], bool]:
    """Up to `_TOKENS` ids of the repeated `_TEXT`, and True; random ids and False if there is no tokenizer."""
    length = min(_TOKENS, getattr(model.config, "max_position_embeddings", _TOKENS))
    try:
        tokenizer = load_tokenizer(model.directory)
    except UserError:
        ids: list[int] = []
    else:
        ids = tokenizer(_TEXT * (1 + _TOKENS // 64), add_special_tokens=False)["input_ids"][:length]
    if ids and max(ids) < model.vocab_size:
        return ids, True
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.vocab_size, (length,), generator=generator).tolist(), False


@torch.no_grad()
def _transformers_logits(
    model: HuggingFaceModel, ids: list[int], dtype: torch.dtype, trust_remote_code: bool
) -> Tensor:
    from transformers import AutoModelForCausalLM

    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model.directory,
        config=model.config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    unscale_windowed_layers(reference)
    module: nn.Module = reference
    logits: Tensor = module.to(device()).eval()(torch.tensor([ids], device=device())).logits
    return logits.float().cpu()


@torch.no_grad()
def _megatron_logits(source: Source, ids: list[int], precision: str) -> Tensor:
    student = StudentConfig(precision=precision, adaptation="full")
    provider, size = source.architecture.provider(), world_size()
    [model] = build_chunks(provider, student, ParallelConfig(tensor=size))
    model.eval()
    source.load([model])
    length = len(ids)
    ids = ids + ids[:1] * (-length % size)  # sequence parallelism splits the length evenly
    input_ids = torch.tensor([ids], device=device())
    positions = torch.arange(len(ids), device=device())[None]
    logits = model(input_ids=input_ids, position_ids=positions, attention_mask=None)
    gathered: Tensor = gather_from_tensor_model_parallel_region(logits)
    return gathered[:, :length, : source.architecture.vocab_size].float().cpu()


def _unequal(model: HuggingFaceModel, got: str) -> UserError:
    return UserError(
        f"verification of {model.directory}",
        got=got,
        need="the same model on both sides",
        fix="do not use the converted model; if the source is intact, report the defect with its config.json",
    )
