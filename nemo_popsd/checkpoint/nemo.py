"""NeMo checkpoints: a directory, or the same packed as one `.nemo` file.

    model_config.yaml   the resolved configuration of the run
    manifest.json       step, layout, versions, base, and the SHA-256 of every file; written last
    huggingface/        config.json, tokenizer, chat template, generation configuration
    weights/            Megatron distributed checkpoint of the student: all of it, or its adapters alone
    training_state/     optimizer and random state, in the checkpoints that a run resumes from

A checkpoint with adapters alone needs the base that it was trained from, and records the digest of the base's weights.
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
from nemo_popsd.checkpoint.contents import ARCHITECTURE, CONFIG_NAME, STATE, WEIGHTS, missing_files, ranks_of
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
_MEND = "copy it again, or use another checkpoint"


class NemoCheckpoint:
    """A checkpoint to read.

    Attributes:
        directory: where its files are; a temporary directory if it was packed.
        manifest: what it says of itself.
        config: configuration of the run that wrote it.
        architecture: model and tokenizer.
        step: optimizer steps behind its weights.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens it; a `.nemo` file is unpacked into a temporary directory. Reads no weights.

        Raises:
            DamagedCheckpointError: it is incomplete, damaged or no checkpoint of ours. Files that its
                manifest lists must be there; small ones are compared with it here, the others by `verify`.
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
                raise damaged(Path(path), f"no {missing[0]}, which its {FILE_NAME} does not list either")
            small = [name for name in files if name.startswith((CONFIG_NAME, f"{ARCHITECTURE}/"))]
            refuse_absent(self.directory, files)
            verify_files(self.directory, self.manifest, small)
            check_yaml(read_text(self.directory / CONFIG_NAME, f"checkpoint {path}", fix=_MEND, limit=YAML_BYTES))
            tree = OmegaConf.load(self.directory / CONFIG_NAME)
            if not isinstance(tree, DictConfig):
                raise TypeError("no keys with values")
            if _INTERPOLATION.search(json.dumps(OmegaConf.to_container(tree, resolve=False), default=str)):
                raise ValueError("an interpolation, which a resolved configuration has none of")
            self.step = int(self.manifest["step"])
            self.base: dict[str, str] | None = self.manifest["base"]
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, YAMLError) as error:
            raise damaged(Path(path), f"unreadable {CONFIG_NAME} or {FILE_NAME} ({error!r})") from None
        self.config: PopsdConfig = from_dict_config(tree)
        self.architecture = HuggingFaceModel(self.directory / ARCHITECTURE)

    @property
    def adapters_only(self) -> bool:
        """Whether the weights are the adapters', on a base that lies elsewhere."""
        return self.manifest["weights"] == "adapters"

    @property
    def has_training_state(self) -> bool:
        """Whether a run can be resumed from it."""
        return (self.directory / STATE).is_dir()

    def verify(self) -> None:
        """Compares every file with the manifest, once. Collective where there is a process group.

        Raises:
            UserError: on every rank, naming what is damaged.
        """
        if not self._verified:
            verify(self.directory, self.manifest)
        self._verified = True

    def load_trained(self, model: Model) -> None:
        """Fills the live model, which has adapters if the checkpoint has; if it has them alone, `model` holds the base
        already. Collective over all ranks.
        """
        self.verify()
        which = adapter_parameters if self.adapters_only else every_parameter
        load_weights(chunks_of(model), self.directory / WEIGHTS, which=which)

    def tensors(self, read_base: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What the student computes with, adapters merged, by Hugging Face names, each read when asked for.

        Collective where there is a process group: the files are compared with the manifest first.

        Args:
            read_base: called if the checkpoint holds adapters alone; gives the tensors of their base.
        """
        weights, student = self.adapters(), self.config.student
        if student.adaptation != "lora":
            return weights
        base = read_base() if self.adapters_only else weights
        return MergedWeights(base, weights, scale=student.lora.alpha / student.lora.rank)

    def adapters(self) -> MegatronWeights:
        """Its weights as they are stored, which tell the factors of each adapter.

        Collective where there is a process group: the files are compared with the manifest first.

        Raises:
            UserError: on every rank, if a file is damaged, or a tensor is missing or has another shape.
        """
        self.verify()
        weights = MegatronWeights(DistributedTensors(self.directory / WEIGHTS), self.architecture.tensor_map())
        if not self.adapters_only:
            weights.require_complete(expected_shapes(self.architecture.config))
        if self.config.student.adaptation == "lora":
            weights.require_adapters(self.config.student.lora.targets)
        return weights

    def precision(self) -> str:
        """Of its weights: `bf16` or `fp32`."""
        return self.config.student.precision

    def load(self, model: Model, load_base: LoadWeights) -> None:
        """Fills a plain model with what the student computes, adapters merged. Collective over all ranks.

        With adapters the model is built a second time while this runs.

        Args:
            model: without adapters.
            load_base: called if the checkpoint holds adapters alone; fills a plain model with their base.
        """
        if self.config.student.adaptation != "lora":
            self.load_trained(model)
            return
        plain = chunks_of(model)
        adapted = build_chunks(self.architecture.provider(), self.config.student, layout_of(plain[0]))
        if self.adapters_only:
            load_base(adapted)
        Adapters(adapted, self.config.student.lora, seed=0)
        self.load_trained(adapted)
        for chunk, merged in zip(plain, adapted, strict=True):
            chunk.load_state_dict(merged_state(merged, self.config.student.lora))

    def refuse_other_base(self, source: str, weights_digest: str) -> None:
        """Refuses the weights at `source` unless they are those that this checkpoint was trained from.

        Raises:
            UserError: names both.
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
    """Whether `path` is to be read as a NeMo checkpoint rather than as a Hugging Face directory."""
    return Path(path).suffix == ".nemo" or (Path(path) / CONFIG_NAME).is_file()
