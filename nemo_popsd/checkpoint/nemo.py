"""NeMo checkpoints: a directory, or the same packed as one `.nemo` file.

    model_config.yaml   the resolved configuration of the run
    manifest.json       step, layout and library versions; written last
    huggingface/        config.json, tokenizer, chat template, generation configuration
    weights/            Megatron distributed checkpoint of the student, adapters included

A checkpoint stands on its own: what it was trained from is not needed to evaluate, export or continue from it.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from yaml import YAMLError

from nemo_popsd.checkpoint.distributed_tensors import DistributedTensors
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.tensor_map import MegatronWeights, MergedWeights
from nemo_popsd.checkpoint.weights import load_weights, save_weights
from nemo_popsd.config.loading import from_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.megatron.adapters import Adapters, merged_state
from nemo_popsd.megatron.build import build_gpt
from nemo_popsd.megatron.config import ParallelConfig

_LIBRARIES = ("nemo_popsd", "nemo_toolkit", "megatron-core", "megatron-bridge", "torch", "transformers")


class NemoCheckpoint:
    """A checkpoint to read.

    Attributes:
        config: configuration of the run that wrote it.
        architecture: model and tokenizer.
        step: optimizer steps behind its weights.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens it; a `.nemo` file is unpacked into a temporary directory. Reads no weights.

        Raises:
            UserError: it is incomplete or no checkpoint of ours.
        """
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        self.directory = Path(path)
        if self.directory.is_file():
            self._unpacked = tempfile.TemporaryDirectory(prefix="nemo_popsd_")
            try:
                with tarfile.open(self.directory) as archive:
                    archive.extractall(self._unpacked.name, filter="data")
            except tarfile.TarError as error:
                raise _not_a_checkpoint(path, f"a file that is no tar archive ({error})") from None
            self.directory = Path(self._unpacked.name)
        for name in ("model_config.yaml", "manifest.json", "huggingface", "weights"):
            if not (self.directory / name).exists():
                raise _not_a_checkpoint(path, f"no {name}" if self.directory.is_dir() else "no such file or directory")
        try:
            tree = cast(DictConfig, OmegaConf.load(self.directory / "model_config.yaml"))
            self.step = int(json.loads((self.directory / "manifest.json").read_text())["step"])
        except (json.JSONDecodeError, KeyError, TypeError, YAMLError) as error:
            raise _not_a_checkpoint(path, f"unreadable model_config.yaml or manifest.json ({error!r})") from None
        self.config: PopsdConfig = from_dict_config(tree)
        self.architecture = HuggingFaceModel(self.directory / "huggingface")

    def load_trained(self, model: GPTModel) -> None:
        """Fills the live model, which has adapters if the checkpoint has. Collective over all ranks."""
        load_weights(model, self.directory / "weights")

    def tensors(self) -> Mapping[str, Tensor]:
        """What the student computes with, adapters merged, by Hugging Face names, each read when asked for."""
        weights, student = self.adapters(), self.config.student
        if student.adaptation != "lora":
            return weights
        return MergedWeights(weights, weights, scale=student.lora.alpha / student.lora.rank)

    def adapters(self) -> MegatronWeights:
        """Its weights as they are stored, which tell the factors of each adapter."""
        return MegatronWeights(DistributedTensors(self.directory / "weights"), self.architecture.tensor_map())

    def precision(self) -> str:
        """Of its weights: `bf16` or `fp32`."""
        return self.config.student.precision

    def load(self, model: GPTModel) -> None:
        """Fills a plain model with what the student computes, adapters merged. Collective over all ranks.

        With adapters the model is built a second time while this runs.
        """
        if self.config.student.adaptation != "lora":
            self.load_trained(model)
            return
        parallel = ParallelConfig(tensor=parallel_state.get_tensor_model_parallel_world_size())
        adapted = build_gpt(self.architecture.provider(), self.config.student, parallel)
        Adapters(adapted, self.config.student.lora, seed=0)
        self.load_trained(adapted)
        model.load_state_dict(merged_state(adapted, self.config.student.lora))


def is_nemo_checkpoint(path: str | Path) -> bool:
    """Whether `path` is to be read as a NeMo checkpoint rather than as a Hugging Face directory."""
    return Path(path).suffix == ".nemo" or (Path(path) / "model_config.yaml").is_file()


def save_nemo(path: str | Path, model: GPTModel, architecture: HuggingFaceModel, config: DictConfig, step: int) -> None:
    """Writes a checkpoint of the live model; see `write_nemo`."""
    write_nemo(path, lambda directory: save_weights(model, directory), architecture, config, step)


def write_nemo(
    path: str | Path,
    write_weights: Callable[[Path], None],
    architecture: HuggingFaceModel,
    config: DictConfig,
    step: int,
) -> None:
    """Writes a checkpoint. Collective over all ranks; `path` is on a file system that all ranks share.

    Nothing stands at `path` until all is written. What stood there is kept beside it until the new one is in place.

    Args:
        path: a directory, or a file name ending in `.nemo`, which is packed without compression.
        write_weights: fills an empty directory with the distributed checkpoint; called on every rank.
        architecture: where tokenizer and configuration files are copied from.
        config: the resolved configuration.
        step: optimizer steps behind the weights.
    """
    path = Path(path)
    packed = path.suffix == ".nemo"
    partial = path.with_name(path.name + ".partial")
    writes = dist.get_rank() == 0
    if writes:
        _remove(partial)
        (partial / "weights").mkdir(parents=True)
        (partial / "huggingface").mkdir()
    dist.barrier()
    write_weights(partial / "weights")
    dist.barrier()
    if writes:
        architecture.copy_artifacts(partial / "huggingface", with_tensor_names=True)
        OmegaConf.save(config, partial / "model_config.yaml")
        (partial / "manifest.json").write_text(json.dumps(_manifest(step), indent=2) + "\n")
        if packed:
            archive = partial.with_name(partial.name + ".tar")
            with tarfile.open(archive, "w") as tar:
                tar.add(partial, arcname=".")
            _remove(partial)
            archive.replace(path)
        else:
            _put_in_place(partial, path)
    dist.barrier()


def _put_in_place(new: Path, path: Path) -> None:
    replaced = path.with_name(path.name + ".replaced")
    if path.exists():
        _remove(replaced)
        path.rename(replaced)
    new.rename(path)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _manifest(step: int) -> dict[str, Any]:
    return {
        "format": 1,
        "step": step,
        "layout": {
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "data": parallel_state.get_data_parallel_world_size(),
        },
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _not_a_checkpoint(path: str | Path, got: str) -> UserError:
    return UserError(
        f"checkpoint {path}", got=got, need="a NeMo checkpoint written by nemo_popsd", mend="give another path"
    )
