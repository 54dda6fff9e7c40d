"""The ranks, arguments and directories that a job derives from Slurm's variables and its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.functions import Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("nodes", "tasks", "per_node", "ranks"),
    [
        ("1", "8", "8", "8 8"),
        ("1", "2", "8", "2 2"),
        ("2", "4", "8", "4 2"),
        ("2", "", "3", "6 3"),
        ("3", "", "", "3 1"),
    ],
)
def test_there_is_one_rank_per_task(job: Job, nodes: str, tasks: str, per_node: str, ranks: str) -> None:
    given = {"SLURM_NNODES": nodes, "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": per_node}
    done = job.run('load_settings; choose_ranks train; echo "$RANKS $RANKS_PER_NODE"', **given)
    assert (done.stdout, done.stderr) == (f"{ranks}\n", "")


def test_ranks_that_do_not_fit_are_refused(job: Job) -> None:
    uneven = job.refusal("load_settings; choose_ranks train", SLURM_NNODES="2", SLURM_NTASKS="3")
    assert uneven.startswith("layout: got 3 ranks on 2 nodes; need the same number on each node")
    many = job.refusal("load_settings; choose_ranks train", SLURM_NTASKS="8", SLURM_GPUS_PER_NODE="h100:4")
    assert many.startswith("layout: got 8 ranks and 4 GPUs per node")
    for command in ("convert", "export"):
        assert "got 2 ranks for popsd" in job.refusal(f"load_settings; choose_ranks {command}")


def arguments(job: Job, *words: str) -> list[str]:
    array = {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}
    done = job.run('load_settings; choose_arguments "$@"; printf "%s\\n" "$JOB" "${ARGUMENTS[@]}"', *words, **array)
    assert (done.returncode, done.stderr) == (0, "")
    name, *rest = done.stdout.splitlines()
    assert name == "11_3"
    return rest


def test_a_task_of_an_array_has_its_index_in_its_arguments(job: Job) -> None:
    given = ["train", "conf.yaml", "output=runs/x_%a", "seed=%a%a", "name=100 %"]
    assert arguments(job, *given) == ["train", "conf.yaml", "output=runs/x_3", "seed=33", "name=100 %"]
    assert arguments(job, "export", "runs/x_%a/checkpoints/final", "out_%a")[-1] == "out_3"
    assert arguments(job, "evaluate", "c.yaml", "output=same", "--checkpoint", "c/step-%a")[-1] == "c/step-3"


@pytest.mark.parametrize(
    "words",
    [
        ("train", "conf.yaml"),
        ("train", "conf.yaml", "seed=%a"),
        ("train", "conf.yaml", "output=a_%a", "output=same"),
        ("export", "checkpoint", "out"),
    ],
)
def test_an_array_with_one_output_for_all_tasks_is_refused(job: Job, words: tuple[str, ...]) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}
    message = job.refusal('load_settings; choose_arguments "$@"', *words, **array)
    assert message.startswith("job array: got the same ")
    assert "as in output=runs/x_%a" in message


def test_outside_an_array_arguments_are_unchanged(job: Job) -> None:
    done = job.run('load_settings; choose_arguments "$@"; echo "$JOB ${ARGUMENTS[*]}"', "train", "c", "output=x_%a")
    assert done.stdout == "12 train c output=x_%a\n"


def test_settings_are_read_as_a_login_shell_does(job: Job) -> None:
    file = job.place / "env.sh"
    file.write_text("[[ -z $NOT_SET ]] && export POPSD_LOGS=/here\nfails() { false; }\nif X=$(fails); then :; fi\n")
    done = job.run('load_settings; echo "$POPSD_LOGS"; set -o | grep -E "errexit|nounset"', POPSD_ENV=str(file))
    assert done.stdout.split() == ["/here", "errexit", "on", "nounset", "on"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("export X=${\n", "need a file that bash can read; correct "),
        ("# first\nfalse\n", "got status 1 at line 2 of "),
        ("f() { return 3; }\n# second\nX=$(f)\n", "got status 3 at line 3 of "),
        ("exit 0\n", "got status 0 at an exit of "),
        ("POPSD_MAX_RESTARTS=many\n", "got POPSD_MAX_RESTARTS='many'; need a whole number; set POPSD_MAX_RESTARTS"),
        (None, "which is not a readable file; need a file like slurm/env.example.sh; set POPSD_ENV"),
    ],
)
def test_failing_settings_end_the_job_with_a_message(job: Job, text: str | None, message: str) -> None:
    file = job.place / "env.sh"
    if text is not None:
        file.write_text(text)
    assert message in job.refusal("load_settings", POPSD_ENV=str(file))


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ("file/logs", "Not a directory; need a directory that can be created"),
        ("/proc/logs", "; need a directory that can be created"),
        ("100%", "% or \\ in the path; need a path without them"),
    ],
)
def test_logs_that_cannot_be_created_are_refused(job: Job, logs: str, message: str) -> None:
    (job.place / "file").touch()
    path = str(job.place / logs)
    line = job.refusal("load_settings; set_up_logs", POPSD_LOGS=path)
    assert line.startswith(f"logs: got POPSD_LOGS={path}, ")
    assert message in line
    assert line.endswith("set POPSD_LOGS")


def test_a_full_disk_for_logs_is_refused(job: Job) -> None:
    (job.start / ".space-0").symlink_to("/dev/full")
    line = job.refusal("load_settings; set_up_logs")
    assert line.startswith(f"logs: got POPSD_LOGS={job.place}/logs, on node1 No space left on device; need space")


def test_the_directory_of_a_job_does_not_depend_on_special_characters(job: Job) -> None:
    done = job.run('load_settings; set_up_logs; echo "$JOB_DIR"', SLURM_JOB_NAME="../a/b c'%j\\é")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{job.place}/logs/.._a_b_c__j_")
    assert done.stdout.endswith("-12\n")
    assert len(list((job.place / "logs").iterdir())) == 1


def test_the_jobs_variables_take_precedence_in_a_container(job: Job) -> None:
    secrets = job.place / "secrets"
    secrets.write_text("MY_KEY=x\n")
    secrets.chmod(0o600)
    job.program("srun", 'echo " --container-image --container-env"')
    steps = "load_settings; CONTAINER=(--container-image=x); container_environment"
    given = {"POPSD_SECRETS": str(secrets), "CONTAINER_ENV": "LD_PRELOAD,FOO", "GLOO_SOCKET_IFNAME": "eth0"}
    done = job.run(steps, **given, CUDA_HOME="/host", TORCH_HOME="/host")
    flag, names = done.stdout.strip().split("=")
    assert flag == "--container-env"
    assert set(names.split(",")) >= {"GLOO_SOCKET_IFNAME", "POPSD_PYTHON", "MY_KEY", "LD_PRELOAD", "FOO"}
    assert not set(names.split(",")) & {"PATH", "HOME", "CUDA_HOME", "TORCH_HOME", "SLURM_JOB_ID"}
    job.program("srun", 'echo " --container-image"')  # an older pyxis
    assert job.run(steps, **given).stdout == ""
    assert job.run(steps.replace("(--container-image=x)", "()"), **given).stdout == ""


def test_a_path_that_pyxis_cannot_mount_is_refused(job: Job) -> None:
    job.program("srun", 'echo " --container-image"')
    line = job.refusal("load_settings; choose_container", CONTAINER_IMAGE="docker://x", POPSD_LOGS="/a:b")
    assert line.startswith("container: got the path /a:b, with a comma or a colon")
