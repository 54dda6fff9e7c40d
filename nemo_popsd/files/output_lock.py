"""The lock that admits one training run at a time to an output directory, across machines; see docs/running.md.

    lock/holder-000003     the holder: written once, created by a hard link, which fails if the name exists
    lock/alive-TOKEN       the holder's heartbeat: its modification time changes every few seconds while the holder runs
    lock/leave-TOKEN       a later start of the same batch job requests that the holder save and stop

The file with the highest generation names the holder. A process that takes over from a dead holder creates the next
generation: of several that try, one succeeds, and a holder that was suspended meanwhile sees it. No file is written by
two processes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nemo_popsd.errors import START_AGAIN, TransientError, UserError, describe_error, is_transient, system_error
from nemo_popsd.files.lock_holder import Holder, this_process

logger = logging.getLogger(__name__)

FOLDER = "lock"
"""Folder of the lock below `output`."""
BEAT_SECONDS = 10.0
"""Interval of the heartbeat."""
STALE_SECONDS = 120.0
"""A holder on another machine without a heartbeat for this long, by the waiting process's clock, counts as dead."""
LEAVE_SECONDS = 600.0
"""After this time a holder that was requested to leave and still runs gives up the lock."""
_PATIENCE_SECONDS = LEAVE_SECONDS + 2 * STALE_SECONDS
_POLL_SECONDS = 0.5
_TRIES = 5
_HOLDER = re.compile(r"holder-(\d{6,})")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_OUTPUT_ADVICE = {"need": "a directory that can be written", "fix": "free space, or set output"}


@dataclass(frozen=True)
class Hold:
    """An acquired lock; every rank of the run can check whether it is still held."""

    folder: Path
    """Folder of the lock."""
    generation: int
    """Generation of the holder's file."""
    token: str
    """Token of the holder."""

    def is_held(self) -> bool:
        """Whether no other process has taken over or removed the lock; lists one directory and reads one small file."""
        try:
            self.check()
        except (OSError, UserError, TransientError):
            return False
        return True

    def check(self) -> None:
        """Raises if the lock is no longer held.

        Raises:
            UserError: another run has taken over the lock.
            TransientError: the lock was removed, or a later start of the same job has taken it over.
            OSError: the file system failed.
        """
        what = f"output {str(self.folder.parent)!r}"
        generation, holder = _current_with_retries(self.folder)
        held = (generation, holder.token) == (self.generation, self.token)
        if held and (self.folder / f"alive-{self.token}").exists():
            return
        if generation == 0 or holder.token == self.token:
            raise TransientError(
                what,
                got=f"the lock of this run, {self.folder}, was removed; the run ends without saving",
                fix=START_AGAIN,
            )
        if holder.follows(this_process()):
            raise TransientError(
                what,
                got=f"a later start of the same job has taken over: {holder.describe()}",
                fix="let that start continue from the newest checkpoint",
            )
        raise UserError(
            what,
            got=f"another run, which took over because this one had no heartbeat for {STALE_SECONDS:g} s: "
            f"{holder.describe()}",
            need="one run at a time in a directory; this run ends and writes nothing more",
            fix="set output to another directory, or stop the other run",
        )


class OutputLock:
    """The lock of `<output>/lock`, held by this process.

    Attributes:
        hold: what the ranks of the run check.
    """

    def __init__(self, output: str | Path, *, report: Callable[[str], None] | None = None) -> None:
        """Takes the lock, after waiting until its holder is known to be dead.

        A holder on this machine is dead if its process has ended; on another machine, if it has no heartbeat for
        `STALE_SECONDS`. An earlier start of the same batch job is requested to save and stop.

        Args:
            output: directory of the run; created if missing.
            report: called with a line about what the process waits for; None prints it to standard error.

        Raises:
            UserError: another run holds the lock, or nothing can be written there.
            TransientError: an earlier start of the same job does not stop, or the file system failed.
        """
        self._report = report or (lambda text: print(f"popsd: {text}", file=sys.stderr, flush=True))
        self._output = Path(output).expanduser()
        self._folder = self._output / FOLDER
        self._me = replace(this_process(), token=secrets.token_hex(16))
        self._ended = threading.Event()
        try:
            self._enter()
            generation = self._take()
        except OSError as error:
            raise system_error(f"output {str(self._output)!r}", error, **_OUTPUT_ADVICE) from None
        self.hold = Hold(self._folder, generation, self._me.token)
        self._thread = threading.Thread(target=self._beat, name="output lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Releases the lock; does nothing in a forked process, or if the lock is lost or released."""
        if self._me.pid != os.getpid() or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        held = self.hold.is_held()
        with contextlib.suppress(OSError):
            if held:
                (self._folder / f"holder-{self.hold.generation:06d}").unlink(missing_ok=True)
            (self._folder / f"alive-{self._me.token}").unlink(missing_ok=True)
            self._folder.rmdir()  # fails if another run has started

    # Taking the lock

    def _enter(self) -> None:
        """Makes the folder and a file in it, which keeps a run that ends at this moment from removing the folder."""
        for attempt in range(_TRIES):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                (self._folder / f"alive-{self._me.token}").touch()
                break
            except FileNotFoundError:
                if attempt + 1 == _TRIES:
                    raise

    def _take(self) -> int:
        alive = self._folder / f"alive-{self._me.token}"
        try:
            while True:
                generation, holder = _current(self._folder)
                if generation and not self._wait_for_end(generation, holder):
                    continue
                if self._link(generation + 1):
                    self._clean(generation + 1, holder.token)
                    return generation + 1
        except BaseException:
            alive.unlink(missing_ok=True)
            raise
        finally:
            (self._folder / f"leave-{self._me.token}").unlink(missing_ok=True)

    def _wait_for_end(self, generation: int, holder: Holder) -> bool:
        """Waits until the holder is dead; False if the holder has changed meanwhile.

        Raises:
            UserError: it is alive.
            TransientError: it was requested to leave and is still alive.
        """
        if holder.ended():
            return True
        follows = self._me.follows(holder)
        if holder.on_this_machine() and not follows:
            raise self._in_use(holder)
        if follows:
            _write(self._folder / f"leave-{self._me.token}", json.dumps(asdict(self._me)))
            self._report(f"asking an earlier start of this job to save and stop: {holder.describe()}")
        else:
            self._report(
                f"checking for up to {STALE_SECONDS:g} s whether the run that holds the lock is alive: "
                f"{holder.describe()}"
            )
        started = last_seen = time.monotonic()
        heartbeat = self._heartbeat(holder)
        while time.monotonic() - last_seen < STALE_SECONDS:
            time.sleep(_POLL_SECONDS)
            if _current(self._folder) != (generation, holder):
                return False
            if holder.ended():
                return True
            latest = self._heartbeat(holder)
            if latest != heartbeat and not follows:
                raise self._in_use(holder)
            if latest != heartbeat:
                heartbeat, last_seen = latest, time.monotonic()
            if time.monotonic() - started > _PATIENCE_SECONDS:
                raise TransientError(
                    f"output {str(self._output)!r}",
                    got=f"an earlier start of this job, which was asked to leave and still runs: {holder.describe()}",
                    fix=f"stop that process; {START_AGAIN}",
                )
        return True

    def _heartbeat(self, holder: Holder) -> int:
        """Time of the holder's last heartbeat in ns, by an unspecified clock; 0 if there was none."""
        try:
            # The file is opened because a network file system may answer a plain stat from its cache.
            with (self._folder / f"alive-{holder.token}").open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _link(self, generation: int) -> bool:
        """Makes this process the holder of that generation, unless another process is."""
        content = json.dumps(asdict(self._me))
        path, draft = self._folder / f"holder-{generation:06d}", self._folder / f"draft-{self._me.token}"
        _write(draft, content)
        try:
            os.link(draft, path)
        except FileExistsError:
            return draft.stat().st_nlink == 2  # True if the link was made and the file server's answer was lost
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                _write(path, content, exclusive=True)
            except FileExistsError:
                return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _clean(self, generation: int, previous: str) -> None:
        """Removes the files of earlier holders. A holder that was only suspended sees the higher generation.

        Args:
            generation: of this process.
            previous: token of the holder before it.
        """
        for name in os.listdir(self._folder):
            match = _HOLDER.fullmatch(name)
            left = name.startswith(("alive-", "draft-", "leave-")) and not name.endswith(self._me.token)
            # Recent files of processes other than the previous holder stay: they may be trying to take the lock.
            if (match and int(match[1]) < generation) or name == f"alive-{previous}" or (left and self._is_old(name)):
                (self._folder / name).unlink(missing_ok=True)

    def _is_old(self, name: str) -> bool:
        try:
            age = (self._folder / f"alive-{self._me.token}").stat().st_mtime - (self._folder / name).stat().st_mtime
        except FileNotFoundError:
            return False
        return age > STALE_SECONDS

    def _in_use(self, holder: Holder) -> UserError:
        tasks = "; each task of a job array needs its own output" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
        return UserError(
            f"output {str(self._output)!r}",
            got=f"another run in it, {holder.describe()}",
            need=f"one run at a time in a directory{tasks}",
            fix="set output to another directory, or stop that run",
        )

    # Holding the lock

    def _beat(self) -> None:
        """Updates the heartbeat, and stops the run if a later start of the job requests the lock."""
        alive = self._folder / f"alive-{self._me.token}"
        requested: float | None = None
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.utime(alive)  # works on a full disk
                if requested is None and any(self._me.precedes(other) for other in self._requests()):
                    requested = time.monotonic()
                    logger.warning("a later start of this job requests %s; saving and stopping", self._output)
            except FileNotFoundError:
                return  # the lock is lost; the next check reports it
            except OSError as error:
                logger.warning("cannot update the heartbeat in %s: %s", self._folder, describe_error(error))
            if requested is not None:
                if time.monotonic() - requested > LEAVE_SECONDS:
                    alive.unlink(missing_ok=True)
                    return
                if callable(signal.getsignal(signal.SIGUSR1)):  # without a handler it ends the process or has no effect
                    os.kill(os.getpid(), signal.SIGUSR1)

    def _requests(self) -> Iterator[Holder]:
        for path in self._folder.glob("leave-*"):
            with contextlib.suppress(FileNotFoundError):
                yield Holder.read(path)


def living_holder(output: str | Path) -> tuple[Holder, float] | None:
    """The process that holds the lock of `output`, and the seconds since its last heartbeat; None if nobody holds it,
    or if the holder is dead: ended on this machine, or without a heartbeat for `STALE_SECONDS`.

    Changes nothing; the ages assume that the clocks of this machine and of the file system agree within a minute.
    """
    folder = Path(output) / FOLDER
    generation, holder = _current(folder)
    if not generation or holder.ended():
        return None
    try:
        age = max(0.0, time.time() - (folder / f"alive-{holder.token}").stat().st_mtime)
    except FileNotFoundError:
        return None
    return (holder, age) if holder.on_this_machine() or age < STALE_SECONDS else None


def _current(folder: Path) -> tuple[int, Holder]:
    """Generation and holder of the lock; generation 0 if nobody holds it."""
    while True:
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return 0, Holder()
        generation = max((int(match[1]) for match in map(_HOLDER.fullmatch, names) if match), default=0)
        try:
            return generation, Holder.read(folder / f"holder-{generation:06d}") if generation else Holder()
        except FileNotFoundError:
            continue  # released in between


def _current_with_retries(folder: Path) -> tuple[int, Holder]:
    """Calls `_current`, and retries for some seconds after transient faults such as a failover of the file server."""
    for _ in range(_TRIES - 1):
        try:
            return _current(folder)
        except OSError as error:
            if not is_transient(error):
                raise
            time.sleep(_POLL_SECONDS)
    return _current(folder)


def _write(path: Path, text: str, *, exclusive: bool = False) -> None:
    with path.open("x" if exclusive else "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
