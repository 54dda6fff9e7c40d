"""Reads NeMo checkpoints: a directory, or the directory packed as one `.nemo` file.

    model_config.yaml   the resolved configuration of the run
    manifest.json       step, layout, versions, base, and the SHA-256 of every file; written last
    huggingface/        config.json, tokenizer, chat template, generation configuration
    weights/            Megatron distributed checkpoint of the student: all weights, or only its adapters
    training_state/     optimizer and random state; only in checkpoints from which a run resumes

A checkpoint that has only adapters needs the base of its training, and records the digest of the base's weights.
Any other checkpoint is complete without further files.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from yaml import YAMLError

from nemo_popsd.checkpoint.archive import unpack
from nemo_popsd.checkpoint.completeness import expected_shapes
from nemo_popsd.checkpoint.contents import ARCHITECTURE, CONFIG_NAME, WEIGHTS, missing_files, ranks_of
from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.manifest import FILE_NAME, damaged, read_manifest, refuse_absent, verify, verify_files
from nemo_popsd.checkpoint.tensor_map import MegatronWeights, MergedWeights
from nemo_popsd.checkpoint.weights import adapter_parameters, every_parameter, load_weights
from nemo_popsd.config.loading import from_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import YAML_BYTES, check_yaml, foreign_entry, read_text
from nemo_popsd.megatron.adapters import Adapters, merged_state
from nemo_popsd.megatron.build import Model, build_chunks, chunks_of, layout_of
from nemo_popsd.megatron.student import LoadWeights

_INTERPOLATION = re.compile(r"(?<!\\)\$\{")
_FIX = "copy it again, or use another checkpoint"


class NemoCheckpoint:
    """An open checkpoint.

    Attributes:
        directory: directory with its files; a temporary one if the checkpoint is packed.
        manifest: content of its manifest.
        config: configuration of the run that wrote it.
        architecture: configuration and tokenizer of the model.
        step: number of completed training steps.
        base: `source` of the weights that training started from, and their digest as `fingerprint`; None for a
            converted model.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the checkpoint; a `.nemo` file is unpacked into a temporary directory. Reads no weights.

        Raises:
            DamagedCheckpointError: it is incomplete, damaged, or was not written by nemo_popsd. All files that the
                manifest lists must exist; the small ones are compared with it here, the others by `verify`.
        """
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        self._verified = False
        self.directory = Path(path)
        if self.directory.is_file():
            self._unpacked = tempfile.TemporaryDirectory(prefix="nemo_popsd_")
            unpack(self.directory, Path(self._unpacked.name))
            self.directory = Path(self._unpacked.name)
        if not self.directory.is_dir():
            raise damaged(Path(path), "no such file or directory")
        if reason := foreign_entry(self.directory):
            raise damaged(Path(path), reason)
        self.manifest = read_manifest(self.directory)
        try:
            files, ranks = self.manifest["files"], ranks_of(self.manifest)
            if missing := missing_files(files, ranks=ranks):
                raise damaged(Path(path), f"no {missing[0]} in {FILE_NAME}")
            small = [name for name in files if name.startswith((CONFIG_NAME, f"{ARCHITECTURE}/"))]
            refuse_absent(self.directory, files)
            verify_files(self.directory, self.manifest, small)
            check_yaml(read_text(self.directory / CONFIG_NAME, f"checkpoint {path}", fix=_FIX, limit=YAML_BYTES))
            tree = OmegaConf.load(self.directory / CONFIG_NAME)
            if not isinstance(tree, DictConfig):
                raise TypeError("not a mapping")
            if _INTERPOLATION.search(json.dumps(OmegaConf.to_container(tree, resolve=False), default=str)):
                raise ValueError("an interpolation, which a resolved configuration does not contain")
            self.step = int(self.manifest["step"])
            self.base = self.manifest["base"]
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, YAMLError) as error:
            raise damaged(Path(path), f"unreadable {CONFIG_NAME} or {FILE_NAME} ({error!r})") from None
        self.config: PopsdConfig = from_dict_config(tree)
        self.architecture = HuggingFaceModel(self.directory / ARCHITECTURE)

    @property
    def adapters_only(self) -> bool:
        """Whether the checkpoint contains only adapters, without the weights of the base."""
        return self.manifest["weights"] == "adapters"

    def verify(self) -> None:
        """Compares every file with the manifest, on the first call only. Collective if there is a process group.

        Raises:
            UserError: on every rank; names the damaged files.
        """
        if not self._verified:
            verify(self.directory, self.manifest)
        self._verified = True

    def load_trained(self, model: Model) -> None:
        """Loads the weights into `model`. Collective over all ranks.

        Args:
            model: with adapters if the checkpoint has adapters. If the checkpoint has only adapters, `model` must
                contain the weights of the base.
        """
        self.verify()
        which = adapter_parameters if self.adapters_only else every_parameter
        load_weights(chunks_of(model), self.directory / WEIGHTS, which=which)

    def tensors(self, read_base: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The student's weights with adapters merged, by Hugging Face names; each tensor is read on access.

        Collective if there is a process group: the files are compared with the manifest first.

        Args:
            read_base: called if the checkpoint has only adapters; returns the tensors of the base.
        """
        weights, student = self.adapters(), self.config.student
        if student.adaptation != "lora":
            return weights
        base = read_base() if self.adapters_only else weights
        return MergedWeights(base, weights, scale=student.lora.alpha / student.lora.rank)

    def adapters(self) -> MegatronWeights:
        """The weights as they are stored, with the factors of each adapter.

        Collective if there is a process group: the files are compared with the manifest first.

        Raises:
            UserError: on every rank, if a file is damaged, or a tensor is missing or has the wrong shape.
        """
        self.verify()
        weights = MegatronWeights(DistributedTensors(self.directory / WEIGHTS), self.architecture.tensor_map())
        if not self.adapters_only:
            weights.require_complete(expected_shapes(self.architecture.config))
        if self.config.student.adaptation == "lora":
            weights.require_adapters(self.config.student.lora.targets)
        return weights

    def precision(self) -> str:
        """Precision of its weights: `bf16` or `fp32`."""
        return self.config.student.precision

    def load(self, model: Model, load_base: LoadWeights) -> None:
        """Loads the student's weights with adapters merged. Collective over all ranks.

        If the checkpoint has adapters, a second model with adapters exists while this runs.

        Args:
            model: without adapters.
            load_base: called if the checkpoint has only adapters; loads the base into a model without adapters.
        """
        if self.config.student.adaptation != "lora":
            self.load_trained(model)
            return
        chunks = chunks_of(model)
        adapted = build_chunks(self.architecture.provider(), self.config.student, layout_of(chunks[0]))
        if self.adapters_only:
            load_base(adapted)
        Adapters(adapted, self.config.student.lora, seed=0)
        self.load_trained(adapted)
        for chunk, merged in zip(chunks, adapted, strict=True):
            chunk.load_state_dict(merged_state(merged, self.config.student.lora))

    def refuse_other_base(self, source: str, weights_digest: str) -> None:
        """Refuses weights that are not those that training started from.

        Args:
            source: where the weights are, for the message.
            weights_digest: digest of the weights at `source`.

        Raises:
            UserError: the digests differ; the message names both.
        """
        if self.base is not None and weights_digest != self.base["fingerprint"]:
            raise UserError(
                f"checkpoint {self.directory}",
                got=f"student.source={source!r} with digest {weights_digest[:12]}",
                need=f"the base that it was trained from: {self.base['source']!r} with digest "
                f"{self.base['fingerprint'][:12]}",
                fix="set student.source",
            )


def is_nemo_checkpoint(path: str | Path) -> bool:
    """Whether `path` looks like a NeMo checkpoint rather than a Hugging Face directory."""
    return Path(path).suffix == ".nemo" or (Path(path) / CONFIG_NAME).is_file()
