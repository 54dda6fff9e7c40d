"""What `student.source` may name: a Hugging Face directory, a NeMo or NeMo 2 checkpoint, or an embedded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.nemo import NemoCheckpoint, is_nemo_checkpoint
from nemo_popsd.checkpoint.nemo2 import Nemo2Checkpoint, is_nemo2_checkpoint
from nemo_popsd.megatron.student import LoadWeights
from nemo_popsd.testbed.assets import PREFIX, asset


@dataclass(frozen=True)
class Source:
    """An architecture and the weights to begin with."""

    architecture: HuggingFaceModel
    """Model and tokenizer files."""
    load: LoadWeights
    """Fills a plain model."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """The weights by their Hugging Face names, read one at a time, when asked for. Needs no process group."""
    precision: Callable[[], str]
    """`bf16` or `fp32`: the one that holds every number of the weights."""


def open_source(name: str, *, trust_remote_code: bool = False) -> Source:
    """Opens `name`; reads no weights.

    Args:
        name: what `student.source` says.
        trust_remote_code: whether Python files of a Hugging Face directory may be run; without it none is.

    Raises:
        UserError: it is none of the four.
    """
    path = asset(name) if name.startswith(PREFIX) else Path(name)
    if is_nemo_checkpoint(path):
        checkpoint = NemoCheckpoint(path)
        return Source(checkpoint.architecture, checkpoint.load, checkpoint.tensors, checkpoint.precision)
    if is_nemo2_checkpoint(path):
        nemo2 = Nemo2Checkpoint(path)
        return Source(nemo2.architecture, nemo2.load, nemo2.tensors, nemo2.precision)
    model = HuggingFaceModel(path, trust_remote_code=trust_remote_code)
    return Source(model, model.load, model.tensors, model.precision)
