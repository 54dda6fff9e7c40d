"""NeMo's save and restore, on Megatron distributed checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.save import Content, save_nemo
from nemo_popsd.config.loading import from_dict_config, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.models import model_path
from nemo_popsd.files.ownership import refuse_overlap

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from nemo.core import ModelPT


class Saveable(Protocol):
    """The parts of a model that the connector saves."""

    @property
    def settings(self) -> PopsdConfig:
        """The configuration, which names the source of the model."""

    def content(self) -> Content:
        """Weights and configuration, without training state."""


class MegatronSaveRestoreConnector(SaveRestoreConnector):  # type: ignore[misc]  # NeMo has no types
    """Implements `ModelPT.save_to` and `restore_from`; both are collective over all ranks."""

    def save_to(self, model: Saveable, save_path: str) -> str:
        """Write all weights, without training state, to a directory, or to one packed file if it ends in `.nemo`.

        Raises:
            UserError: `save_path` is the source of the model, or contains files that this package did not write; on
                every rank.
        """
        refuse_overlap(
            Path(save_path), {"student.source": model_path(model.settings.student.source)}, setting="save_path"
        )
        save_nemo(save_path, model.content())
        return save_path

    def restore_from(
        self,
        calling_cls: Callable[..., ModelPT],
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> ModelPT | DictConfig:
        """Build a model from a checkpoint, in the layout of the configuration.

        `map_location`, `strict` and `validate_access_integrity` are part of NeMo's signature and not used: weights
        are loaded on the rank's device, and all of them must be present.

        Args:
            calling_cls: the model class.
            restore_path: directory or `.nemo` file.
            override_config_path: YAML file or tree whose values replace those of the checkpoint, such as `parallel`.
            map_location: not used.
            strict: not used.
            return_config: return the configuration without building the model.
            trainer: passed to the model.
            validate_access_integrity: not used.

        Raises:
            UserError: the checkpoint is damaged, or the configuration does not fit it.
        """
        checkpoint = NemoCheckpoint(Path(restore_path))
        config = to_dict_config(checkpoint.config)
        if override_config_path is not None:
            override = (
                override_config_path
                if isinstance(override_config_path, DictConfig)
                else OmegaConf.load(override_config_path)
            )
            config = to_dict_config(from_dict_config(cast(DictConfig, OmegaConf.merge(config, override))))
        if return_config:
            return config
        return calling_cls(cfg=config, trainer=trainer, checkpoint=checkpoint)
