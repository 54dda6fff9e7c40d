"""Checks that a model has exactly the tensors of its architecture, each with the right shape.

Every reader of a model calls `require_complete` before it builds or writes anything: with the headers of the files of a
Hugging Face directory, or with the index of the weights of a NeMo checkpoint. No tensor data is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from transformers import PretrainedConfig

from nemo_popsd.compat.transformers import saved_tensors
from nemo_popsd.errors import UserError

_FIRST, _HEAD = "model.layers.0.", "lm_head.weight"
_MOST_NAMED = 3


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a Hugging Face model, without the output matrix if it is tied to the embedding.

    Transformers builds the model on the meta device with one layer; all layers have the same tensors.

    Args:
        config: transformers configuration of a family in `nemo_popsd.checkpoint.model_families`.
    """
    from transformers import AutoModelForCausalLM

    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    if getattr(single, "layer_types", None):
        single.layer_types = single.layer_types[:1]
    with torch.device("meta"):
        built = saved_tensors(AutoModelForCausalLM.from_config(single, attn_implementation="eager"))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in built.items():
        layers = config.num_hidden_layers if name.startswith(_FIRST) else 1
        shapes |= {name.replace(_FIRST, f"model.layers.{layer}.", 1): tuple(tensor.shape) for layer in range(layers)}
    if config.tie_word_embeddings:
        shapes.pop(_HEAD, None)
    return shapes


def require_complete(
    what: str,
    config: PretrainedConfig,
    present: Mapping[str, tuple[int, ...] | None],
    *,
    files: Mapping[str, str],
    fix: str,
) -> None:
    """Refuse tensors that are not those of the architecture.

    Args:
        what: description of the model, for the message.
        config: the transformers configuration.
        present: shape of each tensor by name; None if only the name is known. A tied output matrix is optional.
        files: file of each tensor by name, for the message.
        fix: how to fix the model, for the message.

    Raises:
        UserError: a tensor is missing, has the wrong shape, or does not belong to the architecture.
    """
    expected = expected_shapes(config)
    known = {**expected, _HEAD: (config.vocab_size, config.hidden_size)}

    def refused(got: str) -> UserError:
        return UserError(
            what,
            got=got,
            need=f"the {len(expected)} tensors of {', '.join(config.architectures or ())} in config.json",
            fix=fix,
        )

    if missing := sorted(expected.keys() - present.keys()):
        raise refused(f"no tensor {_some(missing)}")
    if unexpected := sorted(present.keys() - known.keys()):
        file = f" in {files[unexpected[0]]}" if unexpected[0] in files else ""
        raise refused(f"a tensor {_some(unexpected)}{file}, which the architecture does not have")
    for name, shape in sorted(present.items()):
        if shape is not None and shape != known[name]:
            if shape[1:] == known[name][1:] and known[name][0] == config.vocab_size:
                raise refused(f"{name} with {shape[0]} vocabulary entries and vocab_size={config.vocab_size}")
            raise refused(f"{name} of the shape {list(shape)} instead of {list(known[name])}")


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
