"""Writing the HTML pages of runs and diagnoses, on rank 0."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_popsd.diagnosis.record import Diagnosis
from nemo_popsd.errors import UserError
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.report import write_diagnosis_page, write_report
from nemo_popsd.report.page import NAME

logger = logging.getLogger(__name__)


def write_diagnosis(diagnosis: Diagnosis, directory: Path) -> None:
    """Write the files of a diagnosis and its page, and print the path of the page."""
    if is_rank_zero():
        diagnosis.write(directory)
        print(f"diagnosis: {write_diagnosis_page(directory)}", flush=True)


def report_run(output: Path) -> None:
    """Write the report of the run in `output` and print its path.

    The run is already complete, so an error here is only logged, with a traceback if it is a defect.
    """
    if not is_rank_zero():
        return
    try:
        page = write_report([output], output / NAME)
    except UserError as error:
        logger.warning("the run is complete, but its report was not written: %s", error)
    except Exception:
        logger.exception("the run is complete, but its report could not be written; try: popsd report %s", output)
    else:
        print(f"report: {page}", flush=True)
