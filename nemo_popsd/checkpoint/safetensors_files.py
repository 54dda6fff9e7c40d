"""Reads safetensors files tensor by tensor, and writes them in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_popsd.errors import UserError
from nemo_popsd.files.reading import read_strict_json, unreadable

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported data types; fp32 represents all values of the other two."""
_UNUSED = "rotary_emb.inv_freq"
"""Suffix of tensors that old checkpoints contain and that are ignored."""


@dataclass(frozen=True, slots=True)
class _Header:
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of the safetensors files in a directory, by name. Headers are read at the start, tensors on access.

    If there is an index, only the files that it names are read, otherwise all files. A tensor in two files is refused,
    since readers differ in which of the two they use.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the index and the headers.

        Raises:
            UserError: there are no safetensors files, one is damaged, a tensor is not fp32, fp16 or bf16, a tensor is
                in two files, or the index contradicts the files.
        """
        self.directory = directory
        files = sorted(file.name for file in directory.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"model {directory}",
                got="no *.safetensors files",
                need="weights in safetensors format",
                fix="save the model with safe_serialization=True, or set student.source",
            )
        index = directory / INDEX
        listed = self._read_index(index) if index.exists() or index.is_symlink() else None
        self._headers: dict[str, _Header] = {}
        self._unused: dict[str, str] = {}
        for file in files:
            used = listed is None or file in listed.values()
            for name, header in self._read_headers(file, check_dtypes=used).items():
                first = self._headers.get(name)
                other = first.file if first else self._unused.get(name)
                if other is not None:
                    raise self._refused(
                        f"{name} both in {other} and in {file}",
                        "each tensor in one file",
                        "remove the file that does not belong to this model",
                    )
                if used:
                    self._headers[name] = header
                else:
                    self._unused[name] = file
        if listed is not None:
            self._compare(listed)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._with_file(self._headers[name].file, lambda opened: opened.get_tensor(name))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from its file's header."""
        return self._headers[name].shape

    def file_of(self, name: str) -> str:
        """Name of the file that contains the tensor `name`."""
        return self._headers[name].file

    def dtypes(self) -> set[torch.dtype]:
        """Data types of all tensors, from the headers."""
        return {header.dtype for header in self._headers.values()}

    def _read_index(self, index: Path) -> dict[str, str]:
        content = read_strict_json(index, f"model {self.directory}", fix="download it again")
        listed = content.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise self._damaged(INDEX, "has no weight_map of names and files")
        if foreign := sorted({name for name in listed.values() if Path(name).name != name}):
            raise self._damaged(INDEX, f"names {foreign[0]!r}, which is outside the directory")
        if missing := sorted({name for name in listed.values() if not (self.directory / name).exists()}):
            raise self._damaged(INDEX, f"names {missing[0]}, which is missing")
        if other := sorted({name for name in listed.values() if not name.endswith(".safetensors")}):
            raise self._damaged(INDEX, f"names {other[0]}, which is not a *.safetensors file")
        return {name: file for name, file in listed.items() if not name.endswith(_UNUSED)}

    def _compare(self, listed: dict[str, str]) -> None:
        """Refuses an index that contradicts the headers of its files."""
        for name, file in sorted(listed.items()):
            if name not in self._headers or self._headers[name].file != file:
                raise self._damaged(INDEX, f"lists {name} in {file}, which has no such tensor")
        if unlisted := sorted(self._headers.keys() - listed.keys()):
            raise self._damaged(INDEX, f"does not name {unlisted[0]}, which is in {self._headers[unlisted[0]].file}")

    def _read_headers(self, file: str, *, check_dtypes: bool) -> dict[str, _Header]:
        def headers(opened: safe_open) -> dict[str, tuple[tuple[int, ...], str]]:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 not a mapping
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}

        result = {}
        for name, (shape, dtype) in self._with_file(file, headers).items():
            if name.endswith(_UNUSED):
                continue
            if dtype not in _DTYPES and check_dtypes:
                raise self._refused(
                    f"{name} of type {dtype}",
                    f"tensors of type {', '.join(_DTYPES)}",
                    "use the model before quantisation, in one of these types",
                )
            result[name] = _Header(file, shape, _DTYPES.get(dtype, torch.float32))
        return result

    def _with_file(self, file: str, read: Callable[[safe_open], T]) -> T:
        """Calls `read` with the opened file, and refuses a damaged one."""
        if reason := unreadable(self.directory / file):
            raise self._damaged(file, reason)
        try:
            with safe_open(self.directory / file, framework="pt", device="cpu") as opened:
                return read(opened)
        # safetensors raises TypeError and RuntimeError for some damaged headers.
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise self._damaged(file, f"cannot be read ({error})") from None

    def _damaged(self, file: str, how: str) -> UserError:
        return self._refused(f"{file}, which {how}", "undamaged files", "download them again")

    def _refused(self, got: str, need: str, fix: str) -> UserError:
        return UserError(f"model {self.directory}", got=got, need=need, fix=fix)


def write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> set[str]:
    """Writes safetensors files of about `shard_bytes`, and an index if there is more than one file.

    Holds one shard in memory.

    Returns:
        The names of the tensors.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total_bytes = bytes_in_shard = 0

    def flush() -> None:
        nonlocal bytes_in_shard
        file = directory / f"shard-{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it readable only by its owner.
        shards.append(list(shard))
        shard.clear()
        bytes_in_shard = 0

    for name, weight in tensors:
        size = weight.numel() * weight.element_size()
        if shard and bytes_in_shard + size > shard_bytes:
            flush()
        # A clone, since tensors of one gather may share storage, which safetensors refuses.
        shard[name] = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        bytes_in_shard += size
        total_bytes += size
    flush()
    written = {name for names in shards for name in names}
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return written
    index: dict[str, str] = {}
    for shard_index, names in enumerate(shards):
        file = f"model-{shard_index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{shard_index}.safetensors").rename(directory / file)
        index.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": total_bytes}, "weight_map": index}
    (directory / INDEX).write_text(json.dumps(content, indent=2))
    return written
