"""Paths of the files that are part of the package, by their names in configurations."""

from __future__ import annotations

from pathlib import Path

from nemo_popsd.errors import UserError

PREFIX = "nemo_popsd:"
"""Prefix of the name of an embedded file in a configuration."""

FOLDER = Path(__file__).parent / "assets"

_ASSETS = {
    "tiny_reasoner": "tiny_reasoner",
    "tiny_train": "tiny_train.jsonl",
    "tiny_validation": "tiny_validation.jsonl",
}


def asset(name: str) -> Path:
    """The path of an embedded model or data set.

    Args:
        name: `nemo_popsd:tiny_reasoner` (a Hugging Face model folder), `nemo_popsd:tiny_train` or
            `nemo_popsd:tiny_validation` (JSONL with `id`, `question`, `reference`, `answer`).

    Raises:
        UserError: the name is unknown.
    """
    path = _ASSETS.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if path is None:
        raise UserError(
            "embedded file",
            got=repr(name),
            need="one of " + ", ".join(PREFIX + known for known in _ASSETS),
            fix="correct the name, or set the path of your own file or folder",
        )
    return FOLDER / path
