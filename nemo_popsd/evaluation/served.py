"""`popsd evaluate` with an endpoint: one process, no model in it."""

from __future__ import annotations

import logging

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.data.files import resolve_path
from nemo_popsd.data.tokenizer import load_tokenizer, read_generation_config, stop_token_ids
from nemo_popsd.evaluation.endpoint import Endpoint
from nemo_popsd.evaluation.run import begin, conclude_all, plan, sample_settings
from nemo_popsd.rollout.engine import SamplingParams

logger = logging.getLogger(__name__)


def evaluate_served(config: PopsdConfig) -> str:
    """Draws what is missing from `evaluation.endpoint`, a line on the disk per response; returns the tables.

    Raises:
        UserError: sets or samples do not fit (see `nemo_popsd.evaluation.run`), or the server fails.
    """
    settings = config.evaluation
    directory = resolve_path(config.student.source, setting="student.source")
    tokenizer = load_tokenizer(directory, setting="student.source")
    endpoint = Endpoint(settings.endpoint, tokenizer)
    planned = plan(config, endpoint.model, tokenizer)
    sampling = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_response_tokens=settings.max_response_tokens,
        stop_token_ids=frozenset(stop_token_ids(tokenizer, read_generation_config(directory))),
    )
    engine = f"endpoint, {settings.endpoint.dialect}, {settings.endpoint.prompts}"
    for one in planned:
        # Which weights these are, only the server knows: one that was restarted with others looks the same from here.
        names = {"model": endpoint.model, "weights_digest": endpoint.identity, "engine": engine}
        begin(one, sample_settings(one.prompts, config, sampling, **names))
        missing = one.missing(settings.samples_per_problem)
        with one.directory.append_to(0) as file:
            for number, sample in enumerate(endpoint.draw(missing, sampling, seed=config.seed), start=1):
                file.add([sample])
                if number % settings.endpoint.concurrency == 0:
                    logger.info("%s: %d of %d samples", one.name, number, len(missing))
    return conclude_all(planned, config, model=endpoint.model)
