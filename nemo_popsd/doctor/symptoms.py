"""Meaning of error texts that a failed run leaves: of this package, torch, NCCL, gloo, vLLM, Slurm and the kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass

ROOT, UNCLEAR, EFFECT = 90, 55, 20
"""Weight of a text: it states the cause; it states that something failed, but not why; it is the effect of another
rank's failure."""


@dataclass(frozen=True)
class Symptom:
    """An error text and its meaning."""

    name: str
    pattern: re.Pattern[str]
    what: str
    """What happened."""
    next: str
    """A command; `{output}`, `{config}`, `{step}`, `{job}`, `{server}` are replaced."""
    weight: int = ROOT
    of_servers: bool = False
    """Whether the logs of vLLM servers are searched as well."""


def _symptom(
    name: str, pattern: str, what: str, next_: str, weight: int = ROOT, *, of_servers: bool = False
) -> Symptom:
    return Symptom(name, re.compile(pattern, re.IGNORECASE), what, next_, weight, of_servers)


SHOW_JOB = "sacct -j {job} --format=JobID,State,ExitCode,MaxRSS,NodeList"
SHOW_KERNEL = "dmesg -T | grep -iE 'killed process|out of memory|xid'"

SYMPTOMS = (
    _symptom(
        "device_memory",
        r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|No available memory for the cache blocks",
        "the memory of a GPU ran out",
        "popsd plan {config}",
        of_servers=True,
    ),
    _symptom(
        "host_memory",
        r"oom[-_ ]?kill|Out of memory: Killed process|OUT_OF_MEMORY|memory cgroup out of memory|"
        r"DefaultCPUAllocator: can't allocate memory|std::bad_alloc|^\w*MemoryError",
        "the memory of a host ran out, and its kernel or Slurm killed a process",
        SHOW_KERNEL,
        of_servers=True,
    ),
    _symptom(
        "time_limit",
        r"DUE TO TIME LIMIT|DUE TO PREEMPTION|DUE TO NODE FAILURE|NODE_FAIL|DUE TO JOB REQUEUE",
        "the batch system ended the job: a time limit, a preemption or a lost node",
        SHOW_JOB,
    ),
    _symptom("cancelled", r"\*\*\* (STEP|JOB) \S+ ON \S+ CANCELLED AT", "the job was cancelled", SHOW_JOB, ROOT - 10),
    _symptom(
        "not_finite",
        r"is NaN or Inf|are NaN or Inf",
        "a loss, gradient or weight was NaN or Inf; no such weight was saved",
        "popsd rollouts show {output} --step {step}",
        ROOT + 5,
    ),
    _symptom(
        "mismatch",
        r"log-probability in the engine is not that of the trainer",
        "the rollout engine and the trainer disagreed (guard.mismatch): the rollouts are not of the trained weights",
        "popsd rollouts show {output} --step {step}",
        ROOT + 5,
    ),
    _symptom(
        "drift",
        r"need a change within guard\.drift\.slack",
        "an alarm ended the run (guard.drift): it left the range of its own first steps",
        "popsd report {output}",
        ROOT + 5,
    ),
    _symptom(
        "self_check",
        r"self-check failed",
        "the self-check before step 1 failed: student and base do not compute the same",
        "popsd doctor {config} --imports",
        ROOT + 5,
    ),
    _symptom(
        "disk_full",
        r"No space left on device|Disk quota exceeded|os error 28|Errno 28|Errno 122",
        "a disk is full, or a quota is used up",
        "df -h {output}",
        ROOT + 5,
        of_servers=True,
    ),
    _symptom(
        "shared_memory",
        r"Bus error|SIGBUS|unable to (open|mmap|write to|allocate) .*(shm|shared memory)|insufficient shared memory",
        "shared memory is too small, or a memory-mapped file vanished (SIGBUS)",
        "df -h /dev/shm",
        ROOT - 5,
    ),
    _symptom(
        "hardware",
        r"\bXid\b|uncorrectable (NVLink|ECC)|device-side assert triggered|illegal memory access|"
        r"unspecified launch failure|GPU has fallen off the bus|ncclUnhandledCudaError|NET/IB : .*(error|failed)",
        "a GPU, its driver or the network failed",
        "nvidia-smi -q -d ECC,ROW_REMAPPER",
        ROOT - 5,
        of_servers=True,
    ),
    _symptom(
        "vllm",
        r"rollouts by vLLM: the server was lost|vLLM server of \S+: got",
        "the vLLM server was lost, or could not start",
        "tail -n 60 {server}",
    ),
    _symptom(
        "lock",
        r"got another run, which took over|a later start of the same job has taken over|the lock of this run, .* was",
        "another run took over the output, or its lock was removed",
        "ls -l {output}/lock",
    ),
    _symptom(
        "timeout",
        r"waited longer than .* for another rank|Watchdog caught collective operation timeout|"
        r"Timed out waiting \d+ms for (recv|send)|collective operation timeout|Wait timeout",
        "a rank waited for another one until the time limit: the other rank hung, was stopped, or was slower",
        "popsd doctor --run {output}  # while it hangs, with `py-spy dump --pid PID` on each rank",
        UNCLEAR + 10,
    ),
    _symptom(
        "segfault",
        r"Segmentation fault|SIGSEGV|Fatal Python error|exitcode\s*:\s*-(11|6)\b",
        "native code crashed",
        "popsd doctor --imports",
        UNCLEAR + 10,
    ),
    _symptom(
        "user_error",
        r"popsd: error: .*: got .*; need ",
        "a setting or file must be changed first; the message names it and the fix",
        "popsd doctor {config}",
        UNCLEAR + 20,
    ),
    _symptom("transient", r"popsd: error: ", "a fault that a new start may fix", "popsd train {config}", UNCLEAR - 5),
    _symptom("killed", r"SIGKILL|exitcode\s*:\s*-9\b", "a process was killed (SIGKILL)", SHOW_KERNEL, UNCLEAR - 10),
    _symptom(
        "peer",
        r"another rank has ended, or the connection|Connection closed by peer|connection (was )?reset|"
        r"remote process exited|communicator was aborted",
        "a rank lost the connection to another one, which had ended first",
        "popsd doctor --run {output} --json",
        EFFECT,
    ),
    _symptom(
        "defect",
        r"^(?:\[?rank\d+\]?:\s*|\s*\d+:\s*)?Traceback \(most recent call last\)",
        "an error that this package does not expect: a defect, or a broken installation",
        "popsd doctor --json",
        UNCLEAR - 20,
    ),
)


def meaning(text: str) -> Symptom | None:
    """The symptom with the greatest weight that matches `text`."""
    found = [symptom for symptom in SYMPTOMS if symptom.pattern.search(text)]
    return max(found, key=lambda symptom: symptom.weight, default=None)
