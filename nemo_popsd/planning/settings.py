"""Takes the words of `popsd plan` apart: those of the plan, and those of the run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_popsd.errors import UserError
from nemo_popsd.planning.config import HardwareConfig, PlanConfig, WorkloadConfig

_SECTIONS = {"hardware": HardwareConfig, "workload": WorkloadConfig}


def known_settings() -> list[str]:
    """Dotted names of the plan's settings."""
    inside = [f"{section}.{item.name}" for section, kind in _SECTIONS.items() for item in fields(kind)]
    return ["nodes", "gpus_per_node", *inside]


def split_settings(words: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's settings among ``key=value`` words, and the other words, in order.

    Raises:
        UserError: a setting of the plan is unknown, has the wrong type or an impossible value.
    """
    merged, rest = OmegaConf.structured(PlanConfig), []
    for word in words:
        key, _, text = word.partition("=")
        if key not in ("nodes", "gpus_per_node") and key.partition(".")[0] not in _SECTIONS:
            rest.append(word)
            continue
        if key not in known_settings():
            near = difflib.get_close_matches(key, known_settings(), n=1, cutoff=0)[0]
            raise UserError(
                f"override {word!r}",
                got=f"unknown key {key}",
                need=f"a setting of the plan; the nearest is {near}",
                mend="rename it or take it out",
            )
        value = f"[{text}]" if key == "nodes" and not text.startswith("[") else text
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([f"{key}={value}"]))
        except OmegaConfBaseException:
            kind = "whole numbers, as in 1,2,4" if key == "nodes" else "a value of its type"
            raise UserError(f"override {word!r}", got=f"{key}={text}", need=kind, mend=f"set {key}") from None
    return cast(PlanConfig, OmegaConf.to_object(merged)), rest
