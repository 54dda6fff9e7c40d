"""The scripts that submit jobs, with a program in place of sbatch that records its words."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def submitted(
    script: str, place: Path, *words: str, text: str, answer: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Runs ``slurm/SCRIPT *words`` in `place`; what it printed, and the words of each submission.

    Args:
        script: name of the script.
        place: empty directory.
        words: arguments; `conf.yaml` is the configuration.
        text: of the configuration.
        answer: what sbatch prints.
    """
    sbatch = place / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >>asked\nprintf "\\n\\0" >>asked\necho "{answer}"\n')
    sbatch.chmod(0o755)
    (place / "conf.yaml").write_text(text)
    done = subprocess.run(
        [ROOT / "slurm" / script, *words],
        cwd=place,
        env={"PATH": f"{sbatch.parent}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": "/home/me"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    asked = (place / "asked").read_text() if (place / "asked").exists() else ""
    jobs = [[word for word in job.split("\0") if word] for job in asked.split("\n\0")]
    return done, [job for job in jobs if job]
