import importlib.util
from pathlib import Path

import pytest

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.errors import UserError
from nemo_popsd.observability.checks import check_trackers
from nemo_popsd.observability.config import ObservabilityConfig


@pytest.fixture(autouse=True)
def _without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def wandb(**settings: object) -> ObservabilityConfig:
    config = PopsdConfig().observability
    config.wandb.enabled = True
    for name, value in settings.items():
        setattr(config.wandb, name, value)
    return config


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_trackers_that_are_not_installed_are_refused(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PopsdConfig().observability
    getattr(config, package).enabled = True
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match=rf"nemo_popsd\[{package}\]"):
            check_trackers(config)


def test_wandb_online_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no WANDB_API_KEY.*api\.wandb\.ai.*observability\.wandb\.mode=offline"):
        check_trackers(wandb())
    (tmp_path / ".netrc").write_text("machine other.host login user password key\n")
    with pytest.raises(UserError, match="without a key"):
        check_trackers(wandb())
    check_trackers(wandb(mode="offline"))
    check_trackers(wandb(enabled=False))
    monkeypatch.setenv("RANK", "1")
    check_trackers(wandb())


@pytest.mark.parametrize("place", ["variable", "token", "netrc", "NETRC", "settings", "own server", "WANDB_MODE"])
def test_a_key_is_found_where_wandb_looks(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if place == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "x")
    elif place == "token":
        monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "/token")
    elif place == "settings":
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "settings").write_text("[default]\napi_key = x\n")
    elif place == "WANDB_MODE":
        monkeypatch.setenv("WANDB_MODE", "offline")
    else:
        host = "wandb.example.org" if place == "own server" else "api.wandb.ai"
        if place == "own server":
            monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
        file = tmp_path / ("elsewhere" if place == "NETRC" else ".netrc")
        file.write_text(f"machine {host} login user password key\n")
        file.chmod(0o600)
        if place == "NETRC":
            monkeypatch.setenv("NETRC", str(file))
    check_trackers(wandb())
