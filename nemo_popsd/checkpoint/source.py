"""What `student.source` may name: a Hugging Face directory, a NeMo or NeMo 2 checkpoint, or an embedded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nemo_popsd.checkpoint.digest import checkpoint_digest, directory_digest, huggingface_digest
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.nemo import NemoCheckpoint, is_nemo_checkpoint
from nemo_popsd.checkpoint.nemo2 import Nemo2Checkpoint, is_nemo2_checkpoint
from nemo_popsd.embedded.names import PREFIX, asset
from nemo_popsd.megatron.build import Model
from nemo_popsd.megatron.student import LoadWeights


@dataclass(frozen=True)
class Source:
    """An architecture and the weights to begin with."""

    architecture: HuggingFaceModel
    """Model and tokenizer files."""
    load: LoadWeights
    """Fills a plain model."""
    weights_digest: Callable[[], str]
    """Tells the weights from any others, whatever the layout; reads all of them. Collective over all ranks."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """The weights by their Hugging Face names, read one at a time, when asked for. Calling it is collective where there
    is a process group; reading is not."""
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
        recorded = checkpoint.config.student.source
        load_base = checked_base(checkpoint, recorded)

        def load(model: Model) -> None:
            checkpoint.load(model, load_base)

        def tensors() -> Mapping[str, Tensor]:
            return checkpoint.tensors(lambda: _opened_base(checkpoint, recorded).tensors())

        return Source(
            checkpoint.architecture,
            load,
            lambda: checkpoint_digest(checkpoint.directory),
            tensors,
            checkpoint.precision,
        )
    if is_nemo2_checkpoint(path):
        nemo2 = Nemo2Checkpoint(path)
        weights = nemo2.directory / "weights"
        return Source(nemo2.architecture, nemo2.load, lambda: directory_digest(weights), nemo2.tensors, nemo2.precision)
    model = HuggingFaceModel(path, trust_remote_code=trust_remote_code)
    return Source(model, model.load, lambda: huggingface_digest(path), model.tensors, model.precision)


def base_of(checkpoint: NemoCheckpoint, otherwise: str) -> str:
    """Where the base of a checkpoint lies: where the run found it, or `otherwise` if nothing is there any more."""
    recorded = checkpoint.config.student.source
    return recorded if recorded.startswith(PREFIX) or Path(recorded).exists() else otherwise


def checked_base(checkpoint: NemoCheckpoint, name: str) -> LoadWeights:
    """What fills a plain model with the base that `checkpoint` was trained from.

    Args:
        checkpoint: records the digest of the base's weights.
        name: where the base lies now.

    Returns:
        A function that raises `UserError`, on every rank, if another model lies there.
    """

    def load(model: Model) -> None:
        _opened_base(checkpoint, name).load(model)

    return load


def _opened_base(checkpoint: NemoCheckpoint, name: str) -> Source:
    """The base of `checkpoint` at `name`. Collective where there is a process group: reads all of it once."""
    source = open_source(name)
    checkpoint.refuse_other_base(name, source.weights_digest())
    return source
