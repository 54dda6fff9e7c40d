"""The scripts on a real Slurm, with a substitute for Python if no training is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STAND_IN, TWO, logs, submit, until_ranks_wait

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECRET = "0123456789-not-to-be-printed"


@pytest.fixture(autouse=True)
def _an_idle_cluster(slurm: Cluster) -> None:
    slurm.wait_until_idle()


def test_every_rank_gets_its_variables_and_secrets_are_not_logged(slurm: Cluster, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"WANDB_API_KEY={SECRET}\n")
    secrets.chmod(0o600)
    place = tmp_path / "a place" / 'of \'sub"mission" é $HOME'
    place.mkdir(parents=True)
    job = submit(
        slurm,
        place,
        *TWO,
        "--job-name=a/b c",
        "conf.yaml",
        "name=a b",
        POPSD_SECRETS=str(secrets),
        HF_TOKEN=SECRET,
        NCCL_PROXY="http://me:another-password@proxy:1",
    )
    slurm.wait_for(job, "COMPLETED", seconds=60)
    log = logs(place, "start-0/node-0.log") + logs(place, "start-0/node-1.log")
    for rank in range(4):
        said = dict(re.findall(rf"^{rank}: (\w+)=(.*)$", log, re.MULTILINE))
        assert (said["RANK"], said["LOCAL_RANK"], said["WORLD_SIZE"]) == (str(rank), str(rank % 2), "4")
        assert said["MASTER_ADDR"] == "127.0.0.1"
        assert 20000 <= int(said["MASTER_PORT"]) < 32768
        assert f"{rank}: secret of {len(SECRET)} letters" in log
        assert f"{rank}: asked: train conf.yaml name=a b" in log
    check = logs(place, "start-0/check-*.log")
    for node in range(2):
        assert f"asked: doctor --gpus 8 --free-gib 50 conf.yaml name=a b --sharing {node} 2 {job}.0" in check
    printed = slurm.output(job)
    assert "done: " in printed
    assert (place / "logs" / f"a_b_c-{job}" / "DONE").read_text().startswith(f"job {job}, start 0")
    environment = logs(place, "start-0/environment")
    assert "MASTER_PORT=" in environment
    assert "NCCL_PROXY=http://...@proxy:1" in environment
    assert f"POPSD_SECRETS={secrets}" not in environment
    everything = "".join(path.read_text() for path in place.rglob("*") if path.is_file())
    assert SECRET not in everything
    assert "another-password" not in everything
    assert SECRET not in Path(slurm.place / "controller.log").read_text()

    # Restarted for any reason, it reports that it is done.
    slurm.command("scontrol", "requeue", job)
    slurm.wait_for(job, "COMPLETED", seconds=60, restarts=1)
    assert "start 1" in slurm.output(job)
    assert "done already: " in slurm.output(job)
    assert logs(place, "start-1/*.log") == ""


def test_a_secret_that_others_can_read_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"WANDB_API_KEY={SECRET}\n")
    secrets.chmod(0o644)
    job = submit(slurm, tmp_path, "conf.yaml", POPSD_SECRETS=str(secrets))
    assert slurm.wait_for(job, "FAILED", seconds=60)["ExitCode"] == "2:0"
    assert "chmod 600" in slurm.output(job)


def test_export_none_is_supported(slurm: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "project"
    shutil.copytree(ROOT / "slurm", home / "slurm")
    (home / "slurm" / "env.sh").write_text(f"POPSD_PYTHON={STAND_IN}\nOMP_NUM_THREADS=3\n")
    job = slurm.submit("--export=NONE", *TWO, "slurm/train.sh", "conf.yaml", cwd=home)
    slurm.wait_for(job, "COMPLETED", seconds=60)
    assert "3: OMP_NUM_THREADS=3" in logs(home, "start-0/node-1.log")


def test_a_container_without_pyxis_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "conf.yaml", CONTAINER_IMAGE="docker://nvcr.io#nvidia/nemo:26.02.01")
    assert slurm.wait_for(job, "FAILED", seconds=60)["ExitCode"] == "2:0"
    assert "need Slurm's plugin pyxis" in slurm.output(job)
    assert logs(tmp_path, "start-0/node-*.log") == ""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.skipif(not Path("/usr/include/slurm/spank.h").is_file(), reason="libslurm-dev is not installed")
def test_the_flags_of_a_container_reach_srun(slurm: Cluster, tmp_path: Path) -> None:
    library = slurm.place / "pyxis_stand_in.so"
    source = Path(__file__).parent / "pyxis_stand_in.c"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    (slurm.place / "plugstack.conf").write_text(f"required {library}\n")
    try:
        missing = submit(slurm, tmp_path, "conf.yaml", CONTAINER_IMAGE=str(tmp_path / "nowhere.sqsh"))
        slurm.wait_for(missing, "FAILED", seconds=60)
        assert "import it with enroot" in slurm.output(missing)
        slurm.wait_until_idle()
        image = tmp_path / "image.sqsh"
        image.touch()
        environment = {"GLOO_SOCKET_IFNAME": "eth0", "CONTAINER_ENV": "LD_PRELOAD"}
        job = submit(
            slurm,
            tmp_path,
            *TWO,
            "conf.yaml",
            CONTAINER_IMAGE=str(image),
            CONTAINER_MOUNTS="/models:/m:ro",
            **environment,
        )
        slurm.wait_for(job, "COMPLETED", seconds=60)
        said = logs(tmp_path, f"../popsd-train-{job}/start-0/node-1.log")
    finally:
        (slurm.place / "plugstack.conf").write_text("")
    assert f"SEEN_CONTAINER_IMAGE={image}\n" in said
    assert f"SEEN_CONTAINER_WORKDIR={tmp_path}\n" in said
    assert "SEEN_NO_CONTAINER_MOUNT_HOME=yes\n" in said
    names = re.search(r"SEEN_CONTAINER_ENV=(.*)", said)
    assert names is not None
    assert set(names[1].split(",")) >= {"GLOO_SOCKET_IFNAME", "MASTER_ADDR", "POPSD_RUN_DIR", "LD_PRELOAD"}
    mounts = re.search(r"SEEN_CONTAINER_MOUNTS=(.*)", said)
    assert mounts is not None
    own = [f"{path}:{path}" for path in (ROOT, tmp_path, tmp_path / "logs")]
    assert mounts[1].split(",") == [*own, "/models:/m:ro"]


def test_a_missing_path_and_missing_devices_are_found_before_anything_starts(slurm: Cluster, tmp_path: Path) -> None:
    tiny = str(ROOT / "conf" / "tiny.yaml")
    words = [tiny, f"output={tmp_path / 'run'}", "data.train.path=/nowhere.jsonl"]
    two = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
    job = submit(slurm, tmp_path, *two, *words, POPSD_PYTHON=sys.executable, POPSD_MIN_FREE_GIB="1000000")
    assert slurm.wait_for(job, "FAILED", seconds=240)["ExitCode"] == "2:0"
    printed = slurm.output(job)
    assert re.search(
        r"^    failed  data  data\.train\.path='/nowhere\.jsonl', .* set data\.train\.path$", printed, re.MULTILINE
    )
    for node in range(2):
        assert f"check-{node}.log" in printed
        check = logs(tmp_path, f"start-0/check-{node}.log")
        assert re.search(r"failed +data +data\.train\.path='/nowhere\.jsonl'", check)
        assert re.search(r"failed +disk .*; free space there, or set output", check)
        if not os.path.exists("/dev/nvidia0"):
            assert re.search(r"failed +CUDA devices ", check)
    assert logs(tmp_path, "start-0/node-*.log") == ""
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_more_ranks_than_gpus_are_refused(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--ntasks-per-node=8", "--gpus-per-node=4", "conf.yaml")
    slurm.wait_for(job, "FAILED", seconds=60)
    assert "got 8 ranks and 4 GPUs per node" in slurm.output(job)


def test_a_user_error_is_not_restarted(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *TWO, "conf.yaml", "act=user_error")
    record = slurm.wait_for(job, "FAILED", seconds=60)
    assert (record["ExitCode"], record["Restarts"]) == ("2:0", "0")
    assert "rank-0 on node1 ended first, with 2" in slurm.output(job)


def test_a_rank_that_fails_ends_the_others_and_restarts_are_bounded(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *TWO, "conf.yaml", "act=fail", POPSD_MAX_CRASHES="1")
    record = slurm.wait_for(job, "FAILED", seconds=240)
    assert record["Restarts"] == "1"
    printed = slurm.output(job)
    assert "failed (1 in a row); requeueing" in printed
    assert "failed 2 times in a row; the limit is POPSD_MAX_CRASHES=1" in printed
    assert logs(tmp_path, "start-0/node-1.log").count("asked: train conf.yaml act=fail\n") == 2
    # A later start must not overwrite what the first start wrote.
    assert "asked: train conf.yaml act=fail overwrite=false" in logs(tmp_path, "start-1/node-1.log")


def test_a_cancelled_job_saves_and_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *TWO, "conf.yaml", "act=wait")
    until_ranks_wait(slurm, tmp_path, job)
    slurm.command("scancel", job)
    slurm.wait_until_idle()
    record = slurm.record(job)
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0")
    assert "saved" in logs(tmp_path, "start-0/node-1.log")
    assert "requeueing" not in slurm.output(job)


def test_usr1_saves_and_requeues_up_to_the_limit(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, *TWO, "conf.yaml", "act=wait", POPSD_MAX_RESTARTS="1")
    for start in range(2):
        until_ranks_wait(slurm, tmp_path, job, start)
        slurm.command("scancel", "--batch", "--signal=USR1", job)
        if start == 0:
            slurm.wait_for(job, "RUNNING", seconds=240, restarts=1)
    record = slurm.wait_for(job, "FAILED", seconds=60)
    assert (record["ExitCode"], record["Restarts"]) == ("85:0", "1")
    assert "POPSD_MAX_RESTARTS=1 is reached" in slurm.output(job)


def pipeline(slurm: Cluster, place: Path, *words: str, **variables: str) -> dict[str, str]:
    """The job of each stage by name."""
    environment = {"POPSD_PYTHON": STAND_IN, "POPSD_ENV": str(ROOT / "slurm" / "env.example.sh"), **variables}
    printed = slurm.command(str(ROOT / "slurm" / "pipeline.sh"), *words, cwd=place, **environment)
    return dict(line.split() for line in printed.splitlines())


def test_a_pipeline_runs_its_stages_one_after_the_other(slurm: Cluster, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    conf = tmp_path / "conf.yaml"
    conf.write_text(
        "# one configuration\n"
        "output: out # for all\n"
        "student:\n  lora:\n    source: not this\n  source: 'nowhere'\n"
        'data:\n  train: {path: rows.jsonl}\n  validation:\n    path: "held_out.jsonl"\n'
    )
    jobs = pipeline(slurm, tmp_path, "--nodes=2", str(conf), f"student.source={model}", "name=a b", "seed=3")
    assert list(jobs) == ["convert", "train", "export", "evaluate"]
    for before, after in (("convert", "train"), ("train", "export"), ("export", "evaluate")):
        waiting = slurm.record(jobs[after])
        assert waiting["Dependency"].startswith(f"afterok:{jobs[before]}(") or waiting["JobState"] != "PENDING"
    ends = []
    for job in jobs.values():
        record = slurm.wait_for(job, "COMPLETED", seconds=120)
        ends.append((record["StartTime"], record["EndTime"]))
    assert ends == sorted(ends)
    assert "2 nodes" in slurm.output(jobs["train"])
    assert "1 nodes" in slurm.output(jobs["evaluate"])
    asked = {
        name: re.search(r"0: asked: (.*)", logs(tmp_path, f"../popsd-{name}-{job}/start-0/node-0.log"))
        for name, job in jobs.items()
    }
    options = {name: match[1] for name, match in asked.items() if match}
    assert options == {
        "convert": f"convert hf-to-nemo {model} out/student",
        "train": f"train {conf} student.source={model} name=a b seed=3 student.source=out/student "
        "training.export_huggingface=false",
        "export": "export out/checkpoints/final out/huggingface",
        "evaluate": f"evaluate {conf} student.source={model} name=a b seed=3 student.source=out/student "
        "--checkpoint out/checkpoints/final",
    }


@pytest.mark.parametrize(
    ("sets", "override", "evaluates"),
    [
        ("[]", [], False),
        ("[aime24]", [], True),
        ("\n    # below its key\n    - aime24", [], True),
        ("\n  samples_per_problem: 2", [], False),
        ("[aime24]", ["evaluation.sets=[]"], False),
        ("{}", [], False),
        ("{mine: rows.jsonl}", [], True),
        ("\n    mine: rows.jsonl", [], True),
        ("{}", ["evaluation.sets.mine=rows.jsonl"], True),
    ],
)
def test_a_pipeline_evaluates_if_sets_or_rows_are_named(
    slurm: Cluster, tmp_path: Path, sets: str, override: list[str], evaluates: bool
) -> None:
    conf = tmp_path / "conf.yaml"
    conf.write_text(f"output: out\nstudent:\n  source: nemo_popsd:tiny_reasoner\nevaluation:\n  sets: {sets}\n")
    jobs = pipeline(slurm, tmp_path, str(conf), *override, POPSD_EVALUATE_OPTIONS="--ntasks-per-node=2 --nodes=2")
    assert list(jobs) == ["train", "export"] + ["evaluate"] * evaluates
    if evaluates:
        assert slurm.record(jobs["evaluate"])["NumTasks"] == "4"
    slurm.command("scancel", *jobs.values())


def test_the_stages_after_a_failed_one_are_cancelled(slurm: Cluster, tmp_path: Path) -> None:
    conf = tmp_path / "conf.yaml"
    conf.write_text("output: out\nstudent:\n  source: nemo_popsd:tiny_reasoner\n")
    jobs = pipeline(slurm, tmp_path, str(conf), "act=user_error")
    assert list(jobs) == ["train", "export"]  # nothing to convert, nothing to evaluate
    slurm.wait_for(jobs["train"], "FAILED", seconds=60)
    slurm.wait_for(jobs["export"], "CANCELLED", seconds=60)


def test_a_pipeline_without_a_configuration_submits_nothing(slurm: Cluster, tmp_path: Path) -> None:
    for words in ([], ["--nodes=2"], ["nowhere.yaml"]):
        done = subprocess.run([ROOT / "slurm" / "pipeline.sh", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: ")


def test_a_pipeline_with_a_refused_stage_cancels_all(slurm: Cluster, tmp_path: Path) -> None:
    conf = tmp_path / "conf.yaml"
    conf.write_text("output: out\nstudent:\n  source: nemo_popsd:tiny_reasoner\n")
    home = tmp_path / "project"
    shutil.copytree(ROOT / "slurm", home / "slurm")
    export = home / "slurm" / "export.sh"
    export.write_text(export.read_text().replace("--nodes=1", "--nodes=99"))
    with pytest.raises(AssertionError, match="all submitted jobs were cancelled"):
        slurm.command(str(home / "slurm" / "pipeline.sh"), str(conf), cwd=tmp_path, POPSD_PYTHON=STAND_IN)
    slurm.wait_until_idle()
    newest = slurm.command("squeue", "--noheader", "--states=all", "--sort=-i", "--format=%j %T").splitlines()[0]
    assert newest == "popsd-train CANCELLED"
