"""The model card of an export, from its checkpoint and from the evaluations of its run or of the user."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_popsd.checkpoint.model_card import CardOptions, Scores, base_reference, model_card
from nemo_popsd.checkpoint.nemo import NemoCheckpoint
from nemo_popsd.errors import UserError
from nemo_popsd.evaluation.comparison import Evaluation, read_evaluations
from nemo_popsd.evaluation.problem_sets import VALIDATION
from nemo_popsd.evaluation.records import validation_directory
from nemo_popsd.files.ownership import RUN, read_mark

logger = logging.getLogger(__name__)


def card_of(
    checkpoint: NemoCheckpoint, output: Path, *, run: Path | None, adapter: bool, options: CardOptions | None = None
) -> str | None:
    """Return the card of `checkpoint`, exported to `output`; None for a model that was converted but not trained.

    Args:
        checkpoint: open checkpoint.
        output: directory of the export; names the model, unless it is `huggingface` in a run.
        run: output of the run, for its validation scores; None if it is unknown.
        adapter: whether only the adapters are exported.
        options: options of the user.

    Raises:
        UserError: an evaluation directory of the user cannot be read, or its problems differ from those of the base.
    """
    if checkpoint.step == 0:
        return None
    options = options or CardOptions()
    config = checkpoint.config
    return model_card(
        config,
        name=config.name if run is not None and output.parent == run else output.name,
        base=base_reference(config.student.source, options.base),
        step=checkpoint.step,
        adapter=adapter,
        scores=_scores(checkpoint.step, run, options),
        versions=checkpoint.manifest["versions"],
        data_digest=checkpoint.manifest.get("data"),
    )


def run_of(checkpoint: str) -> Path | None:
    """Return the output of the run that contains this checkpoint; None if it is not in a run."""
    output = Path(checkpoint).absolute().parent.parent
    mark = read_mark(output)
    return output if mark is not None and mark.kind == RUN else None


def _scores(step: int, run: Path | None, options: CardOptions) -> dict[str, Scores]:
    if options.evaluation is not None:
        base = {} if options.base_evaluation is None else read_evaluations(options.base_evaluation)
        return {name: Scores(of, base.get(name)) for name, of in read_evaluations(options.evaluation).items()}
    if run is None:
        return {}
    after, before = validation_directory(run, step), validation_directory(run, 0)
    if not after.concluded:
        return {}
    try:
        base_scores = Evaluation.read(before) if before.concluded and step else None
        return {VALIDATION: Scores(Evaluation.read(after), base_scores)}
    except UserError as error:
        logger.warning("the model card has no scores: %s", error)
        return {}
