"""`popsd evaluate` with `evaluation.endpoint`: a server generates the samples, one process requests them."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_popsd.data.config import DataConfig
from nemo_popsd.data.models import model_path
from nemo_popsd.data.tokenizer import load_tokenizer, read_generation_config, stop_token_ids
from nemo_popsd.evaluation.config import EvaluationConfig
from nemo_popsd.evaluation.endpoint import Endpoint
from nemo_popsd.evaluation.run import begin, conclude_all, prepare_sets, sample_settings
from nemo_popsd.rollout.engine import SamplingParams
from nemo_popsd.runtime.pace import Pace

logger = logging.getLogger(__name__)


def evaluate_served(settings: EvaluationConfig, data: DataConfig, *, source: str, output: str | Path, seed: int) -> str:
    """Generates the missing samples at `settings.endpoint` and writes each response immediately; returns the tables.

    Args:
        settings: problem sets, sampling and endpoint.
        data: how rows become prompts.
        source: `student.source`, from which only tokenizer and chat template are read.
        output: directory of the run.
        seed: seed of the run.

    Raises:
        UserError: sets or samples are invalid (see `nemo_popsd.evaluation.run`), or the server fails.
    """
    directory = model_path(source)
    tokenizer = load_tokenizer(directory, setting="student.source")
    endpoint = Endpoint(settings.endpoint, tokenizer)
    problem_sets = prepare_sets(settings, data, tokenizer, model=endpoint.model, output=output)
    sampling = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_response_tokens=settings.max_response_tokens,
        stop_token_ids=frozenset(stop_token_ids(tokenizer, read_generation_config(directory))),
    )
    engine = f"endpoint, {settings.endpoint.dialect}, {settings.endpoint.prompts}"
    for one in problem_sets:
        # Only the server knows its weights: a restart with other weights cannot be detected here.
        names = {"model": endpoint.model, "weights_digest": endpoint.identity, "engine": engine}
        begin(one, sample_settings(one.prompts, sampling, seed=seed, **names))
        missing = one.missing(settings.samples_per_problem)
        pace = Pace(len(missing))
        with one.directory.append_to(0) as file:
            for count, sample in enumerate(endpoint.generate(missing, sampling, seed=seed), start=1):
                file.add([sample])
                if count % settings.endpoint.concurrency == 0:
                    logger.info("%s: %d of %d samples  %s", one.name, count, len(missing), pace.after(count))
    return conclude_all(problem_sets, settings, model=endpoint.model)
