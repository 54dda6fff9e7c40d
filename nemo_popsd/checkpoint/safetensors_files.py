"""Tensors in safetensors files: read one at a time, written in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import read_strict_json, unreadable

INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Formats of numbers that are read; fp32 holds those of all three."""
_UNUSED = "rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints hold and nobody reads."""


@dataclass(frozen=True, slots=True)
class _Header:
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of all safetensors files in a directory, by name. Reads headers at first, numbers when asked.

    Where there is an index, the files that it names are read, and otherwise all. No tensor may be in two files:
    readers differ in which one they take.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the index and the headers.

        Raises:
            UserError: no safetensors, a damaged one, numbers of another format than fp32, fp16 and bf16, a tensor in
                two files, or an index that does not fit the files.
        """
        self.directory = directory
        files = sorted(file.name for file in directory.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"model {directory}",
                got="no *.safetensors",
                need="weights in safetensors format",
                fix="save the model with safe_serialization=True, or set student.source",
            )
        index = directory / INDEX
        listed = self._read_index(index) if index.exists() or index.is_symlink() else None
        self._headers: dict[str, _Header] = {}
        self._others: dict[str, str] = {}
        for file in files:
            used = listed is None or file in listed.values()
            for name, header in self._read_headers(file, checks_formats=used).items():
                first = self._headers.get(name)
                other = first.file if first else self._others.get(name)
                if other is not None:
                    raise self._refused(
                        f"{name} both in {other} and in {file}",
                        "each tensor in one file",
                        "remove the file that is not of this model, or is older",
                    )
                if used:
                    self._headers[name] = header
                else:
                    self._others[name] = file
        if listed is not None:
            self._compare(listed)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._ask(self._headers[name].file, lambda opened: opened.get_tensor(name))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, from its file's header."""
        return self._headers[name].shape

    def place(self, name: str) -> str:
        """Name of the file that holds it."""
        return self._headers[name].file

    def dtypes(self) -> set[torch.dtype]:
        """Those of all tensors, from the headers."""
        return {header.dtype for header in self._headers.values()}

    def _read_index(self, index: Path) -> dict[str, str]:
        content = read_strict_json(index, f"model {self.directory}", fix="fetch it again")
        listed = content.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise self._damaged(INDEX, "has no weight_map of names and files")
        if foreign := sorted({name for name in listed.values() if Path(name).name != name}):
            raise self._damaged(INDEX, f"names {foreign[0]!r}, which is elsewhere")
        if missing := sorted({name for name in listed.values() if not (self.directory / name).exists()}):
            raise self._damaged(INDEX, f"names {missing[0]}, which is missing")
        if odd := sorted({name for name in listed.values() if not name.endswith(".safetensors")}):
            raise self._damaged(INDEX, f"names {odd[0]}, which is no *.safetensors")
        return {name: file for name, file in listed.items() if not name.endswith(_UNUSED)}

    def _compare(self, listed: dict[str, str]) -> None:
        """Refuses an index that does not name the tensors of the files that it names."""
        for name, file in sorted(listed.items()):
            if name not in self._headers or self._headers[name].file != file:
                raise self._damaged(INDEX, f"says that {name} is in {file}, which has no such tensor")
        if beyond := sorted(self._headers.keys() - listed.keys()):
            raise self._damaged(INDEX, f"does not name {beyond[0]}, which is in {self._headers[beyond[0]].file}")

    def _read_headers(self, file: str, *, checks_formats: bool) -> dict[str, _Header]:
        def headers(opened: Any) -> dict[str, tuple[tuple[int, ...], str]]:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 no mapping
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}

        found = {}
        for name, (shape, kind) in self._ask(file, headers).items():
            if name.endswith(_UNUSED):
                continue
            if kind not in _DTYPES and checks_formats:
                raise self._refused(
                    f"{name} in {kind}",
                    f"tensors in one of {', '.join(_DTYPES)}",
                    "give the model that is not quantised, in one of these formats",
                )
            found[name] = _Header(file, shape, _DTYPES.get(kind, torch.float32))
        return found

    def _ask(self, file: str, question: Any) -> Any:
        if reason := unreadable(self.directory / file):
            raise self._damaged(file, reason)
        try:
            with safe_open(self.directory / file, framework="pt", device="cpu") as opened:
                return question(opened)
        # Its binding raises TypeError and RuntimeError for some headers.
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise self._damaged(file, f"cannot be read ({error})") from None

    def _damaged(self, file: str, how: str) -> UserError:
        return self._refused(f"{file}, which {how}", "undamaged files", "fetch them again")

    def _refused(self, got: str, need: str, fix: str) -> UserError:
        return UserError(f"model {self.directory}", got=got, need=need, fix=fix)


def write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> set[str]:
    """Writes safetensors files of about `shard_bytes`, and the index when there is more than one.

    Holds one shard in memory.

    Returns:
        The names that were written.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal held
        file = directory / f"shard-{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it readable by its owner alone.
        shards.append(list(shard))
        shard.clear()
        held = 0

    for name, weight in tensors:
        size = weight.numel() * weight.element_size()
        if shard and held + size > shard_bytes:
            flush()
        # A clone: tensors of one gather may share storage, which safetensors refuses.
        shard[name] = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        held += size
        total += size
    flush()
    written = {name for names in shards for name in names}
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return written
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}.safetensors").rename(directory / file)
        index.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / INDEX).write_text(json.dumps(content, indent=2))
    return written
