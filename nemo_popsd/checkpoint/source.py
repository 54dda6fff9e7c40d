"""What `student.source` may name: a Hugging Face directory, a NeMo checkpoint, or an embedded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from nemo_popsd.checkpoint.fingerprint import checkpoint_fingerprint, huggingface_fingerprint
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
    fingerprint: Callable[[], str]
    """Tells the weights from any others, whatever the layout; reads all of them. Collective over all ranks."""


def open_source(name: str) -> Source:
    """Opens `name`; reads no weights.

    Raises:
        UserError: it is none of the three.
    """
    path = asset(name) if name.startswith(PREFIX) else Path(name)
    if is_nemo_checkpoint(path):
        checkpoint = NemoCheckpoint(path)
        load_base = checked_base(checkpoint, checkpoint.config.student.source)

        def load(model: GPTModel) -> None:
            checkpoint.load(model, load_base)

        return Source(checkpoint.architecture, load, lambda: checkpoint_fingerprint(checkpoint.directory))
    model = HuggingFaceModel(path)
    return Source(model, model.load, lambda: huggingface_fingerprint(path))


def base_of(checkpoint: NemoCheckpoint, otherwise: str) -> str:
    """Where the base of a checkpoint lies: where the run found it, or `otherwise` if nothing is there any more."""
    recorded = checkpoint.config.student.source
    return recorded if recorded.startswith(PREFIX) or Path(recorded).exists() else otherwise


def checked_base(checkpoint: NemoCheckpoint, name: str) -> LoadWeights:
    """What fills a plain model with the base that `checkpoint` was trained from.

    Args:
        checkpoint: knows the base's fingerprint.
        name: where the base lies now.

    Returns:
        A function that raises `UserError`, on every rank, if another model lies there.
    """

    def load(model: GPTModel) -> None:
        source = open_source(name)
        checkpoint.refuse_other_base(name, source.fingerprint())
        source.load(model)

    return load
