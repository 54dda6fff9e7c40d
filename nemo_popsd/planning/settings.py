"""Takes the words of `popsd plan` apart: those of the plan, and those of the run."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_popsd.config.keys import known_keys, unknown_key
from nemo_popsd.config.loading import load_schema
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.settings.checks import shown


def split_settings(words: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's settings among ``key=value`` words, and the other words, in order.

    Raises:
        UserError: a key is neither the plan's nor the run's (the nearest of both is named), or a setting of the plan
            has the wrong type or an impossible value.
    """
    of_plan, of_run = known_keys(PlanConfig), known_keys()
    mine, rest = [], []
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if key in of_plan:
            listed = key != "nodes" or text.startswith("[")
            mine.append(word if listed else f"nodes=[{text}]")
        elif not key or not equals or key in of_run:
            rest.append(word)
        else:
            raise unknown_key(f"override {shown(word)}", key, {**of_plan, **of_run})
    return load_schema(PlanConfig, {}, mine, what="popsd plan"), rest
