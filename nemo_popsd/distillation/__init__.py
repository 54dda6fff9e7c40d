"""The distillation loss: targets, divergences and statistics, exact over a sharded vocabulary, independent of Megatron.

config.py           settings of target, divergence and loss (without torch)
target_families.py  the target distributions, Purified OPSD among them, as coefficients (without torch)
statistics.py       declarations of the per-token statistics (without torch)
divergence.py       JSD, forward KL, reverse KL
gates.py            which tokens have a loss, given the distributions at the token (without torch)
definition.py       target and loss as defined, from logits; used by the diagnosis
target.py           the two hidden vectors that determine the target of a token
hidden.py           the loss from hidden states, in chunks, with closed-form gradients: what training uses
closed_form.py      the loss of one chunk of tokens: equations, kernels, and the collectives between them
clipped.py          the loss of one chunk if the contribution of each vocabulary entry is clipped
chunked_loss.py     the pass over all chunks, with computation that overlaps collectives
products.py         hidden states times the output matrix, in full precision, in buffers that all chunks share
decomposition.py    norms and inner products of the teacher's signal on a sample of tokens
chunks.py           the number of tokens of a chunk; inputs and results of its loss
fusion.py           compilation of the kernels
checks.py           checks of the arguments of the loss
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_popsd.distillation.decomposition import DiagnosedTokens
    from nemo_popsd.distillation.definition import Branches, loss_from_logits
    from nemo_popsd.distillation.divergence import Divergence
    from nemo_popsd.distillation.gates import Gates
    from nemo_popsd.distillation.hidden import HiddenLoss, loss_from_hidden
    from nemo_popsd.distillation.main_gradient import MainGradient
    from nemo_popsd.distillation.statistics import StatisticValues
    from nemo_popsd.distillation.target import HiddenPair, hidden_pair
    from nemo_popsd.distillation.target_families import Target

__all__ = [
    "Branches",
    "DiagnosedTokens",
    "Divergence",
    "Gates",
    "HiddenLoss",
    "HiddenPair",
    "MainGradient",
    "StatisticValues",
    "Target",
    "hidden_pair",
    "loss_from_hidden",
    "loss_from_logits",
]

_MODULES = {
    "Branches": "definition",
    "DiagnosedTokens": "decomposition",
    "Divergence": "divergence",
    "Gates": "gates",
    "HiddenLoss": "hidden",
    "HiddenPair": "target",
    "MainGradient": "main_gradient",
    "StatisticValues": "statistics",
    "Target": "target_families",
    "hidden_pair": "target",
    "loss_from_hidden": "hidden",
    "loss_from_logits": "definition",
}


def __getattr__(name: str) -> object:
    """Imports torch only when the mathematics is used: configuration, families and declarations do not need it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
