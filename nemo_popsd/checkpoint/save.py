"""Writing a NeMo checkpoint: complete or absent, and on request in the background.

stage    all ranks      partial directory, room on the disk, plan, copies in CPU memory
write    each rank      its weights and optimizer pieces, flushed and summed; no collectives, any thread
finish   all ranks      Megatron's metadata; then rank 0: small files, manifest, rename
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_popsd.checkpoint.archive import pack
from nemo_popsd.checkpoint.contents import ARCHITECTURE, CONFIG_NAME, STATE, WEIGHTS, missing_files
from nemo_popsd.checkpoint.distributed_tensors import Piece
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.manifest import digest, digests, list_files, write_manifest
from nemo_popsd.checkpoint.training_state import StagedState
from nemo_popsd.checkpoint.weights import StagedPieces, StagedWeights, adapter_parameters, every_parameter
from nemo_popsd.errors import UserError
from nemo_popsd.files.atomic import (
    PARTIAL,
    atomic_replace,
    flush_directory,
    flush_tree,
    make_partial,
    refuse_occupied,
    remove_directory,
)
from nemo_popsd.files.ownership import CHECKPOINT, refuse_foreign_archive
from nemo_popsd.parallel.agreement import raise_on_all_ranks
from nemo_popsd.parallel.distributed import layout

_LIBRARIES = ("nemo_popsd", "nemo_toolkit", "megatron-core", "megatron-bridge", "torch", "transformers")
_PACKED = "packed"
"""File in the partial directory that becomes the archive."""
_ROOM = {
    "need": "room and the right to write it",
    "fix": "free space, or set output to another file system; what is in memory and older checkpoints are unchanged",
}


@dataclass(frozen=True, kw_only=True)
class Content:
    """What goes into a checkpoint."""

    models: Sequence[GPTModel] = ()
    """This rank's parts of the live model, bare."""
    pieces: Sequence[Piece] = ()
    """The weights where there is no model; rank 0 computes them as it writes."""
    architecture: HuggingFaceModel
    """Whose tokenizer and configuration files go into it."""
    config: DictConfig
    """The resolved configuration."""
    step: int
    """Optimizer steps behind the weights."""
    base: Mapping[str, str] | None = None
    """`source` and `fingerprint` of the weights that training began with."""
    adapters_only: bool = False
    """Leave the base's weights out."""
    optimizer: Any = None
    """Megatron's; with it the training state is written too."""
    random_state: Mapping[str, Tensor] = field(default_factory=dict)
    """This rank's, when the training state is written."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the manifest is to say."""


class PendingSave:
    """A checkpoint that is being written. Every rank has one, and calls its methods together with the others.

    Attributes:
        path: where it will stand.
        step: optimizer steps behind its weights.
    """

    def __init__(self, path: str | Path, content: Content, *, background: bool = False) -> None:
        """Stages everything and begins to write. Collective over all ranks.

        Args:
            path: a directory, or a file name ending in `.nemo`, which is packed without compression; on a file system
                that all ranks share.
            content: what to save.
            background: write copies in a thread; the model may be trained on at once. Needs CPU memory for this
                rank's share.

        Raises:
            UserError: no room, no right to write, or something that is not ours at `path` or at a name that it needs
                while it is written; nothing has been left behind.
        """
        self.path = Path(path)
        self.step = content.step
        self._content = content
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        self._begun = False
        self._sums: dict[str, tuple[int, str]] = {}
        self._error: Exception | None = None
        self._state: StagedState | None = None
        self._together(self._make_partial)
        self._weights: StagedWeights | StagedPieces
        if content.pieces:
            self._weights = StagedPieces(content.pieces, self._partial / WEIGHTS)
        else:
            which = adapter_parameters if content.adapters_only else every_parameter
            self._weights = StagedWeights(content.models, self._partial / WEIGHTS, which=which, copy=background)
        if content.optimizer is not None:
            self._state = StagedState(
                content.models, content.optimizer, self._partial, random_state=content.random_state
            )
        self._refuse_without_room()
        self._thread = threading.Thread(target=self._write, name=f"save {self.path.name}", daemon=True)
        if background:
            self._thread.start()
        else:
            self._write()

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Waits for the writing, and puts the checkpoint in its place. Collective over all ranks.

        Raises:
            UserError: on every rank, if the disk is full or cannot be written on any. What stood at `path` is there
                as before, and nothing is left of the new one.
        """
        if self._thread.ident is not None:
            self._thread.join()
        self._together(self._raise_error)
        gathered: list[dict[str, tuple[int, str]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, self._sums)
        self._together(self._weights.finish)
        self._together(lambda: self._complete({k: v for sums in gathered for k, v in sums.items()}))

    def _write(self) -> None:
        try:
            self._weights.write()
            files = list(self._weights.files)
            if self._state is not None:
                self._state.write()
                files += self._state.files
            self._sums = {path.relative_to(self._partial).as_posix(): digest(path) for path in files}
        except Exception as error:
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _together(self, action: Callable[[], None]) -> None:
        """Does `action`, and on a failure of any rank removes what was written."""
        try:
            raise_on_all_ranks(f"checkpoint {self.path}", action, **_ROOM)
        except Exception:
            if self._begun:
                with suppress(OSError, UserError):  # the others wait; the next save removes it
                    remove_directory(self._partial, CHECKPOINT)
            dist.barrier()
            raise

    def _make_partial(self) -> None:
        if dist.get_rank() == 0:
            if self.path.suffix == ".nemo":
                refuse_foreign_archive(self.path)
            else:
                refuse_occupied(self.path, CHECKPOINT)
            make_partial(self.path, CHECKPOINT)
            self._begun = True
            (self._partial / WEIGHTS).mkdir(parents=True)
            (self._partial / ARCHITECTURE).mkdir()
            if self._content.optimizer is not None:
                (self._partial / STATE).mkdir()

    def _refuse_without_room(self) -> None:
        """All ranks' bytes against what rank 0's file system has left: one gather of numbers."""
        ours = self._weights.bytes + (self._state.bytes if self._state else 0)
        gathered: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(gathered, ours)
        needed = sum(gathered) * (2 if self.path.suffix == ".nemo" else 1)

        def look() -> None:
            free = shutil.disk_usage(self._partial).free
            if dist.get_rank() == 0 and free < needed:
                raise OSError(errno.ENOSPC, f"no space left on the device: {needed:,} bytes needed, {free:,} free")

        self._together(look)

    def _complete(self, sums: dict[str, tuple[int, str]]) -> None:
        """Rank 0: the small files, the manifest, the name."""
        if dist.get_rank() != 0:
            return
        content, partial = self._content, self._partial
        if self._state is not None:
            self._state.finish()
        content.architecture.copy_artifacts(partial / ARCHITECTURE, with_tensor_names=True)
        OmegaConf.save(content.config, partial / CONFIG_NAME)
        files = list_files(partial)
        self._refuse_incomplete(files, sums)
        sums |= digests(partial, [name for name in files if name not in sums])
        flush_tree(partial)
        write_manifest(partial, self._facts(), sums)
        if self.path.suffix == ".nemo":
            archive = partial / _PACKED
            pack(partial, archive)
            refuse_foreign_archive(self.path)
            archive.replace(self.path)
            flush_directory(self.path.parent)
            remove_directory(partial, CHECKPOINT)
        else:
            atomic_replace(partial, self.path, CHECKPOINT)

    def _refuse_incomplete(self, files: Sequence[str], sums: Mapping[str, tuple[int, str]]) -> None:
        """No manifest is written for a checkpoint that lacks anything: of what every checkpoint holds, of what the
        ranks wrote, of the model's own files.
        """
        ranks = dist.get_world_size() if self._state is not None else 0
        expected = {*sums, *(f"{ARCHITECTURE}/{name}" for name in self._content.architecture.artifacts)}
        if self._state is not None:
            expected |= {f"{STATE}/{name}" for name in self._state.names_of_all_ranks}
        missing = missing_files(files, ranks=ranks) + sorted(expected - set(files))
        if missing:
            raise UserError(
                f"checkpoint {self.path}",
                got=f"no {', '.join(dict.fromkeys(missing))} after all ranks have written",
                need="all files of the checkpoint, on a file system that all ranks share",
                fix="set output to shared storage; older checkpoints are unchanged",
            )

    def _facts(self) -> dict[str, Any]:
        content = self._content
        return {
            "step": content.step,
            "weights": "adapters" if content.adapters_only else "whole",
            "base": dict(content.base) if content.base else None,
            "layout": layout(),
            "versions": {name: _version(name) for name in _LIBRARIES},
            **content.facts,
        }


def save_nemo(path: str | Path, content: Content) -> None:
    """Writes a checkpoint and waits for it; see `PendingSave`. Collective over all ranks."""
    PendingSave(path, content).finish()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
