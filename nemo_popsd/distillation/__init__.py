"""The distillation loss: its target, its divergence, exact over a vocabulary in shards. Pure torch, no Megatron.

target.py         what the student is drawn towards: Purified OPSD and its family, by coefficients
divergence.py     how far it is: JSD, forward KL, reverse KL
definition.py     the loss, literally, from logits: what everything else is compared with
hidden.py         the same loss from hidden states, in chunks, with closed-form gradients: what training uses
sweep.py          one pass over the chunks of tokens, with what is put in while collectives are under way
chunks.py         how many tokens a chunk has
products.py       hidden states times the output matrix, kept in full precision, in buffers that all chunks share
closed_form.py    the divergence of one chunk: the steps, and what crosses the shards between them
rowwise.py        the arithmetic of the steps on a tile of logits, as pure functions
fusion.py         the same functions, compiled into fused kernels
statistics.py     what to watch of every token
decomposition.py  what to watch of a sample: the paper's decomposition of the teacher's signal
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_popsd.distillation.decomposition import DecompositionStatistics, DiagnosedTokens
    from nemo_popsd.distillation.definition import loss_from_logits
    from nemo_popsd.distillation.divergence import Divergence
    from nemo_popsd.distillation.hidden import HiddenLoss, MainGradient, loss_from_hidden
    from nemo_popsd.distillation.statistics import TokenStatistics
    from nemo_popsd.distillation.target import (
        FrozenStates,
        HiddenPair,
        LogLinearTarget,
        PurifiedTarget,
        SeparateStates,
        Target,
        frozen_states,
        hidden_pair,
    )

__all__ = [
    "DecompositionStatistics",
    "DiagnosedTokens",
    "Divergence",
    "FrozenStates",
    "HiddenLoss",
    "HiddenPair",
    "LogLinearTarget",
    "MainGradient",
    "PurifiedTarget",
    "SeparateStates",
    "Target",
    "TokenStatistics",
    "frozen_states",
    "hidden_pair",
    "loss_from_hidden",
    "loss_from_logits",
]

_HOMES = {
    "DecompositionStatistics": "decomposition",
    "DiagnosedTokens": "decomposition",
    "loss_from_logits": "definition",
    "Divergence": "divergence",
    "HiddenLoss": "hidden",
    "MainGradient": "hidden",
    "loss_from_hidden": "hidden",
    "TokenStatistics": "statistics",
    "FrozenStates": "target",
    "HiddenPair": "target",
    "LogLinearTarget": "target",
    "PurifiedTarget": "target",
    "SeparateStates": "target",
    "Target": "target",
    "frozen_states": "target",
    "hidden_pair": "target",
}


def __getattr__(name: str) -> Any:
    """Imports torch only when the mathematics is used: the configuration lives in this package too."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
