"""The file of secrets is read and never run, and its values are only in the steps' environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.functions import Job

SECRET = "0123456789-not-to-be-printed"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def secrets(place: Path, text: str) -> str:
    file = place / "secrets"
    file.write_text(text)
    file.chmod(0o600)
    return str(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("NAME=plain", "plain"),
        ("NAME=plain\r\n", "plain"),
        ("# comment\n\n  export NAME=plain # comment\n", "plain"),
        ("NAME=a=b&c;d|e#f==\n", "a=b&c;d|e#f=="),
        ("NAME='two words $HOME `id` \\ \"'\n", 'two words $HOME `id` \\ "'),
        ('NAME="two words" # comment\n', "two words"),
        ("NAME=\n", ""),
        ("NAME=first\nNAME=second", "second"),
    ],
)
def test_the_value_of_a_line_reaches_the_steps(job: Job, text: str, value: str) -> None:
    job.program("srun", 'printf "%s" "$NAME"')
    done = job.run(
        "load_settings; CONTAINER=(); run_step check true; [[ -z ${NAME+set} ]]", POPSD_SECRETS=secrets(job.place, text)
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, value, "")


@pytest.mark.parametrize(
    "line",
    [
        "touch ran not-to-be-printed",
        "not-to-be-printed",
        "NAME=$(touch ran; echo not-to-be-printed)",
        "NAME=`touch ran`not-to-be-printed",
        "NAME=not-to-be-printed touch ran",
        'NAME="not-to-be-printed$(touch ran)"',
        "NAME='not-to-be-printed",
        "NAME = not-to-be-printed",
        "MY-NAME=not-to-be-printed",
        "UID=not-to-be-printed",
        "USER_ERROR=not-to-be-printed",
    ],
)
def test_an_invalid_line_is_refused_by_its_number_and_not_run(job: Job, line: str) -> None:
    file = secrets(job.place, f"# mine\nWANDB_API_KEY={SECRET}\n{line}\n")
    refusal = job.refusal("load_settings", POPSD_SECRETS=file)
    assert refusal.startswith(f"POPSD_SECRETS: got line 3 of {file}, which is not NAME=VALUE; need ")
    assert "not-to-be-printed" not in refusal
    assert not (job.place / "ran").exists()


def test_only_a_private_file_is_read(job: Job) -> None:
    file = Path(secrets(job.place, f"NAME={SECRET}\n"))
    link = job.place / "link"
    link.symlink_to(file)
    assert job.run("load_settings", POPSD_SECRETS=str(link)).returncode == 0
    for mode in (0o640, 0o604, 0o660):
        file.chmod(mode)
        assert "chmod 600 it" in job.refusal("load_settings", POPSD_SECRETS=str(file))
    for other in ("nowhere", "programs"):
        assert "chmod 600 it" in job.refusal("load_settings", POPSD_SECRETS=str(job.place / other))


def test_no_log_contains_a_secret_of_any_name(job: Job) -> None:
    file = secrets(job.place, f"NCCL_PLAIN={SECRET}\nPOPSD_PIN=17\nEMPTY=\n")
    job.program("srun", 'echo "given ${#NCCL_PLAIN}: $*"')
    steps = "set -x; load_settings; set_up_logs; CONTAINER=(); show_environment; run_step check --output=x true"
    done = job.run(
        steps,
        POPSD_SECRETS=file,
        NCCL_PLAIN=SECRET,
        POPSD_SAME=SECRET,
        POPSD_INSIDE=f"https://host/?key={SECRET}",
        POPSD_SHORT="17",
        POPSD_KEPT="171",
        Nccl_Api_Token="other",
        NCCL_DEBUG="WARN",
    )
    assert done.returncode == 0, done
    assert done.stdout == f"given {len(SECRET)}: --job-name=check --output=x true\n"
    written = "".join(path.read_text() for path in (job.place / "logs").rglob("*") if path.is_file())
    assert SECRET not in done.stdout + done.stderr + written
    shown = dict(line.split("=", 1) for line in (job.start / "environment").read_text().splitlines())
    assert shown.keys() & {"NCCL_PLAIN", "POPSD_PIN", "POPSD_SAME", "POPSD_INSIDE", "POPSD_SHORT"} == set()
    assert (shown["POPSD_KEPT"], shown["NCCL_DEBUG"]) == ("171", "WARN")
