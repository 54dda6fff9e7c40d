"""Damaged and hostile models, drawn at random: each is read, or refused in one line; nothing hangs, runs or escapes.

POPSD_HOSTILE_CASES=100 POPSD_HOSTILE_SEED=7 pytest tests/checkpoint/test_hostile.py draws that many of each of three.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_popsd.checkpoint.conversion import huggingface_to_nemo
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.manifest import file_digests, list_files, read_manifest, write_manifest
from nemo_popsd.embedded.names import asset
from tests.command_runner import HANGS, run_command
from tests.harness import run_ranks

CASES = int(os.environ.get("POPSD_HOSTILE_CASES", "5"))
SEED = int(os.environ.get("POPSD_HOSTILE_SEED", "1"))
SECONDS = 60.0
WEIGHTS, CONFIG = "model.safetensors", "config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3359472\n"
Change = Callable[[random.Random, Path], str]


class Place:
    """The good models, and where a payload would leave its mark.

    Attributes:
        folder: everything is below it.
        mark: made by any code of a model that runs.
        model: a Hugging Face directory.
        checkpoint: a NeMo checkpoint.
        outside: must stay as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.outside = folder, folder / "mark", folder / "outside"
        self.model = Path(shutil.copytree(asset("nemo_popsd:tiny_reasoner"), folder / "model"))
        self.outside.mkdir()
        (self.outside / "secret").write_text("kept")
        run_ranks(_convert, 1, self.model, folder / "checkpoint", timeout=300.0)
        self.checkpoint = folder / "checkpoint"


def _convert(rank: int, world_size: int, source: Path, output: Path) -> None:
    huggingface_to_nemo(HuggingFaceModel(source), output, "fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("hostile"))


class _Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


# Any file.


def _file(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()))


def _cut(draw: random.Random, folder: Path) -> str:
    file = _file(draw, folder)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) or 1)])
    return f"cut {file.name}"


def _flip(draw: random.Random, folder: Path) -> str:
    file = _file(draw, folder)
    content = bytearray(file.read_bytes() or b"x")
    for _ in range(draw.choice((1, 8, 200))):
        content[draw.randrange(min(len(content), draw.choice((64, 4096, len(content)))))] = draw.randrange(256)
    file.write_bytes(content)
    return f"flip bytes of {file.name}"


def _fill(draw: random.Random, folder: Path) -> str:
    file = _file(draw, folder)
    file.write_bytes(
        draw.choice((b"", POINTER, b"\0" * 5000, draw.randbytes(5000), b"[" * 100_000, b"{}", b"[]", b"1"))
    )
    return f"fill {file.name}"


def _remove(draw: random.Random, folder: Path) -> str:
    file = _file(draw, folder)
    file.unlink()
    return f"remove {file.name}"


def _special(draw: random.Random, folder: Path) -> str:
    file = _file(draw, folder)
    file.unlink()
    kind = draw.choice(("pipe", "/dev/zero", "nowhere", "..", "folder", "../outside/secret"))
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


def _value(draw: random.Random, folder: Path) -> str:
    """Another value somewhere in a JSON file."""
    file = draw.choice(sorted(folder.rglob("*.json")))
    content: Any = json.loads(file.read_text())
    inner, path = content, []
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        key = draw.choice(keys)
        path.append(key)
        if not isinstance(inner[key], dict | list) or not inner[key] or draw.random() < 0.3:
            kind = draw.choice(("set", "set", "set", "remove", "add"))
            if kind == "remove":
                del inner[key]
            elif kind == "add" and isinstance(inner, dict):
                inner[draw.choice(("x", "quantization_config", "rope_parameters", "auto_map", "sliding_window"))] = (
                    draw.choice(VALUES)
                )
            else:
                inner[key] = draw.choice(VALUES)
            break
        inner = inner[key]
    file.write_text(json.dumps(content))
    return f"{file.name} {path}"


# Hugging Face directories.


def _config(draw: random.Random, folder: Path) -> str:
    content = json.loads((folder / CONFIG).read_text())
    key = draw.choice([*content, "rope_parameters", "quantization_config", "auto_map", "partial_rotary_factor"])
    content[key] = draw.choice(VALUES)
    (folder / CONFIG).write_text(json.dumps(content))
    return f"{key}={content[key]!r}"


def _tensors(draw: random.Random, folder: Path) -> str:
    tensors = load_file(folder / WEIGHTS)
    name = draw.choice(sorted(tensors))
    kind = draw.choice(("drop", "rename", "row", "transpose", "int8", "scalar", "empty", "more"))
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


def _header(draw: random.Random, folder: Path) -> str:
    content = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = draw.choice([key for key in header if key != "__metadata__"])
    kind = draw.choice(("length", "offsets", "shape", "dtype", "key", "spaces"))
    if kind == "length":
        length = draw.choice((0, 1, size - 1, size + 1, 1 << 31, 1 << 60, (1 << 64) - 1))
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
        return f"header of length {length}"
    if kind == "key":
        header[draw.choice(("../x", "", "é", name + "\0"))] = header.pop(name)
    elif kind != "spaces":
        key = {"offsets": "data_offsets"}.get(kind, kind)
        header[name][key] = draw.choice(([0, 1 << 40], [5, 1], [-1, 4], [1 << 62, 4], "F32", "X9", [], None, 7))
    text = json.dumps(header).encode() + b" " * (10_000_000 if kind == "spaces" else 0)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"header: {kind}"


def _index(draw: random.Random, folder: Path) -> str:
    names = sorted(load_file(folder / WEIGHTS))
    index: Any = {"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    wrong = draw.choice(("../outside/secret", "/etc/passwd", "nowhere.safetensors", CONFIG, 7, None, "", "."))
    index["weight_map"][draw.choice([*names, "x"])] = wrong
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"index with {wrong!r}"


def _twice(draw: random.Random, folder: Path) -> str:
    name = draw.choice(("a.safetensors", "zz.safetensors", "adapter_model.safetensors"))
    shutil.copy(folder / WEIGHTS, folder / name)
    return f"twice: {name}"


def _pickle(mark: Path) -> Change:
    def change(draw: random.Random, folder: Path) -> str:
        (folder / WEIGHTS).unlink()
        name = draw.choice(("pytorch_model.bin", "model.safetensors"))
        (folder / name).write_bytes(pickle.dumps(_Payload(mark)))
        return f"pickle as {name}"

    return change


def _code(mark: Path) -> Change:
    def change(draw: random.Random, folder: Path) -> str:
        (folder / "evil.py").write_text(f"import os\nos.system('touch {mark}')\n")
        kind = draw.choice((CONFIG, "tokenizer_config.json"))
        content = json.loads((folder / kind).read_text())
        content["auto_map"] = {
            "AutoConfig": "evil.E",
            "AutoModelForCausalLM": "evil.E",
            "AutoTokenizer": ["evil.E"] * 2,
        }
        if draw.random() < 0.5:
            content["model_type" if kind == CONFIG else "tokenizer_class"] = "Evil"
        (folder / kind).write_text(json.dumps(content))
        return f"code in {kind}"

    return change


# NeMo checkpoints whose manifest fits the damage, as that of an attacker does.


def _seal(folder: Path) -> None:
    facts = {key: value for key, value in read_manifest(folder).items() if key not in ("format", "files")}
    write_manifest(folder, facts, file_digests(folder, list_files(folder)))


def _sealed(change: Change) -> Change:
    def changed(draw: random.Random, folder: Path) -> str:
        manifest = (folder / "manifest.json").read_bytes()
        told = change(draw, folder)
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / "manifest.json").write_bytes(manifest)
        # A pipe or a device cannot be summed up.
        if all(path.is_file() or path.is_dir() for path in folder.rglob("*") if str(path.resolve()) != "/dev/zero"):
            _seal(folder)
        return f"sealed: {told}"

    return changed


def _pickles(mark: Path) -> Change:
    def change(draw: random.Random, folder: Path) -> str:
        name = draw.choice(("common.pt", ".metadata", "metadata.json"))
        file = folder / "weights" / name
        kind = draw.choice(("whole", "inside"))
        if name == ".metadata" and kind == "inside":
            metadata = pickle.loads(file.read_bytes())
            metadata.planner_data = _Payload(mark)
            file.write_bytes(pickle.dumps(metadata))
        elif name == "common.pt" and kind == "inside":
            torch.save({"a": _Payload(mark)}, file)
        else:
            file.write_bytes(pickle.dumps(_Payload(mark)))
        return f"pickle in {name}"

    return change


def _less(draw: random.Random, folder: Path) -> str:
    """The index of the weights without a tensor, or with another."""
    file = folder / "weights" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    key = draw.choice(sorted(metadata.state_dict_metadata))
    kind = draw.choice(("drop", "size", "chunks", "rename"))
    entry = metadata.state_dict_metadata.pop(key)
    if kind == "size":
        entry.size = torch.Size([*entry.size[:-1], entry.size[-1] + draw.choice((-1, 1, 10**9))])
    if kind == "chunks":
        entry.chunks = entry.chunks[1:]
    if kind != "drop":
        metadata.state_dict_metadata[key + ("x" if kind == "rename" else "")] = entry
    file.write_bytes(pickle.dumps(metadata))
    return f"index without {key} ({kind})"


def _yaml(mark: Path) -> Change:
    def change(draw: random.Random, folder: Path) -> str:
        file = folder / "model_config.yaml"
        bomb = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
        text, kind = draw.choice(
            (
                (f"name: !!python/object/apply:os.system ['touch {mark}']\n", "tag"),
                ("\n".join(["a0: &a0 [x]", *bomb]), "bomb"),
                ("a: &a [*a]", "cycle"),
                (file.read_text().replace("nemo_popsd:tiny_reasoner", "/etc"), "source"),
                ("- 1\n", "list"),
                ("\0", "zero"),
                ("name: ${oc.env:HOME}\n", "variable"),
                ("name: ${name}\n", "loop"),
            )
        )
        file.write_text(text)
        return f"model_config.yaml: {kind}"

    return change


# Archives.


def _add(tar: tarfile.TarFile, name: str, *, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 4) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size if kind == tarfile.REGTYPE else 0
    tar.addfile(member, io.BytesIO(b"x" * member.size) if member.size else None)


def _archive(draw: random.Random, checkpoint: Path, archive: Path) -> str:
    kind = draw.choice(("member", "member", "cut", "flip", "compressed", "noise", "damaged"))
    if kind == "damaged":
        shutil.copytree(checkpoint, archive.with_suffix(".source"))
        checkpoint = archive.with_suffix(".source")
        kind = _sealed(draw.choice((_cut, _flip, _fill, _remove)))(draw, checkpoint)
    mode: Any = "w:gz" if kind == "compressed" else "w"
    with tarfile.open(archive, mode) as tar:
        tar.add(checkpoint, arcname=".")
        if kind == "member":
            name = draw.choice(("../outside/secret", str(archive.parent / "outside" / "new"), "weights/x", "é" * 200))
            how = draw.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
            _add(tar, name, kind=how, target=draw.choice(("/etc/passwd", "..", str(archive.parent / "outside"))))
            if draw.random() < 0.5:
                _add(tar, f"{name}/secret")
            kind = f"member {name[:20]} of type {how!r}"
    content = bytearray(archive.read_bytes())
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    if kind == "flip":
        for _ in range(draw.choice((1, 50))):
            content[draw.randrange(draw.choice((600, len(content))))] = draw.randrange(256)
    if kind == "noise":
        content = bytearray(draw.randbytes(5000))
    archive.write_bytes(content)
    return kind


def _attempt(place: Place, argv: list[str], told: str) -> None:
    """Runs a command on what was made of a model, and looks at how it ended."""
    log = place.folder / "log"
    status = run_command(argv, log, timeout=SECONDS)
    text = log.read_text(errors="replace")
    assert status is not HANGS, f"{told}: hangs\n{text[-2000:]}"
    lines = [line for line in text.splitlines() if line.startswith("popsd: error")]
    assert "Traceback" not in text, f"{told}: {text[-3000:]}"
    assert (status == 2 and len(lines) == 1) or (status == 0 and not lines), f"{told}: exit {status}\n{text[-3000:]}"
    assert not place.mark.exists(), f"{told}: code of the model has run"
    assert [path.name for path in place.outside.iterdir()] == ["secret"], told
    assert (place.outside / "secret").read_text() == "kept", told
    output = Path(argv[-1])
    assert output.exists() == (status == 0), f"{told}: exit {status}"
    assert not [path for path in output.parent.iterdir() if path.name.startswith(output.name) and path != output], told


def _run(place: Place, number: int, name: str) -> None:
    draw = random.Random(f"{SEED} {name} {number}")
    work = place.folder / f"{name}-{number}"
    output = place.folder / f"out-{name}-{number}"
    if name == "archive":
        archive = work.with_suffix(".nemo")
        told = _archive(draw, place.checkpoint, archive)
        argv = ["convert", "nemo-to-hf", str(archive), str(output)]
    elif name == "checkpoint":
        shutil.copytree(place.checkpoint, work)
        plain = draw.choice((_cut, _flip, _fill, _remove, _special, _value))
        sealed = draw.choice((_cut, _flip, _fill, _remove, _value, _less, _pickles(place.mark), _yaml(place.mark)))
        told = draw.choice((plain, _sealed(sealed), _sealed(sealed)))(draw, work)
        argv = ["convert", "nemo-to-hf", str(work), str(output)]
    else:
        shutil.copytree(place.model, work)
        any_file = (_cut, _flip, _fill, _remove, _special, _value)
        own = (_config, _config, _tensors, _header, _index, _twice, _pickle(place.mark), _code(place.mark))
        told = draw.choice((*any_file, *own))(draw, work)
        argv = ["convert", "hf-to-nemo", str(work), str(output)]
    try:
        _attempt(place, argv, f"{name} {number} of seed {SEED}: {told}")
    finally:
        for path in (work, output, work.with_suffix(".nemo"), work.with_suffix(".source")):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["directory", "checkpoint", "archive"])
def test_models_that_are_damaged_or_hostile_are_read_or_refused_in_one_line(place: Place, name: str) -> None:
    failures = []
    for number in range(CASES):
        try:
            _run(place, number, name)
        except AssertionError as error:
            failures.append(str(error).split("\nassert ")[0])
    assert not failures, f"{len(failures)} of {CASES}:\n" + "\n\n".join(failures)
