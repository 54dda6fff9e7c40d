"""Checks before expensive work that trackers can run. Imports neither torch nor a tracker."""

from __future__ import annotations

import importlib.util
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from nemo_popsd.errors import UserError
from nemo_popsd.observability.config import ObservabilityConfig
from nemo_popsd.observability.rank import is_rank_zero

_WANDB_SERVER = "https://api.wandb.ai"
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check_trackers(config: ObservabilityConfig) -> None:
    """Refuses trackers that cannot run.

    Raises:
        UserError: W&B or MLflow is enabled but not installed (on every rank), or W&B needs a key that is missing (on
            rank 0, the only rank that logs).
    """
    for package, enabled in (("wandb", config.wandb.enabled), ("mlflow", config.mlflow.enabled)):
        if enabled and importlib.util.find_spec(package) is None:
            raise UserError(
                "configuration",
                got=f"observability.{package}.enabled=true without the package {package}",
                need=f"pip install 'nemo_popsd[{package}]'",
                fix=f"install it, or set observability.{package}.enabled=false",
            )
    if config.wandb.enabled and config.wandb.mode == "online" and is_rank_zero() and not _has_wandb_key():
        raise UserError(
            "configuration",
            got="observability.wandb.mode=online without a key: no WANDB_API_KEY, and no entry for "
            f"{_wandb_host()} in the netrc file",
            need="a key of the W&B server",
            fix="set WANDB_API_KEY or run `wandb login`; or set observability.wandb.mode=offline",
        )


def _wandb_host() -> str:
    return urlsplit(os.environ.get("WANDB_BASE_URL") or _WANDB_SERVER).hostname or _WANDB_SERVER


def _has_wandb_key() -> bool:
    """Whether wandb would find a key, or its variable WANDB_MODE disables the network."""
    if any(os.environ.get(name) for name in _KEYS) or os.environ.get("WANDB_MODE", "online") not in ("online", "run"):
        return True
    settings = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    for file in (settings, Path("wandb/settings")):
        try:
            if "api_key" in file.read_text(encoding="utf-8", errors="replace"):
                return True
        except OSError:
            continue
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    return any(_has_entry(Path(place).expanduser()) for place in places)


def _has_entry(file: Path) -> bool:
    try:
        entry = netrc.netrc(str(file)).hosts.get(_wandb_host())
    except (OSError, netrc.NetrcParseError):
        return False
    return entry is not None and bool(entry[2])
