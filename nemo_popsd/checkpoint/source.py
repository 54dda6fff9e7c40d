"""Opens `student.source`: a Hugging Face directory, a NeMo or NeMo 2 checkpoint, or an embedded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from nemo_popsd.checkpoint.digest import checkpoint_digest, directory_digest, huggingface_digest
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.nemo import NemoCheckpoint, is_nemo_checkpoint
from nemo_popsd.checkpoint.nemo2 import Nemo2Checkpoint, is_nemo2_checkpoint
from nemo_popsd.data.models import model_path
from nemo_popsd.megatron.build import Model
from nemo_popsd.megatron.student import LoadWeights


@dataclass(frozen=True)
class Source:
    """An architecture and its weights."""

    architecture: HuggingFaceModel
    """Configuration and tokenizer of the model."""
    load: LoadWeights
    """Loads the weights into a model without adapters."""
    weights_digest: Callable[[], str]
    """SHA-256 that identifies the weights, independent of the layout. Reads all weights, except of a NeMo checkpoint.
    Collective if there is a process group."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """Returns the weights by Hugging Face names; each tensor is read on access. The call is collective if there is a
    process group, the access is not."""
    precision: Callable[[], str]
    """`bf16` or `fp32`: the precision that represents all weights exactly."""
    checkpoint: NemoCheckpoint | None = None
    """The open checkpoint, if the source is one of nemo_popsd."""


def open_source(name: str, *, trust_remote_code: bool = False) -> Source:
    """Opens a source. Reads no weights.

    Args:
        name: value of `student.source`.
        trust_remote_code: whether Python files of a Hugging Face directory may be run.

    Raises:
        UserError: `name` is not a supported source.
    """
    path = model_path(name)
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
            checkpoint,
        )
    if is_nemo2_checkpoint(path):
        nemo2 = Nemo2Checkpoint(path)
        weights = nemo2.directory / "weights"
        return Source(nemo2.architecture, nemo2.load, lambda: directory_digest(weights), nemo2.tensors, nemo2.precision)
    model = HuggingFaceModel(path, trust_remote_code=trust_remote_code)
    return Source(model, model.load, lambda: huggingface_digest(path), model.tensors, model.precision)


def base_of(checkpoint: NemoCheckpoint, otherwise: str) -> str:
    """Source of a checkpoint's base: the recorded one if it still exists, otherwise `otherwise`."""
    recorded = checkpoint.config.student.source
    return recorded if model_path(recorded).exists() else otherwise


def checked_base(checkpoint: NemoCheckpoint, name: str) -> LoadWeights:
    """A function that loads the base of `checkpoint` into a model without adapters.

    Args:
        checkpoint: records the digest of the base's weights.
        name: source of the base.

    Returns:
        A function that raises `UserError` on every rank if the weights at `name` have another digest.
    """

    def load(model: Model) -> None:
        _opened_base(checkpoint, name).load(model)

    return load


def _opened_base(checkpoint: NemoCheckpoint, name: str) -> Source:
    """Opens the base of `checkpoint` at `name` and checks its digest. Collective if there is a process group."""
    source = open_source(name)
    checkpoint.refuse_other_base(name, source.weights_digest())
    return source
