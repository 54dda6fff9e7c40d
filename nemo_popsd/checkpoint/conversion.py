"""Hugging Face directory to NeMo checkpoint and back, tensor by tensor: no model is built, one shard is in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_popsd.checkpoint.distributed_tensors import Piece
from nemo_popsd.checkpoint.huggingface import SHARD_BYTES, HuggingFaceModel
from nemo_popsd.checkpoint.save import Content, save_nemo
from nemo_popsd.checkpoint.source import Source
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.megatron.config import StudentConfig
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import initialize, world_size

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Precisions by the names that `student.precision` has for them."""


def huggingface_to_nemo(
    source: HuggingFaceModel, output: Path, precision: str, *, written: Callable[[], object] = lambda: None
) -> None:
    """Writes the model as a NeMo checkpoint of step 0. Collective over all ranks, of which rank 0 converts.

    In memory are one parameter and the tensors that it is made of. Nothing stands at `output` until all is written.

    Args:
        source: what to convert.
        output: a directory, or a file name ending in `.nemo`.
        precision: `bf16` or `fp32`; numbers that it does not have are rounded.
        written: called on rank 0 after each parameter.

    Raises:
        UserError: files are damaged, or their tensors are not those of the architecture.
    """
    initialize(ParallelConfig(tensor=world_size()), seed=0)
    pieces = [_telling(piece, written) for piece in source.tensor_map().pieces(source.tensors(), DTYPES[precision])]
    student = StudentConfig(source=str(source.directory.absolute()), precision=precision, adaptation="full")
    config = to_dict_config(PopsdConfig(student=student))
    save_nemo(output, Content(pieces=pieces, architecture=source, config=config, step=0))


def _telling(piece: Piece, written: Callable[[], object]) -> Piece:
    """Calls `written` when `piece` has been computed."""

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
    written: Callable[[], object] = lambda: None,
) -> None:
    """Writes a model as a Hugging Face directory, adapters merged. Collective where there is a process group, of which
    rank 0 converts.

    In memory is one shard. Nothing stands at `output` until all is written; what stood there is replaced.

    Args:
        source: what to convert.
        output: directory to make.
        precision: `bf16` or `fp32`; numbers that it does not have are rounded.
        shard_bytes: size at which a new file is begun.
        written: called on rank 0 after each tensor.

    Raises:
        UserError: files are damaged, or their tensors are not those of the architecture.
    """
    tensors, dtype = source.tensors(), DTYPES[precision]

    def converted(name: str) -> torch.Tensor:
        tensor = tensors[name].to(dtype)
        written()
        return tensor

    stream = ((name, converted(name)) for name in source.architecture.tensor_names)
    if not dist.is_initialized() or dist.get_rank() == 0:
        source.architecture.write(output, stream, dtype=dtype, shard_bytes=shard_bytes)
    if dist.is_initialized():
        dist.barrier()
