"""How a ``config.json`` describes the rotation of queries and keys: as transformers 4 does, as 5 does, or both alike.

    transformers 4    rope_theta, rope_scaling
    transformers 5    rope_parameters: both in one object; one for each kind of layer in OLMo-3

The installed transformers 4 ignores ``rope_parameters``. So its two keys are computed here, once, and are what every
reader gets; a configuration that says two things is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

THETA, SCALING, PARAMETERS = "rope_theta", "rope_scaling", "rope_parameters"

# megatron-core's constants (rotary_pos_embedding.py:106), of which Megatron-Bridge passes the factor alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_NUMBERS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", *_LLAMA3}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
"""For each kind of rotation, the keys it needs and those it may have."""


class UnsupportedError(ValueError):
    """What a configuration asks for and Megatron does not compute; the text follows "got"."""


def with_rotation(content: Mapping[str, Any], *, by_layer: bool) -> dict[str, Any]:
    """The content of a ``config.json`` with the keys of transformers 4 for what it says of the rotation.

    Args:
        content: as it is in the file; nothing is taken out of it.
        by_layer: the architecture has one rotation for each kind of layer.

    Raises:
        UnsupportedError: ``rope_parameters`` cannot be read, or says something else than the older keys.
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
        raise UnsupportedError(f"{THETA}={content[THETA]!r} beside {PARAMETERS}.{THETA}={theta!r}")
    older = content.get(SCALING)
    if older is not None and (not isinstance(older, dict) or _scaling(older) != scaling):
        raise UnsupportedError(f"{SCALING}={older} beside {PARAMETERS}={parameters}")
    return {**content, THETA: theta, SCALING: scaling}


def check_rotation(theta: Any, scaling: Any, *, kinds: tuple[str, ...], fixed_llama3: bool) -> None:
    """Refuse a rotation that is not computed.

    Args:
        theta: the value of ``rope_theta``.
        scaling: the value of ``rope_scaling``.
        kinds: those that the architecture is converted with.
        fixed_llama3: of the kind `llama3`, only the factor may differ from megatron-core's numbers.

    Raises:
        UnsupportedError: names what is not computed.
    """
    if not _is_number(theta) or theta <= 1:
        raise UnsupportedError(f"{THETA}={theta!r}")
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise UnsupportedError(f"{SCALING}={scaling!r}")
    numbers = {key: value for key, value in scaling.items() if key not in ("type", "rope_type") and value is not None}
    kind = _kind(scaling)
    if kind not in kinds:
        raise UnsupportedError(f"{SCALING} of the kind {kind!r}")
    needed, possible = _NUMBERS[kind]
    if unknown := sorted(numbers.keys() - needed - possible):
        raise UnsupportedError(f"{SCALING} of the kind {kind!r} with {unknown[0]}={numbers[unknown[0]]!r}")
    if missing := sorted(needed - numbers.keys()):
        raise UnsupportedError(f"{SCALING} of the kind {kind!r} without {missing[0]}")
    for key, value in numbers.items():
        least = 1 if key in ("factor", "original_max_position_embeddings") else 0
        if not (isinstance(value, bool) if key == "truncate" else _is_number(value) and value >= least):
            raise UnsupportedError(f"{SCALING}.{key}={value!r}")
    if kind == "llama3" and fixed_llama3 and {key: numbers[key] for key in _LLAMA3} != _LLAMA3:
        raise UnsupportedError(f"{SCALING}={scaling} (only the factor may differ from {_LLAMA3})")


def _of_full_attention(parameters: dict[str, Any]) -> dict[str, Any]:
    """The rotation of the layers without a window, where those with one have the plain one of the same theta."""
    parts = [parameters.get(kind) for kind in ("full_attention", "sliding_attention")]
    if len(parameters) != 2 or not all(isinstance(part, dict) for part in parts):
        raise UnsupportedError(f"{PARAMETERS}={parameters}, which is not one object for each kind of layer")
    full, sliding = parts
    assert full is not None
    assert sliding is not None
    if _scaling(sliding) is not None or sliding.get(THETA, full.get(THETA)) != full.get(THETA):
        raise UnsupportedError(f"{PARAMETERS}.sliding_attention={sliding}")
    return full


def _kind(scaling: Mapping[str, Any]) -> str:
    kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise UnsupportedError(f"{SCALING} of the kinds {kinds[0]!r} and {kinds[1]!r}")
    return str(kinds[0]) if kinds else "default"


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``rope_scaling`` is for these parameters; None for the plain rotation over whole heads."""
    rest = {
        key: value for key, value in parameters.items() if key not in (THETA, "type", "rope_type") and value is not None
    }
    if rest.get("partial_rotary_factor") in (1, 1.0):
        del rest["partial_rotary_factor"]
    kind = _kind(parameters)
    return None if kind == "default" and not rest else {"rope_type": kind, **rest}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
