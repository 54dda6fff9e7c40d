"""Finds the source of a function, class or module of a library by its dotted name, without importing it."""

from __future__ import annotations

import ast
from importlib.machinery import PathFinder
from pathlib import Path


def cited_source(name: str) -> str | None:
    """Source text of the object `name`; None if its top-level package is not installed.

    Raises:
        LookupError: the package is installed but does not contain the name.
    """
    parts = name.split(".")
    place, depth = _module(parts)
    if place is None:
        if depth == 0:
            return None
        raise LookupError(name)
    source = place.read_text()
    node: ast.AST = ast.parse(source)
    for part in parts[depth:]:
        node = _member(node, part, name)
    return source if isinstance(node, ast.Module) else ast.get_source_segment(source, node)


def _module(parts: list[str]) -> tuple[Path | None, int]:
    """The file of the longest prefix that is a module, and the length of that prefix."""
    path: list[str] | None = None
    place, depth = None, 0
    for part in parts:
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            break
        depth += 1
        place = Path(spec.origin) if spec.origin else None
        if spec.submodule_search_locations is None:
            break
        path = list(spec.submodule_search_locations)
    return place, depth


def _member(owner: ast.AST, part: str, name: str) -> ast.AST:
    for node in ast.walk(owner):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part and node is not owner:
            return node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == part for target in targets):
                return node
    raise LookupError(f"{name}: no {part}")
