"""Whether the tensors of a model are those of its architecture: all of them, no others, each of its shape.

Every way to read a model goes through `require_complete` before it builds or writes anything: a Hugging Face directory
by the headers of its files, a NeMo checkpoint by the index of its weights. No number is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from nemo_popsd.errors import UserError

_FIRST, _HEAD = "model.layers.0.", "lm_head.weight"
_SHOWN = 3


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a Hugging Face model, without the output matrix where it is the embedding.

    Transformers builds the model without memory, with its first layer alone, since the layers are alike.

    Args:
        config: of a family in `nemo_popsd.checkpoint.families`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    with no_init_weights(), torch.device("meta"):
        built = AutoModelForCausalLM.from_config(one, attn_implementation="eager").state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in built.items():
        layers = config.num_hidden_layers if name.startswith(_FIRST) else 1
        shapes |= {name.replace(_FIRST, f"model.layers.{layer}.", 1): tuple(tensor.shape) for layer in range(layers)}
    if config.tie_word_embeddings:
        shapes.pop(_HEAD, None)
    return shapes


def require_complete(
    what: str, config: Any, held: Mapping[str, tuple[int, ...] | None], *, places: Mapping[str, str], fix: str
) -> None:
    """Refuse tensors that are not those of the architecture.

    Args:
        what: for the message: what holds them.
        config: the transformers configuration.
        held: shape by name; None where only the name is known. A tied output matrix may be there or not.
        places: file by name, for the message.
        fix: for the message.

    Raises:
        UserError: a tensor is missing, has another shape, or does not belong to the architecture.
    """
    expected = expected_shapes(config)
    known = {**expected, _HEAD: (config.vocab_size, config.hidden_size)}

    def refused(got: str) -> UserError:
        return UserError(
            what, got=got, need=f"the {len(expected)} tensors of {config.architectures[0]} in config.json", fix=fix
        )

    if missing := sorted(expected.keys() - held.keys()):
        raise refused(f"no tensor {_some(missing)}")
    if beyond := sorted(held.keys() - known.keys()):
        place = f" in {places[beyond[0]]}" if beyond[0] in places else ""
        raise refused(f"a tensor {_some(beyond)}{place}, which the architecture has not")
    for name, shape in sorted(held.items()):
        if shape is not None and shape != known[name]:
            words = f"{name} of the shape {list(shape)} instead of {list(known[name])}"
            if shape[1:] == known[name][1:] and known[name][0] == config.vocab_size:
                words = f"{shape[0]} rows in {name} with vocab_size={config.vocab_size}"
            raise refused(words)


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
