"""Random changes to a Hugging Face directory: damaged, contradictory or with code."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.file_damage import CONFIG, VALUES, WEIGHTS, Change, Payload


def change_config(rng: random.Random, folder: Path) -> str:
    """Sets one key of `config.json` to a random value."""
    content = json.loads((folder / CONFIG).read_text())
    key = rng.choice([*content, "rope_parameters", "quantization_config", "auto_map", "partial_rotary_factor"])
    content[key] = rng.choice(VALUES)
    (folder / CONFIG).write_text(json.dumps(content))
    return f"{key}={content[key]!r}"


def change_tensors(rng: random.Random, folder: Path) -> str:
    """Removes, renames or changes one tensor."""
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("drop", "rename", "row", "transpose", "int8", "scalar", "empty", "more"))
    tensor = tensors.pop(name)
    changed = {
        "rename": {f"{name}x": tensor},
        "row": {name: tensor[1:].contiguous()},
        "transpose": {name: tensor.t().contiguous() if tensor.dim() > 1 else tensor[None]},
        "int8": {name: tensor.to(torch.int8)},
        "scalar": {name: torch.tensor(1.0)},
        "empty": {name: torch.zeros(0)},
        "more": {name: tensor, "model.layers.9.x": torch.zeros(2)},
    }
    save_file({**tensors, **changed.get(kind, {})}, folder / WEIGHTS)
    return f"{kind} {name}"


def change_header(rng: random.Random, folder: Path) -> str:
    """Changes the header of the safetensors file."""
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.choice(("length", "offsets", "shape", "dtype", "key", "spaces"))
    if kind == "length":
        length = rng.choice((0, 1, size - 1, size + 1, 1 << 31, 1 << 60, (1 << 64) - 1))
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
        return f"header of length {length}"
    if kind == "key":
        header[rng.choice(("../x", "", "é", name + "\0"))] = header.pop(name)
    elif kind != "spaces":
        key = {"offsets": "data_offsets"}.get(kind, kind)
        header[name][key] = rng.choice(([0, 1 << 40], [5, 1], [-1, 4], [1 << 62, 4], "F32", "X9", [], None, 7))
    text = json.dumps(header).encode() + b" " * (10_000_000 if kind == "spaces" else 0)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"header: {kind}"


def add_wrong_index(rng: random.Random, folder: Path) -> str:
    """Adds an index in which one tensor is in a wrong file."""
    names = sorted(load_file(folder / WEIGHTS))
    index: Any = {"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    wrong = rng.choice(("../outside/secret", "/etc/passwd", "nowhere.safetensors", CONFIG, 7, None, "", "."))
    index["weight_map"][rng.choice([*names, "x"])] = wrong
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"index with {wrong!r}"


def copy_weights(rng: random.Random, folder: Path) -> str:
    """Adds a second file with the same tensors."""
    name = rng.choice(("a.safetensors", "zz.safetensors", "adapter_model.safetensors"))
    shutil.copy(folder / WEIGHTS, folder / name)
    return f"twice: {name}"


def weights_as_pickle(mark: Path) -> Change:
    """Replaces the weights by a pickled payload."""

    def change(rng: random.Random, folder: Path) -> str:
        (folder / WEIGHTS).unlink()
        name = rng.choice(("pytorch_model.bin", "model.safetensors"))
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
        return f"pickle as {name}"

    return change


def add_python_code(mark: Path) -> Change:
    """Adds a Python file to which the configuration refers."""

    def change(rng: random.Random, folder: Path) -> str:
        (folder / "evil.py").write_text(f"import os\nos.system('touch {mark}')\n")
        kind = rng.choice((CONFIG, "tokenizer_config.json"))
        content = json.loads((folder / kind).read_text())
        content["auto_map"] = {
            "AutoConfig": "evil.E",
            "AutoModelForCausalLM": "evil.E",
            "AutoTokenizer": ["evil.E"] * 2,
        }
        if rng.random() < 0.5:
            content["model_type" if kind == CONFIG else "tokenizer_class"] = "Evil"
        (folder / kind).write_text(json.dumps(content))
        return f"code in {kind}"

    return change
