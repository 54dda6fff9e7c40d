"""Memory of experts: copies of dispatched tokens, and tensors that a dispatcher keeps between calls."""

from __future__ import annotations

from nemo_popsd.planning.parameters import Stage
from nemo_popsd.planning.workload import Case

_PLACE = 8
"""Bytes of the index of one dispatched copy."""


def copies_of_tokens(case: Case) -> int:
    """Elements of dispatched copies, per token of the residual stream, that are alive at once while local layers run
    their experts without gradient: the tokens sorted by expert; and, for each token that this rank's experts receive,
    the token as received and sorted by expert, the outputs of the experts and their concatenation.
    """
    sizes = case.sizes
    return sizes.experts_per_token * sizes.hidden * (1 + 4 * case.layout.expert_shards)


def held_by_dispatchers(case: Case, stage: Stage, tokens: float) -> float:
    """Bytes that the dispatchers of a stage keep until their next call: the probabilities, the routing mask and the
    indices of the copies of each token.

    Args:
        case: the run.
        stage: the pipeline stage.
        tokens: number of tokens of the micro-batch on all ranks that share it.
    """
    sizes, layout = case.sizes, case.layout
    if not sizes.experts:
        return 0.0
    of_token = sizes.experts * (case.element + 1) + _PLACE * sizes.experts_per_token
    return tokens / (layout.context * (layout.tensor if layout.sequence else 1)) * stage.layers * of_token
