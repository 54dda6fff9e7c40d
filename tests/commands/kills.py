"""Complete runs that are killed at random moments: each must end bit-equal to an undisturbed run.

    python -m tests.commands.kills --kills 60            all cases, about a quarter of an hour on two cores
    python -m tests.commands.kills --kills 8 --cases 2   what the tests do

A case is one of: saves in the foreground or the background, one rank or two tensor-parallel ones, all weights or LoRA,
`keep_last` 1 or 2. All ranks are killed at once, or one of two, whose peer must then end by itself. Weights, optimizer,
random state, rollouts and metrics are compared. Then `final` is exported, evaluated and resumed, and the resumed run is
compared too.

Attempts are forked from this process, which has imported everything once. Prints one line per case; exit status 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_popsd.checkpoint.retention import FINAL, LATEST, is_name
from tests.command_runner import become_command
from tests.model.runs import SETTINGS, TINY, differences, metrics, rollouts

_STEPS = 4
_MORE = _STEPS + 1
_LIMIT = 240.0  # seconds for anything that must end by itself
_SETTINGS = (
    "training.checkpoint_every=1",
    "training.self_check=false",
    "diagnosis.in_training=false",
    # A rank whose peer is killed before they have connected waits for it this long.
    "training.collective_timeout=30",
)


@dataclass(frozen=True)
class Case:
    """Settings of a run."""

    background: bool
    ranks: int
    lora: bool
    keep_last: int

    @property
    def name(self) -> str:
        """Name in the output."""
        saves, weights = "async" if self.background else "sync", "lora" if self.lora else "full"
        return f"{saves}-{self.ranks}-{weights}-keep{self.keep_last}"

    @property
    def reference(self) -> str:
        """Name of the undisturbed run that it must equal for all settings of saving."""
        return f"{self.ranks}-{'lora' if self.lora else 'full'}"

    def words(self, output: Path, steps: int = _STEPS) -> list[str]:
        """Arguments of the command."""
        return [
            "train",
            TINY,
            f"output={output}",
            *SETTINGS,
            *_SETTINGS,
            f"training.steps={steps}",
            f"training.async_save={str(self.background).lower()}",
            f"training.keep_last={self.keep_last}",
            f"student.adaptation={'lora' if self.lora else 'full'}",
            f"parallel.tensor={self.ranks}",
        ]


@dataclass
class Outcome:
    """Result of a case."""

    kills: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


class Killer:
    """Runs cases below a directory."""

    def __init__(self, work: Path, seed: int) -> None:
        self._work = work
        self._random = random.Random(seed)
        self._seconds: dict[str, float] = {}

    def run(self, case: Case, kills: int) -> Outcome:
        """Kills runs of `case` until `kills` have hit, each run to its end."""
        self._make_reference(case)
        outcome = Outcome()
        while outcome.kills < kills or not outcome.runs:
            output = self._work / f"{case.name}-{outcome.runs}"
            self._kill_until_done(case, output, kills, outcome)
            outcome.runs += 1
            outcome.wrong += self._compare(case, output, self._work / case.reference)
            outcome.wrong += self._use(case, output)
            if outcome.wrong:
                break
            shutil.rmtree(output)
        return outcome

    def _make_reference(self, case: Case) -> None:
        output = self._work / case.reference
        if output.exists():
            return
        plain = Case(False, case.ranks, case.lora, keep_last=0)
        start = time.monotonic()
        self._must_end(plain.words(output), plain.ranks, output)
        self._seconds[case.reference] = time.monotonic() - start
        more = output.with_name(f"{output.name}-more")
        shutil.copytree(output, more)
        self._must_end(plain.words(more, _MORE), plain.ranks, more)

    def _kill_until_done(self, case: Case, output: Path, kills: int, outcome: Outcome) -> None:
        while True:
            processes = _start(case.words(output), case.ranks, self._log(output))
            if outcome.kills < kills:
                time.sleep(self._random.uniform(0.0, self._seconds[case.reference]))
                victims = processes
                if case.ranks > 1 and self._random.random() < 0.5:
                    victims = [self._random.choice(processes)]
                hit = [_ended(process) is None for process in victims]
                for process in victims:
                    _kill(process)
                outcome.kills += all(hit)
            statuses = _wait(processes)
            if None in statuses:
                outcome.wrong.append(f"a rank hangs after its peer was killed, or the run hangs: {statuses}")
                return
            if (output / "DONE").exists():
                return
            if all(status not in (-signal.SIGKILL, None) for status in statuses):
                outcome.wrong.append(f"an attempt that was not killed ended with {statuses}")
                return

    def _compare(self, case: Case, output: Path, reference: Path) -> list[str]:
        wrong = []
        if changed := differences(reference / "checkpoints" / "final", output / "checkpoints" / "final"):
            wrong.append(f"{output.name}: other bits in {changed[:4]}")
        if rollouts(reference) != rollouts(output):
            wrong.append(f"{output.name}: other rollouts")
        for name in ("train/loss", "validation/accuracy"):
            if metrics(reference, name) != metrics(output, name):
                wrong.append(f"{output.name}: other {name}: {metrics(output, name)}, not {metrics(reference, name)}")
        kept = sorted(path.name for path in (output / "checkpoints").iterdir())
        steps = [name for name in kept if is_name(name) and name != FINAL]
        if len(steps) > case.keep_last or set(kept) != {FINAL, LATEST, *steps}:
            wrong.append(f"{output.name}: checkpoints {kept}")
        return wrong

    def _use(self, case: Case, output: Path) -> list[str]:
        """Exports, evaluates and resumes `final`."""
        final = output / "checkpoints" / "final"
        evaluate = ["evaluate", TINY, f"output={output}-evaluation", *SETTINGS, "--checkpoint", str(final)]
        try:
            self._must_end(["export", str(final), f"{output}-export"], 1, output)
            self._must_end(evaluate, 1, output)
            self._must_end(case.words(output, _MORE), case.ranks, output)
        except AssertionError as error:
            return [str(error)]
        reference = self._work / f"{case.reference}-more"
        return [f"resumed, {text}" for text in self._compare(case, output, reference)]

    def _must_end(self, words: Sequence[str], ranks: int, output: Path) -> None:
        log = self._log(output)
        statuses = _wait(_start(words, ranks, log))
        assert statuses == [0] * ranks, f"{words[0]} {output.name}: {statuses}: {log.read_text()[-600:]}"

    def _log(self, output: Path) -> Path:
        return output.with_name(f"{output.name}.log")


_ENDED: dict[int, int] = {}


def _start(words: Sequence[str], ranks: int, log: Path) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(words, rank, ranks, port, log) for rank in range(ranks)]


def _fork(words: Sequence[str], rank: int, ranks: int, port: int, log: Path) -> int:
    process = os.fork()
    if not process:
        os.setsid()
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        become_command(words, log, append=True)
    return process


def _ended(process: int) -> int | None:
    if process not in _ENDED:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            _ENDED[process] = os.waitstatus_to_exitcode(status)
    return _ENDED.get(process)


def _kill(process: int) -> None:
    if _ended(process) is None:
        os.killpg(process, signal.SIGKILL)


def _wait(processes: Sequence[int]) -> list[int | None]:
    deadline = time.monotonic() + _LIMIT
    while any(_ended(process) is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    statuses = [_ended(process) for process in processes]
    for process in processes:
        _kill(process)
    return statuses


def main() -> int:
    """Runs the cases and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="number of kills, of all cases together")
    parser.add_argument("--cases", type=int, default=16, help="number of cases, chosen by the seed")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from nemo_popsd.observability.console import set_up_console

    set_up_console()
    import nemo_popsd.commands.entry  # noqa: F401

    gc.freeze()  # collections in the attempts neither visit nor copy what was imported
    torch.set_num_threads(1)
    cases = [Case(*parts) for parts in itertools.product((False, True), (1, 2), (False, True), (1, 2))]
    random.Random(options.seed).shuffle(cases)
    if options.cases < len(cases):  # one case with one rank, then cases with two ranks
        cases = [case for case in cases if case.ranks == 1][:1] + [case for case in cases if case.ranks == 2]
    cases = cases[: options.cases]
    shares = [options.kills // len(cases) + (n < options.kills % len(cases)) for n in range(len(cases))]
    wrong, kills, start = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as work:
        killer = Killer(Path(work), options.seed)
        for case, share in zip(cases, shares, strict=True):
            outcome = killer.run(case, share)
            kills += outcome.kills
            wrong += bool(outcome.wrong)
            print(
                f"{case.name}: {outcome.kills} kills, {outcome.runs} runs, {'; '.join(outcome.wrong) or 'equal'}",
                flush=True,
            )
    print(f"{kills} kills in {len(cases)} cases, {wrong} wrong, {time.monotonic() - start:.0f} s", flush=True)
    return int(wrong > 0 or kills < options.kills)


if __name__ == "__main__":
    sys.exit(main())
