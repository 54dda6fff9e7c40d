"""Random changes to a NeMo checkpoint or its archive, with a manifest that agrees with the changed files."""

from __future__ import annotations

import io
import pickle
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch

from nemo_popsd.checkpoint.manifest import file_digests, list_files, read_manifest, write_manifest
from tests.checkpoint.file_damage import Change, Payload, flip_bytes, overwrite_file, remove_file, truncate_file


def _seal(folder: Path) -> None:
    """Writes a manifest that agrees with the files, as an attacker would."""
    facts = {key: value for key, value in read_manifest(folder).items() if key not in ("format", "files")}
    write_manifest(folder, facts, file_digests(folder, list_files(folder)))


def sealed(change: Change) -> Change:
    """`change`, followed by a new manifest that agrees with the files."""

    def changed(rng: random.Random, folder: Path) -> str:
        manifest = (folder / "manifest.json").read_bytes()
        description = change(rng, folder)
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / "manifest.json").write_bytes(manifest)
        # A pipe or a device has no digest.
        if all(path.is_file() or path.is_dir() for path in folder.rglob("*") if str(path.resolve()) != "/dev/zero"):
            _seal(folder)
        return f"sealed: {description}"

    return changed


def replace_by_pickle(mark: Path) -> Change:
    """Puts a payload into a file of the weights."""

    def change(rng: random.Random, folder: Path) -> str:
        name = rng.choice(("common.pt", ".metadata", "metadata.json"))
        file = folder / "weights" / name
        kind = rng.choice(("file", "inside"))
        if name == ".metadata" and kind == "inside":
            metadata = pickle.loads(file.read_bytes())
            metadata.planner_data = Payload(mark)
            file.write_bytes(pickle.dumps(metadata))
        elif name == "common.pt" and kind == "inside":
            torch.save({"a": Payload(mark)}, file)
        else:
            file.write_bytes(pickle.dumps(Payload(mark)))
        return f"pickle in {name}"

    return change


def change_index(rng: random.Random, folder: Path) -> str:
    """Removes, renames or changes one tensor in the index of the weights."""
    file = folder / "weights" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    key = rng.choice(sorted(metadata.state_dict_metadata))
    kind = rng.choice(("drop", "size", "chunks", "rename"))
    entry = metadata.state_dict_metadata.pop(key)
    if kind == "size":
        entry.size = torch.Size([*entry.size[:-1], entry.size[-1] + rng.choice((-1, 1, 10**9))])
    if kind == "chunks":
        entry.chunks = entry.chunks[1:]
    if kind != "drop":
        metadata.state_dict_metadata[key + ("x" if kind == "rename" else "")] = entry
    file.write_bytes(pickle.dumps(metadata))
    return f"index without {key} ({kind})"


def change_yaml(mark: Path) -> Change:
    """Replaces the configuration by a hostile YAML file."""

    def change(rng: random.Random, folder: Path) -> str:
        file = folder / "model_config.yaml"
        bomb = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
        text, kind = rng.choice(
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


def _add_member(
    tar: tarfile.TarFile, name: str, *, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 4
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size if kind == tarfile.REGTYPE else 0
    tar.addfile(member, io.BytesIO(b"x" * member.size) if member.size else None)


def write_archive(rng: random.Random, checkpoint: Path, archive: Path) -> str:
    """Writes a damaged archive, or one with a hostile member."""
    kind = rng.choice(("member", "member", "cut", "flip", "compressed", "noise", "damaged"))
    if kind == "damaged":
        shutil.copytree(checkpoint, archive.with_suffix(".source"))
        checkpoint = archive.with_suffix(".source")
        kind = sealed(rng.choice((truncate_file, flip_bytes, overwrite_file, remove_file)))(rng, checkpoint)
    mode: Any = "w:gz" if kind == "compressed" else "w"
    with tarfile.open(archive, mode) as tar:
        tar.add(checkpoint, arcname=".")
        if kind == "member":
            name = rng.choice(("../outside/secret", str(archive.parent / "outside" / "new"), "weights/x", "é" * 200))
            how = rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
            _add_member(tar, name, kind=how, target=rng.choice(("/etc/passwd", "..", str(archive.parent / "outside"))))
            if rng.random() < 0.5:
                _add_member(tar, f"{name}/secret")
            kind = f"member {name[:20]} of type {how!r}"
    content = bytearray(archive.read_bytes())
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    if kind == "flip":
        for _ in range(rng.choice((1, 50))):
            content[rng.randrange(rng.choice((600, len(content))))] = rng.randrange(256)
    if kind == "noise":
        content = bytearray(rng.randbytes(5000))
    archive.write_bytes(content)
    return kind
