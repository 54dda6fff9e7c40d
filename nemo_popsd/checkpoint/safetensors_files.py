"""Tensors in safetensors files: read one at a time, written in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_popsd.errors import UserError

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of all safetensors files in a directory, by name. Reads headers at first, numbers when asked."""

    def __init__(self, directory: Path) -> None:
        """Reads the index, or the headers where there is none.

        Raises:
            UserError: no safetensors, a damaged one, or an index that names files elsewhere.
        """
        self.directory = directory
        if not any(directory.glob("*.safetensors")):
            raise UserError(
                f"model {directory}",
                got="no *.safetensors",
                need="weights in safetensors format",
                mend="save the model with safe_serialization=True, or set student.source",
            )
        index = directory / INDEX
        self._files: dict[str, str] = {}
        if index.is_file():
            self._files = dict(json.loads(index.read_text())["weight_map"])
            if foreign := sorted({name for name in self._files.values() if Path(name).name != name}):
                raise self._damaged(INDEX, f"names {foreign[0]!r}, which is elsewhere")
            if missing := sorted({name for name in self._files.values() if not (directory / name).is_file()}):
                raise self._damaged(INDEX, f"names {missing[0]}, which is missing")
        else:
            for file in sorted(directory.glob("*.safetensors")):
                self._files.update(dict.fromkeys(self._ask(file.name, lambda opened: list(opened.keys())), file.name))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._ask(self._files[name], lambda opened: opened.get_tensor(name))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, from its file's header."""
        return tuple(self._ask(self._files[name], lambda opened: opened.get_slice(name).get_shape()))

    def dtypes(self) -> set[torch.dtype]:
        """Those of all tensors, from the headers.

        Raises:
            UserError: numbers of a quantised format.
        """
        found: set[torch.dtype] = set()
        for file in sorted(set(self._files.values())):
            names = [name for name, place in self._files.items() if place == file]
            kinds = self._ask(file, lambda opened, names=names: {n: opened.get_slice(n).get_dtype() for n in names})
            for name, kind in kinds.items():
                if kind not in _DTYPES:
                    raise UserError(
                        f"model {self.directory}",
                        got=f"{name} in {kind}",
                        need=f"tensors in one of {', '.join(_DTYPES)}",
                        mend="give the model that is not quantised",
                    )
                found.add(_DTYPES[kind])
        return found

    def _ask(self, file: str, question: Any) -> Any:
        try:
            with safe_open(self.directory / file, framework="pt", device="cpu") as opened:
                return question(opened)
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, f"cannot be read ({error})") from None

    def _damaged(self, file: str, how: str) -> UserError:
        return UserError(
            f"model {self.directory}", got=f"{file}, which {how}", need="undamaged files", mend="fetch them again"
        )


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
