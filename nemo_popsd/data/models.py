"""Location of the model named by `student.source`: embedded, on disk, or in the local cache of the Hugging Face Hub.

Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from nemo_popsd.embedded.names import PREFIX, asset
from nemo_popsd.errors import UserError

_HUB_ID = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9][\w.-]*)")
_FOLDERS = ("models", "runs", "checkpoints", "data", "output", "outputs")
"""First parts that indicate a missing path rather than a Hub id."""
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def model_path(source: str) -> Path:
    """Return the path of an embedded model, of a complete snapshot in the Hub's cache, or `source` itself.

    Args:
        source: ``nemo_popsd:NAME``, a path, or a Hub id such as ``Qwen/Qwen3-8B``; an existing path takes precedence.

    Raises:
        UserError: no embedded model has that name.
    """
    if source.startswith(PREFIX):
        return asset(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    snapshot = _snapshot(source)
    return path if snapshot is None or _lacks(snapshot) else snapshot


def missing_model(source: str, *, setting: str) -> UserError:
    """Return the error for a `source` without a model on this machine, with the command that downloads it."""
    need = f"a Hugging Face directory, a NeMo checkpoint, the id of a model in the Hub's cache or {PREFIX}tiny_reasoner"
    if not source:
        return UserError("configuration", got=f"{setting}=''", need=need, fix=f"set {setting}")
    got = f"{setting}={source!r}, which does not exist (looked in {Path.cwd()}"
    match = _HUB_ID.fullmatch(source)
    if match is None:
        return UserError("configuration", got=f"{got})", need=need, fix=f"set {setting}")
    if match["owner"] in _FOLDERS:
        fix = f"set {setting}, or download the model there: hf download OWNER/{match['name']} --local-dir {source}"
        return UserError("configuration", got=f"{got})", need=need, fix=fix)
    snapshot = _snapshot(source)
    lacking = "" if snapshot is None else f", whose snapshot lacks {_lacks(snapshot)}"
    got += f", and in the Hub's cache {_cache()}{lacking})"
    return UserError("configuration", got=got, need=need, fix=f"download it: hf download {source}; or set {setting}")


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def _snapshot(name: str) -> Path | None:
    """Return the snapshot of branch `main` in the Hub's cache; None if there is none."""
    if not _HUB_ID.fullmatch(name):
        return None
    folder = _cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = folder / "snapshots" / commit
    return path if re.fullmatch(r"[0-9a-f]{40}", commit) and path.is_dir() else None


def _lacks(snapshot: Path) -> str:
    """Return the first missing file of a snapshot (after an interrupted download); "" if it is complete."""
    names = ["config.json", "tokenizer_config.json"]
    if (snapshot / _INDEX).exists():
        try:
            shards = json.loads((snapshot / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            names += sorted({str(shard) for shard in shards})
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            names.append(f"{_INDEX} that can be read")
    else:
        names.append(_WEIGHTS)
    return next((name for name in names if not (snapshot / name).exists()), "")
