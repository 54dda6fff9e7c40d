"""NeMo's save and restore, on Megatron distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf

from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.checkpoint.save import Content, save_nemo
from nemo_popsd.config.loading import from_dict_config, to_dict_config
from nemo_popsd.embedded.names import local_path
from nemo_popsd.files.ownership import refuse_overlap


class MegatronSaveRestoreConnector(SaveRestoreConnector):
    """What `ModelPT.save_to` and `restore_from` call; every rank takes part in both."""

    def save_to(self, model: Any, save_path: str) -> str:
        """Writes a directory, or one packed file where `save_path` ends in `.nemo`: all weights, no training state.

        Raises:
            UserError: on every rank, if `save_path` is what the model was read from, or is not ours to replace.
        """
        refuse_overlap(
            Path(save_path), {"student.source": local_path(model.settings.student.source)}, setting="save_path"
        )
        content = Content(
            models=model.student.chunks,
            architecture=model.architecture,
            config=to_dict_config(model.settings),
            step=model.completed_steps,
            base=model.base,
        )
        save_nemo(save_path, content)
        return save_path

    def restore_from(
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """Builds a model from a checkpoint, in the layout that the configuration says.

        `map_location`, `strict` and `validate_access_integrity` are NeMo's; here weights go to the rank's device, all
        of them or none.

        Args:
            calling_cls: the model class.
            restore_path: directory or `.nemo` file.
            override_config_path: YAML file or tree whose values replace those of the checkpoint, `parallel` say.
            map_location: not used.
            strict: not used.
            return_config: return the configuration and build nothing.
            trainer: handed to the model.
            validate_access_integrity: not used.
        """
        checkpoint = NemoCheckpoint(Path(restore_path))
        config = to_dict_config(checkpoint.config)
        if override_config_path is not None:
            override: Any = override_config_path
            if not isinstance(override, DictConfig):
                override = OmegaConf.load(override)
            config = to_dict_config(from_dict_config(cast(DictConfig, OmegaConf.merge(config, override))))
        if return_config:
            return config
        return calling_cls(cfg=config, trainer=trainer, checkpoint=checkpoint)
