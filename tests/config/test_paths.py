"""One rule for all paths: `~` is the home directory, and unexpanded shell variables are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_popsd.config.keys import known_keys
from nemo_popsd.config.loading import load_config
from nemo_popsd.config.paths import given_path
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.values import is_mapping
from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Text, declared_rules
from tests.cli.misuse import error_of

DECLARED = [key for key, rule in declared_rules(PopsdConfig) if rule is Text.PATH]
PATHS = [f"{key}.mine" if is_mapping(known_keys()[key]) else key for key in DECLARED]


def test_the_paths_of_a_run() -> None:
    assert {"output", "student.source", "data.train.path", "data.validation.path"} < set(PATHS)


@pytest.mark.parametrize("key", PATHS)
def test_home_is_expanded_and_variables_of_the_shell_are_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "file.yaml").write_text("")
    section, _, name = key.rpartition(".")
    first = [f"{section}.path=x"] if name == "more_paths" else []  # `more_paths` needs a path

    def load(text: str) -> PopsdConfig:
        value = "['" + text.strip("'") + "']" if first else text
        return load_config(tmp_path / "file.yaml", [*first, f"{key}={value}"])

    value: object = load("~/x")
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == (["/home/somebody/x"] if first else "/home/somebody/x")
    for text in ("$HOME/x", "a/$USER", "~nobody-of-that-name/x", "a/~/b", "a" * 256, "a/" * 2000, "'\\$\\{HOME}'"):
        with pytest.raises(UserError, match=rf"{key}=.*set {key}\b"):
            load(text)
    with pytest.raises(UserError, match=r"\$\{oc\.env:HOME\}"):
        load("${HOME}/x")
    assert load("${oc.env:HOME}/x") == load("~/x")


def test_a_tilde_that_is_not_a_home_directory_is_kept(tmp_path: Path) -> None:
    for path in ("", "runs/x", "nemo_popsd:tiny_train", "/a/b~", "a b/é", "x.~1~"):
        assert given_path("output", path) == path


@pytest.mark.parametrize(
    "words",
    [
        ["train", "$HOME/conf.yaml"],
        ["evaluate", "conf/tiny.yaml", "--checkpoint", "~nobody-of-that-name/x"],
        ["diagnose", "conf/tiny.yaml", "--checkpoint", "$RUN/final"],
        ["report", "$RUN"],
        ["report", "run", "--output", "${HOME}/page.html"],
        ["export", "a", "$HOME/hf"],
        ["convert", "hf-to-nemo", "a", "b/~/c"],
        ["rollouts", "show", "$RUN"],
        ["evaluate", "--compare", "a", "$B"],
        ["plan", "$CONF"],
        ["config", "$CONF"],
        ["doctor", "$CONF"],
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_arguments_follow_the_same_rule(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error_of(words, capsys)
