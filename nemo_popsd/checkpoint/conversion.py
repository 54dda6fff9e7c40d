"""Converts a Hugging Face directory to a NeMo checkpoint and back, tensor by tensor, without building a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_popsd.checkpoint.distributed_tensors import Piece
from nemo_popsd.checkpoint.finite import require_finite
from nemo_popsd.checkpoint.huggingface import SHARD_BYTES, HuggingFaceModel
from nemo_popsd.checkpoint.save import Content, save_nemo
from nemo_popsd.checkpoint.source import Source
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.parallel.agreement import from_rank_zero
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import initialize, world_size

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Data type for each value of `student.precision`."""


def huggingface_to_nemo(
    source: HuggingFaceModel, output: Path, precision: str, *, written: Callable[[], object] = lambda: None
) -> None:
    """Writes the model as a NeMo checkpoint of step 0. Collective over all ranks; rank 0 converts.

    Holds one Megatron parameter and its Hugging Face tensors in memory. `output` appears when the checkpoint is
    complete.

    Args:
        source: model to convert.
        output: a directory, or a file name ending in `.nemo`.
        precision: `bf16` or `fp32`, to which the weights are rounded.
        written: called on rank 0 after each parameter.

    Raises:
        UserError: files are damaged, or their tensors are not those of the architecture.
    """
    initialize(ParallelConfig(tensor=world_size()), seed=0)
    pieces = [
        _with_progress(piece, written) for piece in source.tensor_map().pieces(source.tensors(), DTYPES[precision])
    ]
    student = StudentConfig(source=str(source.directory.absolute()), precision=precision, adaptation="full")
    config = to_dict_config(PopsdConfig(student=student))
    save_nemo(output, Content(pieces=pieces, architecture=source, config=config, step=0))


def _with_progress(piece: Piece, written: Callable[[], object]) -> Piece:
    """A copy of `piece` that calls `written` after it is computed."""

    def make() -> torch.Tensor:
        tensor = piece.make()
        written()
        return tensor

    return replace(piece, make=make)


def to_huggingface(
    source: Source,
    output: Path,
    precision: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
    written: Callable[[], object] = lambda: None,
) -> None:
    """Writes a model as a Hugging Face directory, with adapters merged. Collective if there is a process group; rank 0
    converts.

    Holds one shard in memory. `output` appears when all files are complete; an earlier export there is replaced.

    Args:
        source: model to convert.
        output: directory to write.
        precision: `bf16` or `fp32`, to which the weights are rounded.
        shard_bytes: size at which a new file starts.
        card: text of the model card; None writes none.
        written: called on rank 0 after each tensor.

    Raises:
        UserError: on every rank, if files are damaged, their tensors are not those of the architecture, or a weight is
            NaN or Inf.
    """
    tensors, dtype = source.tensors(), DTYPES[precision]
    what = f"conversion to {output}"

    def converted(name: str) -> torch.Tensor:
        tensor = tensors[name].to(dtype)
        written()
        return tensor

    def write() -> None:
        stream = ((name, converted(name)) for name in source.architecture.tensor_names)
        source.architecture.write(output, require_finite(what, stream), dtype=dtype, shard_bytes=shard_bytes, card=card)

    if not dist.is_initialized():
        write()
    else:
        from_rank_zero(what, write, need="space and permission to write it", fix="free space, or give another output")
