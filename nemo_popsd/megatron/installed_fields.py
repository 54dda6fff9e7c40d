"""The fields of megatron-core's configuration classes, read from the source of the installed version.

megatron-core itself is not imported, because that takes seconds and a configuration is checked before.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "model": (
        ("model_parallel_config.py", "ModelParallelConfig"),
        ("transformer/transformer_config.py", "TransformerConfig"),
    ),
    "ddp": (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
    "optimizer": (("optimizer/optimizer_config.py", "OptimizerConfig"),),
}
"""For each section, files within megatron-core and their classes, base classes first."""
_SCALARS = ("bool", "int", "float", "str")
_LONGEST = 200


@dataclass(frozen=True)
class MegatronField:
    """A field of a configuration class."""

    annotation: str
    """Annotation in the source."""
    scalars: frozenset[str]
    """Accepted types among bool, int, float and str."""
    choices: tuple[str, ...]
    """Accepted strings, if the annotation lists them."""
    optional: bool
    """Whether the field accepts null."""

    @property
    def settable(self) -> bool:
        """Whether a configuration file can hold a value."""
        return bool(self.scalars or self.choices)

    def value(self, text: str) -> object:
        """The value that `text` represents.

        Raises:
            ValueError: the field does not accept the value; the message lists accepted values.
        """
        if self.optional and text == "null":
            return None
        if text in self.choices:
            return text
        if "bool" in self.scalars and text in ("true", "false"):
            return text == "true"
        for name, kind in (("int", int), ("float", float)):
            if name in self.scalars:
                try:
                    number = kind(text)
                except ValueError:
                    continue
                if math.isfinite(number) and len(text) <= _LONGEST:
                    return number
        if "str" in self.scalars and text.isprintable() and len(text) <= _LONGEST:
            return text
        names = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a short text"}
        takes = [*self.choices, *(names[kind] for kind in _SCALARS if kind in self.scalars)]
        raise ValueError(" or ".join([*takes, *(["null"] if self.optional else [])]))


@cache
def installed_fields(section: str) -> Mapping[str, MegatronField]:
    """The public fields of `section`, a key of `SOURCES`, by name; empty if megatron-core is not installed."""
    try:
        found = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return {}
    if found is None or not found.submodule_search_locations:
        return {}
    root = Path(found.submodule_search_locations[0])
    fields: dict[str, MegatronField] = {}
    for file, name in SOURCES[section]:
        module = ast.parse((root / file).read_text(encoding="utf-8"))
        [schema] = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
        for node in schema.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
                fields[node.target.id] = _field(node.annotation)
    return fields


def _field(annotation: ast.expr) -> MegatronField:
    scalars: set[str] = set()
    choices: list[str] = []
    optional = False
    for part in _alternatives(annotation):
        if isinstance(part, ast.Name) and part.id in _SCALARS:
            scalars.add(part.id)
        elif isinstance(part, ast.Constant) and part.value is None:
            optional = True
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            choices.append(part.value)
    return MegatronField(ast.unparse(annotation), frozenset(scalars), tuple(choices), optional)


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    """The types in ``Optional[X]``, ``Union[X, Y]`` and ``X | Y``, and the constants in ``Literal[...]``."""
    if isinstance(annotation, ast.BinOp):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inside = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if annotation.value.id == "Optional":
            return [ast.Constant(None), *(part for item in inside for part in _alternatives(item))]
        if annotation.value.id == "Union":
            return [part for item in inside for part in _alternatives(item)]
        if annotation.value.id == "Literal":
            return list(inside)
    return [annotation]
