"""One training run at a time in an output directory, on whatever machine: what it promises is in docs/running.md.

    lock/holder-000003     who has it: written once, made by a hard link, which fails if the name exists
    lock/alive-TOKEN       its time of change moves every few seconds for as long as the holder lives
    lock/leave-TOKEN       a later start of the same batch job asks the holder to save and stop

The highest number holds. Whoever takes over from a holder that is gone makes the next number: of several that try, one
succeeds, and a holder that was asleep meanwhile sees it. No file is ever written by two processes.
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
"""Below `output`."""
BEAT_SECONDS = 10.0
"""Between two signs of life."""
STALE_SECONDS = 120.0
"""A holder on another machine that gives no sign of life for so long, by the clock of who watches, is gone."""
LEAVE_SECONDS = 600.0
"""A holder that was asked to leave, and has not, gives the lock up."""
_PATIENCE_SECONDS = LEAVE_SECONDS + 2 * STALE_SECONDS
_POLL_SECONDS = 0.5
_TRIES = 5
_HOLDER = re.compile(r"holder-(\d{6,})")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_ROOM = {"need": "a directory that can be written", "fix": "free space, or set output"}


@dataclass(frozen=True)
class Hold:
    """What each rank of the holder needs to see whether the lock is still the run's own."""

    folder: Path
    number: int
    token: str

    def is_held(self) -> bool:
        """Whether nobody has taken the lock over or removed it: one listing and one small file."""
        try:
            self.check()
        except (OSError, UserError, TransientError):
            return False
        return True

    def check(self) -> None:
        """Refuses to go on without the lock.

        Raises:
            UserError: another run has taken it over.
            TransientError: it was removed, or left to a later start of the same job.
            OSError: from the file system.
        """
        what = f"output {str(self.folder.parent)!r}"
        number, holder = _current_in_spite_of_hiccups(self.folder)
        if (number, holder.token) == (self.number, self.token) and (self.folder / f"alive-{self.token}").exists():
            return
        if number == 0 or holder.token == self.token:
            raise TransientError(
                what, got=f"the lock of this run, {self.folder}, is gone; the run ends unsaved", fix=START_AGAIN
            )
        if holder.follows(this_process()):
            raise TransientError(
                what,
                got=f"a later start of the same job has taken over: {holder.describe()}",
                fix="leave it to that start, which goes on from the newest checkpoint",
            )
        raise UserError(
            what,
            got=f"another run that has taken it over, since this one gave no sign of life for {STALE_SECONDS:g} s: "
            f"{holder.describe()}",
            need="one run at a time in a directory; this one ends and writes nothing more",
            fix="set output to another directory, or stop the other run",
        )


class OutputLock:
    """The lock of `<output>/lock`, held by this process.

    Attributes:
        hold: for the ranks of the run.
    """

    def __init__(self, output: str | Path, *, say: Callable[[str], None] | None = None) -> None:
        """Takes the lock, or waits until it is known that its holder is gone.

        A holder on this machine is gone if its process is; elsewhere, if it gives no sign of life for `STALE_SECONDS`.
        An earlier start of the same batch job is asked to save and stop.

        Args:
            output: of the run; made if it is not there.
            say: is told what is waited for; None prints to standard error.

        Raises:
            UserError: another run holds it, or nothing can be written there.
            TransientError: an earlier start of the same job does not leave, or the file system failed.
        """
        self._say = say or (lambda text: print(f"popsd: {text}", file=sys.stderr, flush=True))
        self._output = Path(output).expanduser()
        self._folder = self._output / FOLDER
        self._me = replace(this_process(), token=secrets.token_hex(16))
        self._ended = threading.Event()
        try:
            self._enter()
            number = self._take()
        except OSError as error:
            raise system_error(f"output {str(self._output)!r}", error, **_ROOM) from None
        self.hold = Hold(self._folder, number, self._me.token)
        self._thread = threading.Thread(target=self._beat, name="output lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back; harmless if it is lost or released already, and in a forked process."""
        if self._me.pid != os.getpid() or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        own = self.hold.is_held()
        with contextlib.suppress(OSError):
            if own:
                (self._folder / f"holder-{self.hold.number:06d}").unlink(missing_ok=True)
            (self._folder / f"alive-{self._me.token}").unlink(missing_ok=True)
            self._folder.rmdir()  # unless another run has begun

    # Taking it

    def _enter(self) -> None:
        """Makes the folder, which a run that ends at this moment may be removing, and a file that keeps it."""
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
                number, holder = _current(self._folder)
                if number and not self._gone(number, holder):
                    continue
                if self._link(number + 1):
                    self._clean(number + 1, holder.token)
                    return number + 1
        except BaseException:
            alive.unlink(missing_ok=True)
            raise
        finally:
            (self._folder / f"leave-{self._me.token}").unlink(missing_ok=True)

    def _gone(self, number: int, holder: Holder) -> bool:
        """Whether the holder is gone; False if another one has come meanwhile.

        Raises:
            UserError: it lives.
            TransientError: it was asked to leave, lives and does not.
        """
        if holder.ended():
            return True
        follows = self._me.follows(holder)
        if holder.on_this_machine() and not follows:
            raise self._in_use(holder)
        if follows:
            _write(self._folder / f"leave-{self._me.token}", json.dumps(asdict(self._me)))
            self._say(f"asking an earlier start of this job to save and stop: {holder.describe()}")
        else:
            self._say(f"is this run still alive? watching it for up to {STALE_SECONDS:g} s: {holder.describe()}")
        begun = seen = time.monotonic()
        sign = self._sign(holder)
        while time.monotonic() - seen < STALE_SECONDS:
            time.sleep(_POLL_SECONDS)
            if _current(self._folder) != (number, holder):
                return False
            if holder.ended():
                return True
            now = self._sign(holder)
            if now != sign and not follows:
                raise self._in_use(holder)
            if now != sign:
                sign, seen = now, time.monotonic()
            if time.monotonic() - begun > _PATIENCE_SECONDS:
                raise TransientError(
                    f"output {str(self._output)!r}",
                    got=f"an earlier start of this job, which was asked to leave and has not: {holder.describe()}",
                    fix=f"stop that process; {START_AGAIN}",
                )
        return True

    def _sign(self, holder: Holder) -> int:
        """When the holder gave its last sign of life, by whatever clock; 0 if it never did."""
        try:
            # Opened, since a network file system may answer a question for a name out of its memory.
            with (self._folder / f"alive-{holder.token}").open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _link(self, number: int) -> bool:
        """Makes this process the holder with that number, unless somebody else is."""
        content = json.dumps(asdict(self._me))
        path, draft = self._folder / f"holder-{number:06d}", self._folder / f"draft-{self._me.token}"
        _write(draft, content)
        try:
            os.link(draft, path)
        except FileExistsError:
            return draft.stat().st_nlink == 2  # made, and the answer was lost on its way from a file server
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

    def _clean(self, number: int, before: str) -> None:
        """Removes what earlier holders left. Those that are only asleep see the higher number."""
        for name in os.listdir(self._folder):
            match = _HOLDER.fullmatch(name)
            left = name.startswith(("alive-", "draft-", "leave-")) and not name.endswith(self._me.token)
            # Of the one before everything goes; others may be trying to take the lock at this moment.
            if (match and int(match[1]) < number) or name == f"alive-{before}" or (left and self._is_old(name)):
                (self._folder / name).unlink(missing_ok=True)

    def _is_old(self, name: str) -> bool:
        try:
            age = (self._folder / f"alive-{self._me.token}").stat().st_mtime - (self._folder / name).stat().st_mtime
        except FileNotFoundError:
            return False
        return age > STALE_SECONDS

    def _in_use(self, holder: Holder) -> UserError:
        tasks = "; tasks of a job array need an output each" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
        return UserError(
            f"output {str(self._output)!r}",
            got=f"another run in it, {holder.describe()}",
            need=f"one run at a time in a directory{tasks}",
            fix="set output to another directory, or stop that run",
        )

    # Holding it

    def _beat(self) -> None:
        """Moves the time of the sign of life, and hears whether a later start of the job asks for the lock."""
        alive = self._folder / f"alive-{self._me.token}"
        asked: float | None = None
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.utime(alive)  # needs no room on a full disk
                if asked is None and any(self._me.precedes(other) for other in self._asking()):
                    asked = time.monotonic()
                    logger.warning("a later start of this job asks for %s; saving and stopping", self._output)
            except FileNotFoundError:
                return  # lost, which the next check tells
            except OSError as error:
                logger.warning("no sign of life in %s: %s", self._folder, describe_error(error))
            if asked is not None:
                if time.monotonic() - asked > LEAVE_SECONDS:
                    alive.unlink(missing_ok=True)
                    return
                if callable(signal.getsignal(signal.SIGUSR1)):  # otherwise it would end the process, or not be heard
                    os.kill(os.getpid(), signal.SIGUSR1)

    def _asking(self) -> Iterator[Holder]:
        for path in self._folder.glob("leave-*"):
            with contextlib.suppress(FileNotFoundError):
                yield Holder.read(path)


def _current(folder: Path) -> tuple[int, Holder]:
    """Number and content of the lock; 0 where there is none."""
    while True:
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return 0, Holder()
        number = max((int(match[1]) for match in map(_HOLDER.fullmatch, names) if match), default=0)
        try:
            return number, Holder.read(folder / f"holder-{number:06d}") if number else Holder()
        except FileNotFoundError:
            continue  # given back in between


def _current_in_spite_of_hiccups(folder: Path) -> tuple[int, Holder]:
    """The same; a fault of the file system that may pass, such as a server that fails over, is given some seconds."""
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
