"""Reads the rotary embedding from a ``config.json``, in the form of transformers 4 or of transformers 5.

    transformers 4    rope_theta, rope_scaling
    transformers 5    rope_parameters: both in one object; in OLMo-3 that, or one object for each layer type

transformers 4 ignores ``rope_parameters``, so the keys of transformers 4 are computed from it here, and every reader
uses them. A configuration with contradictory keys is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

THETA, SCALING, PARAMETERS = "rope_theta", "rope_scaling", "rope_parameters"

# Defaults of megatron-core's `RotaryEmbedding._apply_scaling`; Megatron-Bridge passes only the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_SCALING_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", *_LLAMA3}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
"""Required and optional keys of ``rope_scaling`` by ``rope_type``."""


class UnsupportedError(ValueError):
    """A configuration requests something that Megatron does not compute. The message follows "got" in a `UserError`."""


def with_rotation(content: Mapping[str, object], *, by_layer: bool) -> dict[str, object]:
    """Adds the keys of transformers 4 for the rotary embedding to the content of a ``config.json``.

    Args:
        content: content of the file; its keys are kept.
        by_layer: whether the architecture has one rotary embedding for each layer type.

    Raises:
        UnsupportedError: ``rope_parameters`` is invalid, or contradicts the older keys.
    """
    parameters = content.get(PARAMETERS)
    if parameters is None:
        return dict(content)
    if not isinstance(parameters, dict):
        raise UnsupportedError(f"{PARAMETERS}={parameters!r}")
    if by_layer:
        parameters = _of_full_attention(parameters)
    theta, scaling = parameters.get(THETA, content.get(THETA)), _scaling(parameters)
    if theta is None:
        raise UnsupportedError(f"{PARAMETERS} without {THETA}")
    if content.get(THETA) not in (None, theta):
        raise UnsupportedError(f"{THETA}={content[THETA]!r} contradicting {PARAMETERS}.{THETA}={theta!r}")
    older = content.get(SCALING)
    if older is not None and (not isinstance(older, dict) or _scaling(older) != scaling):
        raise UnsupportedError(f"{SCALING}={older} contradicting {PARAMETERS}={parameters}")
    return {**content, THETA: theta, SCALING: scaling}


def check_rotation(theta: object, scaling: object, *, rope_types: tuple[str, ...], fixed_llama3: bool) -> None:
    """Refuses a rotary embedding that is not supported.

    Args:
        theta: the value of ``rope_theta``.
        scaling: the value of ``rope_scaling``.
        rope_types: supported values of ``rope_type``.
        fixed_llama3: whether only the factor of `llama3` may differ from megatron-core's defaults.

    Raises:
        UnsupportedError: names the value that is not supported.
    """
    if not _is_number(theta) or theta <= 1:
        raise UnsupportedError(f"{THETA}={theta!r}")
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise UnsupportedError(f"{SCALING}={scaling!r}")
    values = {key: value for key, value in scaling.items() if key not in ("type", "rope_type") and value is not None}
    rope_type = _rope_type(scaling)
    if rope_type not in rope_types:
        raise UnsupportedError(f"{SCALING} with rope_type={rope_type!r}")
    required, optional = _SCALING_KEYS[rope_type]
    if unknown := sorted(values.keys() - required - optional):
        raise UnsupportedError(f"{SCALING} with rope_type={rope_type!r} and {unknown[0]}={values[unknown[0]]!r}")
    if missing := sorted(required - values.keys()):
        raise UnsupportedError(f"{SCALING} with rope_type={rope_type!r} and no {missing[0]}")
    for key, value in values.items():
        least = 1 if key in ("factor", "original_max_position_embeddings") else 0
        if not (isinstance(value, bool) if key == "truncate" else _is_number(value) and value >= least):
            raise UnsupportedError(f"{SCALING}.{key}={value!r}")
    if rope_type == "llama3" and fixed_llama3 and {key: values[key] for key in _LLAMA3} != _LLAMA3:
        raise UnsupportedError(f"{SCALING}={scaling} (only the factor may differ from {_LLAMA3})")


def _of_full_attention(parameters: dict[str, object]) -> dict[str, object]:
    """The parameters of the layers without a window. Layers with a window must have no scaling and the same theta.

    A single object for all layers, which transformers 5.8 to 5.12 write for OLMo-3, applies to the layers without a
    window; OLMo-3 is trained with unscaled embeddings in the others
    (`nemo_popsd.compat.transformers.unscale_windowed_layers`).
    """
    if not any(isinstance(value, dict) for value in parameters.values()):
        return parameters
    full, sliding = parameters.get("full_attention"), parameters.get("sliding_attention")
    if len(parameters) != 2 or not isinstance(full, dict) or not isinstance(sliding, dict):
        raise UnsupportedError(f"{PARAMETERS}={parameters}, which is not one object for each layer type")
    if _scaling(sliding) is not None or sliding.get(THETA, full.get(THETA)) != full.get(THETA):
        raise UnsupportedError(f"{PARAMETERS}.sliding_attention={sliding}")
    return full


def _rope_type(scaling: Mapping[str, object]) -> str:
    types = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(types) == 2 and types[0] != types[1]:
        raise UnsupportedError(f"{SCALING} with rope_type={types[0]!r} and type={types[1]!r}")
    return str(types[0]) if types else "default"


def _scaling(parameters: Mapping[str, object]) -> dict[str, object] | None:
    """The ``rope_scaling`` for these ``rope_parameters``; None for an unscaled rotation of complete heads."""
    rest = {
        key: value for key, value in parameters.items() if key not in (THETA, "type", "rope_type") and value is not None
    }
    if rest.get("partial_rotary_factor") in (1, 1.0):
        del rest["partial_rotary_factor"]
    rope_type = _rope_type(parameters)
    return None if rope_type == "default" and not rest else {"rope_type": rope_type, **rest}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
