"""Memory of experts: the copies of tokens on their way to and from them, and what a dispatcher holds between calls."""

from __future__ import annotations

from nemo_popsd.planning.parameters import Stage
from nemo_popsd.planning.workload import Case

_PLACE = 8
"""Bytes of the place of a token's copy in the order of the experts."""


def copies_of_tokens(case: Case) -> int:
    """Elements per token of the residual stream that exist at once while local layers run their experts without
    gradient: the tokens in the order of the experts, and, of the tokens that come to this rank's experts, the tokens as
    received and in the order of its experts, the outputs of all its experts and their concatenation.
    """
    sizes = case.sizes
    return sizes.experts_per_token * sizes.hidden * (1 + 4 * case.layout.expert_shards)


def held_by_dispatchers(case: Case, stage: Stage, tokens: float) -> float:
    """Bytes that the dispatchers of a stage hold until their next call: for each token its probabilities, which experts
    it visits, and where its copies are.

    Args:
        case: the run.
        stage: whose layers.
        tokens: of the micro-batch, on all ranks that share it.
    """
    sizes, layout = case.sizes, case.layout
    if not sizes.experts:
        return 0.0
    of_token = sizes.experts * (case.element + 1) + _PLACE * sizes.experts_per_token
    return tokens / (layout.context * (layout.tensor if layout.sequence else 1)) * stage.layers * of_token
