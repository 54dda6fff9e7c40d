"""A real Slurm on this machine: one controller, some virtual nodes, munge; no systemd and no configuration outside its
own directory. Everything ends with `stop`.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
GPUS_OF_A_NODE = 8

_CONFIGURATION = """
ClusterName=popsd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={place}/munge.socket,cred_expire=10
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/%n/spool
SlurmctldPidFile={place}/controller.pid
SlurmdPidFile={place}/%n/pid
SlurmctldLogFile={place}/controller.log
SlurmdLogFile={place}/%n/log
PlugStackConfig={place}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={place}/completed
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
SchedulerParameters=sched_min_interval=200000,bf_interval=2,default_queue_depth=20
KillWait=3
SlurmdTimeout=120
ReturnToService=1
SlurmdParameters=config_overrides
GresTypes=gpu
"""


class Cluster:
    """A running Slurm.

    Attributes:
        place: directory with its configuration, its state and its logs.
        nodes: names of the virtual nodes.
    """

    def __init__(self, place: Path, *, nodes: int) -> None:
        self.place = place
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, "SLURM_CONF": str(place / "slurm.conf")}

    def start(self) -> None:
        """Returns when all nodes are idle."""
        for name in ("state", *self.nodes):
            (self.place / name / "spool").mkdir(parents=True)
        (self.place / "plugstack.conf").touch()
        self._write_configuration()
        self._start_munge()
        self._start("slurmctld", "-D")
        # A slurmd without a controller waits for minutes before it retries.
        self.until(lambda: "is UP" in self.command("scontrol", "ping", check=False), 60, "controller")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        self.until(lambda: self._node_states() == {"idle"}, 60, "idle nodes")

    def stop(self) -> None:
        """Cancels all jobs and ends all daemons and their processes."""
        self.command("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 20
        while self.command("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._started):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._started):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def command(self, *words: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=60, cwd=cwd, env={**self._environment, **variables}
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """`sbatch words...` in `cwd`; the id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, **variables)

    def record(self, job: str) -> dict[str, str]:
        """The controller's record of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", job)))

    def wait_for(self, job: str, *states: str, seconds: float = 120, restarts: int = 0) -> dict[str, str]:
        """The record of `job` once it is in one of `states` and was restarted so many times.

        Fails at once if the job has ended in another state. Slurm delays a requeued job by ten seconds; this function
        starts the job earlier, once its nodes have ended its steps.
        """
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
        deadline = time.monotonic() + seconds
        left = None
        while True:
            record = self.record(job)
            if record["JobState"] in states and int(record["Restarts"]) >= restarts:
                return record
            if (record["JobState"], record["Reason"]) == ("PENDING", "BeginTime") and not _runs_here(record["JobId"]):
                left = left or time.monotonic()
                # Slurm counts in seconds: a start in the second of the end is refused ("credential revoked").
                if time.monotonic() > left + 1.2:
                    self.command("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            assert record["JobState"] not in ended - set(states), f"job {job} ended: {record}\n{self.output(job)}"
            assert time.monotonic() < deadline, f"job {job} is not {states}: {record}\n{self.output(job)}"
            time.sleep(0.3)

    def output(self, job: str) -> str:
        """The output of the batch script so far."""
        found = re.search(r"^ *StdOut=(.*)$", self.command("scontrol", "show", "job", job), re.MULTILINE)
        assert found is not None
        file = Path(found[1])
        return file.read_text() if file.is_file() else ""

    def update_node(self, node: str, state: str) -> None:
        """`scontrol update`, as an administrator does."""
        reason = ["Reason=test"] if state == "down" else []
        self.command("scontrol", "update", f"NodeName={node}", f"State={state}", *reason)

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Returns when no job is left and every node is available."""
        self.until(lambda: not self.command("squeue", "--noheader"), seconds, "an empty queue")
        self.until(lambda: self._node_states() == {"idle"}, seconds, "idle nodes")

    def _node_states(self) -> set[str]:
        return set(self.command("sinfo", "--noheader", "--Node", "--format=%t", check=False).split())

    def until(self, condition, seconds: float, what: str) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{self._last_lines()}"
            time.sleep(0.2)

    def _last_lines(self) -> str:
        """The end of every daemon's log."""
        logs = [self.place / "daemons.log", self.place / "controller.log", *sorted(self.place.glob("node*/log"))]
        texts = {log: log.read_text(errors="replace").splitlines()[-8:] for log in logs if log.is_file()}
        return "\n".join(f"== {log}\n" + "\n".join(lines) for log, lines in texts.items())

    def _start(self, *words: str) -> None:
        log = (self.place / "daemons.log").open("ab")
        self._started.append(
            subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment)
        )

    def _start_munge(self) -> None:
        key = self.place / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.place.chmod(0o711)
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        flags = [f"--{flag}={self.place}/munge.{ending}" for flag, ending in paths.items()]
        self._start("munged", "--foreground", "--force", *flags)
        self.until((self.place / "munge.socket").exists, 20, "socket of munge")

    def _write_configuration(self) -> None:
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        devices = [_character_device(self.place / f"gpu{number}") for number in range(GPUS_OF_A_NODE)]
        lines = [
            _CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                place=self.place,
                controller_port=controller_port,
            )
        ]
        hardware = f"CPUs=16 RealMemory=512000 Gres=gpu:{GPUS_OF_A_NODE} State=UNKNOWN"
        lines += [
            f"NodeName={node} NodeAddr=127.0.0.1 Port={port} {hardware}"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        members = ",".join(self.nodes)
        lines += [
            f"PartitionName=usual Nodes={members} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP",
            f"PartitionName=urgent Nodes={members} PriorityTier=10 PreemptMode=OFF State=UP",
        ]
        (self.place / "slurm.conf").write_text("\n".join(lines) + "\n")
        gres = "\n".join(f"Name=gpu File={device} Flags=nvidia_gpu_env" for device in devices)
        (self.place / "gres.conf").write_text(gres + "\n")


def missing_programs() -> list[str]:
    """The programs of Slurm and munge that are not installed. Debian installs the daemons outside of users' PATH."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def _runs_here(job: str) -> bool:
    """Whether Slurm still manages a step of `job`, whose late messages would be attributed to the next start."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(f"slurmstepd: [{job}.".encode()):
                return True
    return False


def _character_device(path: Path) -> Path:
    """A device file that Slurm accepts as a GPU."""
    try:
        os.mknod(path, 0o20666, os.makedev(1, 3))
    except PermissionError:
        return Path(f"/dev/tty{path.name[-1]}")
    return path


def _free_ports(number: int) -> list[int]:
    held = [socket.socket() for _ in range(number)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
