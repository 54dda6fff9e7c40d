"""The command `diagnose --views`, after the configuration has been checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_popsd.commands.entry import LONGEST_EVALUATION
from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import with_view
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.diagnosis.ownership import refuse_other_files
from nemo_popsd.diagnosis.views.record import FILE, write_views
from nemo_popsd.evaluation.equivalence import require_math_verify
from nemo_popsd.evaluation.run import as_file_name
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.model.views import score_candidates
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.parallel.distributed import initialize, shutdown
from nemo_popsd.report import views_text, write_views_page


def score_views(config: PopsdConfig, views: Sequence[str]) -> None:
    """Score the configured target under each of `views` before training, and print the table.

    The page and its data are written to `<output>/views/<name>`.
    """
    directory = Path(config.output) / "views" / as_file_name(config.student.source)
    refuse_other_files(directory, (FILE,))
    require_math_verify()
    # Replicas do not communicate while they generate; a finished replica waits for those with longer answers.
    initialize(config.parallel, seed=config.seed, timeout=LONGEST_EVALUATION)
    model = PurifiedOPSDModel(to_dict_config(without_rows(config)))
    scores = score_candidates(model, config, {view: with_view(config, view) for view in views}, directory)
    if is_rank_zero():
        write_views(scores, directory)
        print(views_text(scores))
        print(f"page: {write_views_page(directory)}", flush=True)
    shutdown()


def without_rows(config: PopsdConfig) -> PopsdConfig:
    """Return `config` without training and validation rows: the scoring reads them itself, so the model need not."""
    return replace(config, data=replace(config.data, train=SourceConfig(), validation=SourceConfig()))
