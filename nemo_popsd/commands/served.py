"""`popsd evaluate` with `evaluation.endpoint`: a server runs the model."""

from __future__ import annotations

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.evaluation.served import evaluate_served


def evaluate_endpoint(config: PopsdConfig) -> None:
    """Generate the missing samples at the endpoint, score all samples, and print the tables."""
    tables = evaluate_served(
        config.evaluation, config.data, source=config.student.source, output=config.output, seed=config.seed
    )
    print(tables)
