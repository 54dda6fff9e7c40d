"""What `student.source` may name: a Hugging Face directory, a NeMo checkpoint, or an embedded model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.nemo import NemoCheckpoint, is_nemo_checkpoint
from nemo_popsd.megatron.student import LoadWeights
from nemo_popsd.testbed.assets import PREFIX, asset


@dataclass(frozen=True)
class Source:
    """An architecture and the weights to begin with."""

    architecture: HuggingFaceModel
    """Model and tokenizer files."""
    load: LoadWeights
    """Fills a plain model."""


def open_source(name: str) -> Source:
    """Opens `name`; reads no weights.

    Raises:
        UserError: it is none of the three.
    """
    path = asset(name) if name.startswith(PREFIX) else Path(name)
    if is_nemo_checkpoint(path):
        checkpoint = NemoCheckpoint(path)
        return Source(checkpoint.architecture, checkpoint.load)
    model = HuggingFaceModel(path)
    return Source(model, model.load)
