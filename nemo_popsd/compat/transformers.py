"""transformers 4.57 and 5.8 to 5.12."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


def configuration_errors() -> tuple[type[Exception], ...]:
    """Exceptions with which transformers refuses a configuration: Python's own ones; in version 5 one more."""
    errors: tuple[type[Exception], ...] = (AttributeError, KeyError, TypeError, ValueError)
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return errors
    return (*errors, StrictDataclassError)


def saved_tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The tensors of `model` with the names and shapes that `save_pretrained` writes; meta tensors stay so.

    In transformers 4 they are those of the module. transformers 5 has all experts of a layer in one parameter and
    writes a tensor for each expert.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return model.state_dict()
    tensors: Mapping[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    return tensors


def rotary_scaling(config: PretrainedConfig) -> dict[str, Any] | None:
    """The scaling of the rotary embedding with its ``rope_type``; None if the embedding is not scaled.

    transformers 4 has ``rope_scaling``; transformers 5 has ``rope_parameters``, with ``rope_theta`` in it and without
    None for an unscaled embedding.
    """
    parameters: Mapping[str, Any] | None = getattr(config, "rope_parameters", None) or config.rope_scaling
    if parameters is None or parameters.get("rope_type", parameters.get("type")) == "default":
        return None
    return {key: value for key, value in parameters.items() if key != "rope_theta"}


def rotary_theta(config: PretrainedConfig) -> float:
    """The base of the rotary embedding: ``rope_theta``, which transformers 5 has in ``rope_parameters``."""
    parameters: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def without_rotary_scaling(config: PretrainedConfig) -> PretrainedConfig:
    """A shallow copy of `config` with an unscaled rotary embedding."""
    unscaled = copy(config)
    if getattr(config, "rope_parameters", None):
        unscaled.rope_parameters = {"rope_type": "default", "rope_theta": rotary_theta(config)}
    else:
        unscaled.rope_scaling = None
    return unscaled


def unscale_windowed_layers(model: PreTrainedModel) -> None:
    """Gives the layers of an OLMo-3 that have a window the unscaled rotary embedding with which OLMo-3 is trained.

    transformers 4.57 does; transformers 5.8 to 5.12 scales all layers (huggingface/transformers#45945). Other models
    are not changed.
    """
    if model.config.model_type != "olmo3" or rotary_scaling(model.config) is None:
        return
    decoder = model.get_decoder()
    if hasattr(decoder, "rotary_embs"):  # transformers 4.57: one embedding for each layer type
        return
    unscaled = type(decoder.rotary_emb)(without_rotary_scaling(model.config)).to(model.device)

    def replace(
        layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return args, {**kwargs, "position_embeddings": unscaled(args[0], kwargs["position_ids"])}

    for layer, layer_type in zip(decoder.layers, model.config.layer_types, strict=True):
        if layer_type == "sliding_attention":
            layer.register_forward_pre_hook(replace, with_kwargs=True)
