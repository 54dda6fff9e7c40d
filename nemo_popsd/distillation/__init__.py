"""The distillation loss: its target, its divergence, exact over a vocabulary in shards. Pure torch, no Megatron.

target.py       what the student is drawn towards: Purified OPSD and its family, by coefficients
divergence.py   how far it is: JSD, forward KL, reverse KL
definition.py   the loss, literally, from logits: what everything else is compared with
hidden.py       the same loss from hidden states, in chunks, with closed-form gradients: what training uses
closed_form.py  the mathematics of one chunk, in place
products.py     hidden states times the output matrix, kept in full precision
statistics.py   what to watch
vocabulary.py   which entries of a shard are true vocabulary; the mean row
collectives.py  all communication, each sum with its adjoint
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_popsd.distillation.definition import loss_from_logits
    from nemo_popsd.distillation.divergence import Divergence
    from nemo_popsd.distillation.hidden import HiddenLoss, loss_from_hidden
    from nemo_popsd.distillation.statistics import DecompositionStatistics, TokenStatistics, decomposition_statistics
    from nemo_popsd.distillation.target import HiddenPair, LogLinearTarget, PurifiedTarget, Target, hidden_pair
    from nemo_popsd.distillation.vocabulary import mean_row

__all__ = [
    "DecompositionStatistics",
    "Divergence",
    "HiddenLoss",
    "HiddenPair",
    "LogLinearTarget",
    "PurifiedTarget",
    "Target",
    "TokenStatistics",
    "decomposition_statistics",
    "hidden_pair",
    "loss_from_hidden",
    "loss_from_logits",
    "mean_row",
]

_HOMES = {
    "loss_from_logits": "definition",
    "Divergence": "divergence",
    "HiddenLoss": "hidden",
    "loss_from_hidden": "hidden",
    "DecompositionStatistics": "statistics",
    "TokenStatistics": "statistics",
    "decomposition_statistics": "statistics",
    "HiddenPair": "target",
    "LogLinearTarget": "target",
    "PurifiedTarget": "target",
    "Target": "target",
    "hidden_pair": "target",
    "mean_row": "vocabulary",
}


def __getattr__(name: str) -> Any:
    """Imports torch only when the mathematics is used: the configuration lives in this package too."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
