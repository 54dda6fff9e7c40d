"""The command `diagnose --fp8`, after the configuration has been checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nemo_popsd.config.loading import to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import diagnosis_settings
from nemo_popsd.data.config import SourceConfig
from nemo_popsd.diagnosis.forwards import generate_rollouts
from nemo_popsd.diagnosis.fp8 import TargetError, target_errors
from nemo_popsd.diagnosis.ownership import refuse_other_files
from nemo_popsd.diagnosis.run import choose_rows
from nemo_popsd.evaluation.run import as_file_name
from nemo_popsd.files.atomic import write_text
from nemo_popsd.files.ownership import DIAGNOSIS, write_mark
from nemo_popsd.megatron.config import FP8Config
from nemo_popsd.model.purified_opsd import PurifiedOPSDModel
from nemo_popsd.model.trainer import build_trainer
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.parallel.distributed import shutdown

logger = logging.getLogger(__name__)

FILE = "fp8.json"
_RECIPES = ("tensorwise", "blockwise")
"""Recipes that frozen passes can use on every GPU with FP8."""


def diagnose_fp8(config: PopsdConfig) -> None:
    """Compare the error of the target under emulated FP8 with the distilled effect, on rollouts of `student.source`.

    The numbers are printed and written to `<output>/fp8/<name>/fp8.json`. The model uses local layers without FP8, so
    the result does not depend on the machine.
    """
    directory = Path(config.output) / "fp8" / as_file_name(config.student.source)
    refuse_other_files(directory, (FILE,))
    recipes = dict.fromkeys([*_RECIPES, *([config.fp8.recipe] if config.fp8.frozen else [])])
    config = replace(
        config,
        student=replace(config.student, layers="local"),
        fp8=FP8Config(),
        data=replace(config.data, validation=SourceConfig()),
    )
    model = PurifiedOPSDModel(to_dict_config(config), build_trainer(config, logs=False))
    assert model.training_data is not None
    settings = diagnosis_settings(config)
    rows = [row.row for row in choose_rows(model.training_data.dataset, settings.diagnosis)]
    sampling = model.sampling(config.rollout)
    rollouts = generate_rollouts(model.student, model.engine, sampling, rows, settings, model.stop)
    errors = target_errors(model.student, rollouts, settings, list(recipes))
    if is_rank_zero():
        _write(errors, directory, config.student.source)
        for error in errors:
            print(error.sentence(), flush=True)
            if error.ratio > 1:
                logger.warning("fp8.frozen with fp8.recipe=%s distils more rounding than effect", error.recipe)
    shutdown()


def _write(errors: Sequence[TargetError], directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_mark(directory, DIAGNOSIS)
    write_text(directory / FILE, json.dumps({"name": name, "errors": [asdict(e) for e in errors]}, indent=1) + "\n")
