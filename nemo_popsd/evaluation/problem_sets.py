"""The problem sets of an evaluation, and the sources of their rows. Does not import torch."""

from __future__ import annotations

from nemo_popsd.data.config import DataConfig, SourceConfig
from nemo_popsd.data.named_sets import named_source, own_source
from nemo_popsd.evaluation.config import EvaluationConfig

VALIDATION = "validation"
"""Name of the set in `data.validation`."""


def sources_of(settings: EvaluationConfig, data: DataConfig) -> dict[str, SourceConfig]:
    """The sources of the problem sets, by name of the set.

    Raises:
        UserError: a set is not on this machine, or its columns have unexpected names.
    """
    if settings.sets:
        return {
            name: own_source(name, path, data.validation) if path else named_source(name, settings.sets_directory)
            for name, path in settings.sets.items()
        }
    return {VALIDATION: data.validation}
