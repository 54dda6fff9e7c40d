"""Random configurations, overrides and command lines, up to where a model would be built.

Every case must end within ten seconds, without a traceback, with nothing on disk: either accepted, and then within its
bounds and unchanged after it was printed and read again, or refused in one line with exit status 2.

Eighty cases run with the quick tests, CASES with the slow ones. More cases, with another seed:

    POPSD_FUZZ_CASES=2000 POPSD_FUZZ_SEED=7 python -m pytest -s tests/config/test_fuzz.py
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_popsd.cli.main import main
from nemo_popsd.config.keys import known_keys
from nemo_popsd.config.loading import load_config, to_dict_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.settings.bounds import Bounds, Text, declared_rules

CASES = int(os.environ.get("POPSD_FUZZ_CASES", "200"))
SEED = int(os.environ.get("POPSD_FUZZ_SEED", "3"))  # some of its command lines are accepted
SECONDS = 10
LONGEST_LINE = 1500

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "conf").glob("*.yaml"))
TINY = ROOT / "conf" / "tiny.yaml"
COMMANDS = ["config"] * 4 + ["plan"] * 3 + ["train"] * 4 + ["evaluate"] * 2 + ["diagnose"] * 2 + ["doctor"]
KEYS = [key for key, kind in known_keys().items() if not is_dataclass(kind)]
SECTIONS = [key for key, kind in known_keys().items() if is_dataclass(kind)]
PLAN_KEYS = [key for key, kind in known_keys(PlanConfig).items() if not is_dataclass(kind)]

# fmt: off
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 8, 10**6, 10**9, 10**12, 10**18, 2**32, 2**64, 10**30, -(10**30), 0.5, 1.5, 1e-300, 1e-30, 1e-9,
    1e30, 1e300, float("nan"), float("inf"), float("-inf"), True, False,
]
TEXTS = [
    "", "x", "a b", "é𝄞\u202e", "\x00", "\x1b[31m", "a\nb", "\u2028", "\udcff", "'", '"', "[", "{a", "a: b", "#",
    "a #b", "null", "true", "yes", "off", "1e5", "1e400", "0x10", "1_000", "010", "1:30", "2026-11-28", ".5", "1.",
    "1e", "???", "${seed}", "${nope}", "${oc.env:HOME}", "${oc.env:NOPE_X}", "${oc.env:NOPE,7}", "${name}${name}", "${",
    "$", "\\${a}", "${oc.decode:'['}", "${student}", "${oc.create:{a:1}}", "${.steps}", "${${name}}",
    "../../etc", "~", "~/x", "~nobody-here/x", "$HOME/x", "/dev/null", "/dev/zero", "/proc/self/mem", "/", "a" * 300,
    "a/" * 3000, "a" * 50_000, "nemo_popsd:", "nemo_popsd:../../x", "nemo_popsd:nope", "http://x", "-", "--help", "=",
    "==", "!!python/object:os.system x", "!!int 3", "&a *a", "<<", "(a+)+$", "(", "{question!r}", "{0}",
    "{question.__class__}",
]
# fmt: on
LISTS: list[Any] = [[], [1], ["a"], [[1]], [None], ["a", "a"], [1e300], {}, {"a": 1}, {"steps": 3}, None]
VALUES = [*NUMBERS, *TEXTS, *LISTS]


@dataclass(frozen=True)
class Case:
    """A command line and the content of its files."""

    label: str
    argv: list[str]


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[leaf] = value


def raw_texts(base: str) -> list[bytes]:
    """Complete files that are not valid configurations, and some that are."""
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    # fmt: off
    texts: list[str | bytes] = [
        "", "# x\n", "null\n", "[1, 2]\n", "hello\n", "---\n", "...\n", "\x00", base + "\x00", "\ufeff" + base,
        base.replace("\n", "\r\n"), base.replace("\n", "\r"), base.replace("  ", "\t"), base.encode("utf-16"),
        base.encode() + b"# \xe9\n", bytes(range(256)), base + "\nseed: 7\n", base + "\ntraining: {steps: 1}\n",
        base + "\n---\na: 1\n", base + "\n1: 2\n", base + "\n~: 2\n", base + "\nyes: 2\n", base + "\n? [a, b]\n: 2\n",
        base + "\n? {a: b}\n: 2\n", base + "\n2026-01-01: 2\n", base + "\n'': 2\n", base + "\n\u0441\u0435\u0434: 2\n",
        base + "\n" + "k" * 5000 + ": 2\n", base + "\ntraining.steps: 3\n", base + "\nparallel:\n",
        base + "\nparallel: [1]\n", base + "\nparallel: abc\n", base + "\nparallel: ${student}\n",
        base + "\n<<: {seed: 1}\n", base + "\n<<: 3\n", bomb, base + bomb, "a: &a [*a]\n", "training: &t\n  x: *t\n",
        "data: &d {train: {columns: &c {<<: *c}}}", "a: " + "[" * 3000 + "]" * 3000,
        "".join("  " * i + "a:\n" for i in range(400)), "training: " + "{a: " * 2000, "[" + "x, " * 40_000 + "]",
        "name: " + "x " * 60_000, "x" * 10**6, base + "\nseed: " + "9" * 5000, base + "\ntarget: os.system\n",
        base + "\nnemo_version: 3\n", "name: ${output}\noutput: ${name}\n", "seed: !foo 3", "seed: !!set {a, b}",
        "seed: !!python/object/apply:os.system ['touch x']", "seed: !!python/name:os.system", "name: !!binary aGVsbG8=",
        "training:\n  steps: ???\n", "name: ???\n", "parallel: ???\n", "%YAML 9.9\n---\na: 1", "%TAG ! x\n---\na: 1",
        "a: |\n b\n  c\nd: >-\n e", "@a: 1", "`a: 1", "a: 'b", 'a: "b\\xZZ"', "a: *b", "- - - -\n a",
    ]
    # fmt: on
    return [text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass") for text in texts]


def cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """An endless sequence of cases: files with wrong values, damaged files, overrides, options."""
    recipes = [path.read_text(encoding="utf-8") for path in RECIPES]
    raw = raw_texts(recipes[-1])

    def of(key: str) -> Any:
        """A plausible value of `key`, or any value."""
        kind = known_keys().get(key)
        likely = {int: [1, 2, 4, 8], float: [0.1, 0.5, 1], bool: [True, False], str: ["x", "none", "auto", "/data/x"]}
        return rng.choice(likely[kind]) if kind in likely and rng.random() < 0.4 else rng.choice(VALUES)

    def word() -> str:
        misspelt = rng.choice(KEYS) + rng.choice(["x", ".y", "", ".", "[0]"])
        key = rng.choice([*KEYS, *PLAN_KEYS, rng.choice(SECTIONS), misspelt])
        key = rng.choice([key] * 9 + [rng.choice(TEXTS)])
        value = of(key)
        text = value if isinstance(value, str) else json.dumps(value)
        return rng.choice([f"{key}={text}"] * 12 + [key, f" {key} = {text}", f"+{key}={text}", text])

    def option(command: str) -> list[str]:
        names = {
            "plan": ["--fastest", "--json"],
            "evaluate": ["--checkpoint", "--compare"],
            "diagnose": ["--checkpoint"],
            "doctor": ["--json", "--strict", "--missing", "--evaluate", "--gpus", "--free-gib", "--sharing"],
        }.get(command, ["--nope"])
        values = [*TEXTS, "1", "-1", "nan", "1e999", str(folder)]
        return [rng.choice(names), *rng.sample(values, rng.choice([0, 0, 1, 1, 2]))]

    number = 0
    while True:
        number += 1
        command, kind = rng.choice(COMMANDS), rng.random()
        path, words, label = rng.choice([*RECIPES, TINY, TINY, TINY]), [], ""
        if kind < 0.35:
            tree, changes = copy.deepcopy(yaml.safe_load(rng.choice(recipes))), []
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                key = rng.choice([*KEYS, rng.choice(KEYS) + rng.choice(["x", ".y"])])
                value = of(key)
                set_key(tree, key, value)
                changes.append(f"{key}: {str(value)[:50]!r}")
            path = folder / f"{number}.yaml"
            path.write_bytes(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))
            label = "values " + ", ".join(changes)
        elif kind < 0.5:
            data = bytearray(rng.choice([*raw, *(text.encode() for text in recipes * 8)]))
            for _ in range(rng.choice([0, 1, 1, 2, 5])):
                at = rng.randrange(len(data) + 1)
                change = rng.choice(["cut", "insert", "repeat", "flip"])
                if change == "cut":
                    del data[at : at + rng.choice([1, 5, 200])]
                elif change == "insert":
                    data[at:at] = str(rng.choice(VALUES))[:200].encode("utf-8", "surrogatepass")
                elif change == "repeat":
                    data[at:at] = data[max(0, at - 60) : at]
                elif at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
            path = folder / f"{number}.yaml"
            path.write_bytes(bytes(data))
            label = "text"
        elif kind < 0.9:
            words = [word() for _ in range(rng.choice([1, 1, 2, 3]))]
        else:
            words = option(command) + [word() for _ in range(rng.choice([0, 1]))]
        conf = str(path) if kind < 0.97 else rng.choice(["/dev/zero", "/dev/stdin", str(folder), "", *TEXTS])
        if command == "plan" and rng.random() < 0.5:
            words.append(rng.choice(["nodes=1", "nodes=1,2,4", "nodes=100000", "gpus_per_node=1024", "node=2"]))
        yield Case(label or " ".join(words), [command, conf, *words])


class Hang(BaseException):
    """Raised by a case that exceeds the time limit."""


def run(argv: list[str]) -> tuple[int | None, str, str]:
    """Exit status (None for a traceback or a hang), standard output, and standard error or the traceback."""

    def stop(*_: object) -> None:
        raise Hang

    out, err = io.StringIO(), io.StringIO()
    status: int | None = None
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else None
    except Hang:
        err.write(f"HANG: {traceback.format_exc()[-600:]}")
    except BaseException:
        err.write(f"TRACEBACK: {traceback.format_exc()[-900:]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return status, out.getvalue(), err.getvalue()


def out_of_bounds(config: PopsdConfig) -> str | None:
    """The first setting of an accepted configuration with a value that its declaration excludes."""
    rules = dict(declared_rules(PopsdConfig))
    for key in KEYS:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        rule = rules.get(key, Text.LINE)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(rule, Bounds) and item is not None and not rule.contains(item):
                return f"{key}={item!r}, which is not {rule}"
            if isinstance(item, str) and (item == "???" or "\x00" in item or (rule is not Text.PROSE and "\n" in item)):
                return f"{key}={item!r}"
            if isinstance(item, str) and rule is Text.PATH and ("$" in item or item.startswith("~")):
                return f"{key}={item!r}"
    return None


def verdict(case: Case, status: int | None, out: str, err: str, accepted: list[PopsdConfig]) -> str | None:
    """Why the result of a case is wrong; None if it is right."""
    command, lines = case.argv[0], err.splitlines()
    if status is None:
        return err[-900:]
    if status == 2:
        extra = [] if command == "plan" else lines[1:]  # the layouts that would fit
        if not lines or not lines[0].startswith("popsd: error: ") or extra:
            return f"not one line: {err[:300]!r}"
        if len(lines[0]) > LONGEST_LINE or not lines[0].isprintable():
            return f"a line of {len(lines[0])} characters: {lines[0][:300]!r}"
        return None if out == "" else f"refused, but wrote {out[:200]!r}"
    if status != 0 and not (command == "doctor" and status == 1):
        return f"exit status {status}"
    if command == "config" and "usage:" not in out:
        tree = OmegaConf.create(out)
        printed = Path.cwd().parent / "printed.yaml"
        printed.write_text(out, encoding="utf-8")
        accepted.append(load_config(printed))
        if OmegaConf.to_yaml(to_dict_config(accepted[-1])) != out:
            return f"printed and read again it is another configuration: {tree}"
    for config in accepted:
        wrong = out_of_bounds(config)
        if wrong is not None:
            return f"accepted {wrong}"
    return None


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> list[PopsdConfig]:
    """The configurations that were accepted; no model is built."""
    configs: list[PopsdConfig] = []
    entry = types.ModuleType("nemo_popsd.commands.entry")
    keep: Callable[..., int] = lambda config, *_, **__: configs.append(config) or 0  # noqa: E731
    for name in ("train", "evaluate", "diagnose"):
        setattr(entry, name, keep)
    monkeypatch.setitem(sys.modules, "nemo_popsd.commands.entry", entry)
    monkeypatch.setattr("nemo_popsd.observability.console.set_up_console", lambda: None)
    monkeypatch.setattr("nemo_popsd.commands.served.evaluate_endpoint", keep)
    monkeypatch.setattr("nemo_popsd.doctor.examination.cuda_devices", list)
    monkeypatch.setattr("nemo_popsd.doctor.run.examine_sharing", lambda *_, **__: None)
    # The lock is taken before a model is built, and would create the random output directories.
    monkeypatch.setattr(
        "nemo_popsd.cli.train.OutputLock", lambda *_, **__: types.SimpleNamespace(release=int), raising=False
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return configs


@pytest.mark.parametrize(
    ("number_of_cases", "sometimes_accepted"),
    [(80, {"config"}), pytest.param(CASES, {"config", "train"}, marks=pytest.mark.slow)],
)
def test_random_command_lines(
    number_of_cases: int,
    sometimes_accepted: set[str],
    accepted: list[PopsdConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, here = tmp_path / "files", tmp_path / "here"
    files.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    slowest, started = 0.0, time.monotonic()
    sequence = cases(random.Random(SEED), files)
    for _ in range(number_of_cases):
        case = next(sequence)
        accepted.clear()
        start = time.monotonic()
        status, out, err = run(case.argv)
        slowest = max(slowest, time.monotonic() - start)
        problem = verdict(case, status, out, err, accepted)
        if os.listdir(here):
            problem = f"created {os.listdir(here)}"
        counts[f"{case.argv[0]} {'accepted' if status in (0, 1) else 'refused' if status == 2 else 'failed'}"] += 1
        if problem is not None:
            wrong.append(f"{[shown[:120] for shown in case.argv]} ({case.label[:200]}): {problem}")
    summary = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
    ended = f"slowest {slowest:.1f} s, all {time.monotonic() - started:.0f} s"
    print(f"\n{number_of_cases} cases, seed {SEED}: {summary}; {ended}")
    assert not wrong, f"{len(wrong)} of {number_of_cases}:\n" + "\n".join(wrong[:20])
    for command in sometimes_accepted:
        assert counts[f"{command} accepted"]
