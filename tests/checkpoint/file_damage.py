"""Random damage to any file of a model, and a payload that leaves a mark if it is run."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG = "model.safetensors", "config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3359472\n"
Change = Callable[[random.Random, Path], str]
"""Changes a folder at random, and returns a description of the change."""


class Payload:
    """Unpickling it runs a command that creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


def _choose_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()))


def truncate_file(rng: random.Random, folder: Path) -> str:
    """Truncates a file at a random length."""
    file = _choose_file(rng, folder)
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) or 1)])
    return f"cut {file.name}"


def flip_bytes(rng: random.Random, folder: Path) -> str:
    """Overwrites up to 200 random bytes of a file."""
    file = _choose_file(rng, folder)
    content = bytearray(file.read_bytes() or b"x")
    for _ in range(rng.choice((1, 8, 200))):
        content[rng.randrange(min(len(content), rng.choice((64, 4096, len(content)))))] = rng.randrange(256)
    file.write_bytes(content)
    return f"flip bytes of {file.name}"


def overwrite_file(rng: random.Random, folder: Path) -> str:
    """Replaces the content of a file by unrelated bytes."""
    file = _choose_file(rng, folder)
    file.write_bytes(rng.choice((b"", POINTER, b"\0" * 5000, rng.randbytes(5000), b"[" * 100_000, b"{}", b"[]", b"1")))
    return f"fill {file.name}"


def remove_file(rng: random.Random, folder: Path) -> str:
    """Removes a file."""
    file = _choose_file(rng, folder)
    file.unlink()
    return f"remove {file.name}"


def replace_by_special_file(rng: random.Random, folder: Path) -> str:
    """Replaces a file by a pipe, a folder or a link."""
    file = _choose_file(rng, folder)
    file.unlink()
    kind = rng.choice(("pipe", "/dev/zero", "nowhere", "..", "folder", "../outside/secret"))
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(kind if kind.startswith("/") else folder / kind)
    return f"{file.name} is {kind}"


VALUES = (
    *(0, -1, 1, 2, 3, 7, 1 << 20, 10**9, 10**13, 1 << 70, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf")),
    *(None, True, False, "", "x", "2", "../../x", [], {}, [1], {"a": 1}, [[]], {"rope_type": "yarn"}),
)


def change_json_value(rng: random.Random, folder: Path) -> str:
    """Changes, removes or adds one value in a JSON file."""
    file = rng.choice(sorted(folder.rglob("*.json")))
    content: Any = json.loads(file.read_text())
    inner, path = content, []
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        key = rng.choice(keys)
        path.append(key)
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.3:
            kind = rng.choice(("set", "set", "set", "remove", "add"))
            if kind == "remove":
                del inner[key]
            elif kind == "add" and isinstance(inner, dict):
                inner[rng.choice(("x", "quantization_config", "rope_parameters", "auto_map", "sliding_window"))] = (
                    rng.choice(VALUES)
                )
            else:
                inner[key] = rng.choice(VALUES)
            break
        inner = inner[key]
    file.write_text(json.dumps(content))
    return f"{file.name} {path}"
