"""`popsd evaluate` with `evaluation.endpoint`: the model is on a server."""

from __future__ import annotations

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.evaluation.served import evaluate_served


def evaluate_endpoint(config: PopsdConfig) -> None:
    """Generates the missing samples at the endpoint, scores all, and prints the tables."""
    tables = evaluate_served(
        config.evaluation, config.data, source=config.student.source, output=config.output, seed=config.seed
    )
    print(tables)
