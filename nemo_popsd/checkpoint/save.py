"""Writes NeMo checkpoints atomically, optionally in the background.

stage    all ranks      make the partial directory, check free space, plan, copy to CPU memory
write    each rank      write, flush and hash its weights and optimizer pieces; no collectives, any thread
finish   all ranks      write Megatron's metadata; then rank 0 writes small files and the manifest, and renames
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_popsd.checkpoint.archive import pack
from nemo_popsd.checkpoint.contents import ARCHITECTURE, CONFIG_NAME, STATE, WEIGHTS, missing_files
from nemo_popsd.checkpoint.distributed_tensors import Piece
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.manifest import file_digest, file_digests, list_files, write_manifest
from nemo_popsd.checkpoint.shares import Share, gathered, summary
from nemo_popsd.checkpoint.training_state import Copies, StagedState
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
from nemo_popsd.files.attempts import library_versions
from nemo_popsd.files.ownership import CHECKPOINT, refuse_foreign_archive
from nemo_popsd.megatron.interfaces import ModelChunk
from nemo_popsd.parallel.agreement import raise_on_all_ranks
from nemo_popsd.parallel.distributed import layout

_PACKED = "packed"
"""File in the partial directory that becomes the archive."""
_ADVICE = {
    "need": "space and permission to write it",
    "fix": "free space, or set output to another file system; older checkpoints are unchanged",
}


@dataclass(frozen=True, kw_only=True)
class Content:
    """Content of a checkpoint."""

    models: Sequence[ModelChunk] = ()
    """This rank's chunks of the model, without wrappers; empty if `pieces` are given."""
    pieces: Sequence[Piece] = ()
    """The weights if there is no model; rank 0 computes them while it writes."""
    architecture: HuggingFaceModel
    """Source of the tokenizer and configuration files."""
    config: DictConfig
    """The resolved configuration."""
    step: int
    """Number of completed training steps."""
    base: Mapping[str, str] | None = None
    """`source` of the weights that training started from, and their digest as `fingerprint`."""
    adapters_only: bool = False
    """Whether only the adapters are saved."""
    optimizer: MegatronOptimizer | None = None
    """Megatron's optimizer, or None to save no training state."""
    copies: Copies = field(default_factory=dict)
    """Second sets of the trained weights, saved with the training state."""
    random_state: Mapping[str, Tensor] = field(default_factory=dict)
    """State of this rank's random generators, saved with the training state."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Further content of the manifest."""


class PendingSave:
    """A checkpoint that is being written. Every rank constructs one; `finish` is collective.

    Attributes:
        path: path of the complete checkpoint.
        step: number of completed training steps.
        summary: after `finish`, bytes and seconds of the ranks in one line.
    """

    def __init__(self, path: str | Path, content: Content, *, background: bool = False) -> None:
        """Stages the content and starts to write. Collective over all ranks.

        Args:
            path: a directory, or a file name ending in `.nemo`, which is packed without compression; on a file system
                that all ranks share.
            content: what to save.
            background: whether a thread writes copies, so that training continues immediately. Needs host memory for
                the part of this rank.

        Raises:
            UserError: there is not enough space or no permission to write, or files that nemo_popsd did not write are
                at `path` or at a temporary name. No partial files are left.
        """
        self.path = Path(path)
        self.step = content.step
        self._content = content
        self._partial = self.path.with_name(self.path.name + PARTIAL)
        self._owns_partial = False
        self._digests: dict[str, tuple[int, str]] = {}
        self._error: Exception | None = None
        self._state: StagedState | None = None
        self._share = Share()
        self.summary = ""
        self._on_all_ranks(self._make_partial)
        with self._share.timed("staged"):
            self._stage(background)
        self._require_space()
        self._thread = threading.Thread(target=self._write, name=f"save {self.path.name}", daemon=True)
        if background:
            self._thread.start()
        else:
            self._write()

    def _stage(self, background: bool) -> None:
        """Plans and copies the weights and the state. Collective over all ranks."""
        content = self._content
        self._weights: StagedWeights | StagedPieces
        if content.pieces:
            self._weights = StagedPieces(content.pieces, self._partial / WEIGHTS)
        else:
            which = adapter_parameters if content.adapters_only else every_parameter
            self._weights = StagedWeights(content.models, self._partial / WEIGHTS, which=which, copy=background)
        if content.optimizer is not None:
            self._state = StagedState(
                content.models,
                content.optimizer,
                self._partial,
                copies=content.copies,
                random_state=content.random_state,
                copy=background,
            )
        self._share.bytes = self._weights.bytes + (self._state.bytes if self._state else 0)

    @property
    def written(self) -> bool:
        """Whether this rank has finished writing."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Waits until all ranks have written, and renames the checkpoint to `path`. Collective over all ranks.

        Raises:
            UserError: on every rank, if writing failed on any. An earlier checkpoint at `path` is unchanged, and no
                partial files are left.
        """
        if self._thread.ident is not None:
            self._thread.join()
        self._on_all_ranks(self._raise_error)
        written = [(self._digests, self._share)] * dist.get_world_size()
        dist.all_gather_object(written, written[0])
        self._on_all_ranks(self._weights.finish)
        self._on_all_ranks(lambda: self._complete({k: v for digests, _ in written for k, v in digests.items()}))
        self.summary = summary([share for _, share in written])

    def _write(self) -> None:
        try:
            with self._share.timed("written"):
                self._weights.write()
                files = list(self._weights.files)
                if self._state is not None:
                    self._state.write()
                    files += self._state.files
            with self._share.timed("hashed"):
                self._digests = {path.relative_to(self._partial).as_posix(): file_digest(path) for path in files}
        except Exception as error:
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _on_all_ranks(self, action: Callable[[], None]) -> None:
        """Calls `action`; if it fails on any rank, removes the partial files and raises on all ranks."""
        try:
            raise_on_all_ranks(f"checkpoint {self.path}", action, **_ADVICE)
        except Exception:
            if self._owns_partial:
                # No error may escape: the other ranks wait at the barrier. The next save removes what is left.
                with suppress(OSError, UserError):
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
            self._owns_partial = True
            (self._partial / WEIGHTS).mkdir(parents=True)
            (self._partial / ARCHITECTURE).mkdir()
            if self._content.optimizer is not None:
                (self._partial / STATE).mkdir()

    def _require_space(self) -> None:
        """Compares the bytes of all ranks with the free space that rank 0 sees: one gather of objects."""
        needed = sum(share.bytes for share in gathered(self._share)) * (2 if self.path.suffix == ".nemo" else 1)

        def check() -> None:
            free = shutil.disk_usage(self._partial).free
            if dist.get_rank() == 0 and free < needed:
                raise OSError(errno.ENOSPC, f"no space left on the device: {needed:,} bytes needed, {free:,} free")

        self._on_all_ranks(check)

    def _complete(self, digests: dict[str, tuple[int, str]]) -> None:
        """On rank 0, writes the small files and the manifest, and renames the checkpoint."""
        if dist.get_rank() != 0:
            return
        content, partial = self._content, self._partial
        if self._state is not None:
            self._state.finish()
        content.architecture.copy_artifacts(partial / ARCHITECTURE, with_tensor_names=True)
        OmegaConf.save(content.config, partial / CONFIG_NAME)
        files = list_files(partial)
        self._refuse_incomplete(files, digests)
        digests |= file_digests(partial, [name for name in files if name not in digests])
        flush_tree(partial)
        write_manifest(partial, self._facts(), digests)
        if self.path.suffix == ".nemo":
            archive = partial / _PACKED
            pack(partial, archive)
            refuse_foreign_archive(self.path)
            archive.replace(self.path)
            flush_directory(self.path.parent)
            remove_directory(partial, CHECKPOINT)
        else:
            atomic_replace(partial, self.path, CHECKPOINT)

    def _refuse_incomplete(self, files: Sequence[str], digests: Mapping[str, tuple[int, str]]) -> None:
        """Raises if a file is missing that every checkpoint needs, that a rank wrote, or that belongs to the model."""
        ranks = dist.get_world_size() if self._state is not None else 0
        expected = {*digests, *(f"{ARCHITECTURE}/{name}" for name in self._content.architecture.artifacts)}
        if self._state is not None:
            expected |= {f"{STATE}/{name}" for name in self._state.names_of_all_ranks}
        missing = missing_files(files, ranks=ranks) + sorted(expected - set(files))
        if missing:
            raise UserError(
                f"checkpoint {self.path}",
                got=f"no {', '.join(dict.fromkeys(missing))} after all ranks wrote their files",
                need="all files of the checkpoint, on a file system that all ranks share",
                fix="set output to shared storage; older checkpoints are unchanged",
            )

    def _facts(self) -> dict[str, object]:
        content = self._content
        return {
            "step": content.step,
            "weights": "adapters" if content.adapters_only else "whole",
            "base": dict(content.base) if content.base else None,
            "layout": layout(),
            "versions": library_versions(),
            **content.facts,
        }


def save_nemo(path: str | Path, content: Content) -> None:
    """Writes a checkpoint and waits until it is complete; see `PendingSave`. Collective over all ranks."""
    PendingSave(path, content).finish()
