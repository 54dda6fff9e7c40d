"""Separates the settings of `popsd plan` from those of the run."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_popsd.config.keys import known_keys, unknown_key
from nemo_popsd.config.loading import load_schema
from nemo_popsd.config.values import is_mapping
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.settings.checks import shown


def split_settings(words: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's settings among ``key=value`` words, and the other words, in order.

    Raises:
        UserError: a key belongs to neither the plan nor the run (the message suggests the nearest key), or a setting of
            the plan has a wrong type or an impossible value.
    """
    plan_keys, run_keys = known_keys(PlanConfig), known_keys()
    plan_words, run_words = [], []
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if key in plan_keys:
            without_brackets = key == "nodes" and not text.startswith("[")
            plan_words.append(f"nodes=[{text}]" if without_brackets else word)
        elif not key or not equals or key in run_keys or is_mapping(run_keys.get(key.rpartition(".")[0])):
            run_words.append(word)
        else:
            raise unknown_key(f"override {shown(word)}", key, {**plan_keys, **run_keys})
    return load_schema(PlanConfig, {}, plan_words, what="popsd plan"), run_words
