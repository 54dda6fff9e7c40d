"""Checks of a command line without running it: programs, options, settings and files exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_popsd.cli.main import parse
from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import UserError
from nemo_popsd.planning.command import plan_text
from tests.docs.pages import yaml_files

ROOT = Path(__file__).parents[2]
JOBS = {"train": "train", "evaluate": "evaluate", "convert": "convert", "export": "export", "doctor": "doctor"}
"""Script in slurm/ to the command that it runs."""
_WITH_CONFIGURATION = ("train", "evaluate", "diagnose", "config", "data")


class WrongCommandError(AssertionError):
    """A command that would not do what the page shows."""


def statements(script: str) -> list[list[str]]:
    """The commands of a block as words: continued lines are joined, comments dropped, substitutions opened."""
    found: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        found.append([])
        for word in shlex.split(line, comments=True):
            if word in ("&&", "||", "|", ";"):
                found.append([])
            else:
                found[-1].append(word)
    return [opened(words) for words in found if words]


def opened(words: list[str]) -> list[str]:
    """The command inside `name=$(command)`; any other as it is."""
    if re.match(r"\w+=\$\(", words[0]) and words[-1].endswith(")"):
        words = [words[0].partition("$(")[2], *words[1:]]
        words[-1] = words[-1].removesuffix(")")
    return words


def check(words: Sequence[str], *, refused: bool = False) -> None:
    """Raise `WrongCommandError` unless the checks of the command pass.

    Args:
        words: the command.
        refused: whether the page shows its refusal.
    """
    statement = shlex.join(words)
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program = words[0].removeprefix(".venv/bin/")
    checks = {**_PROGRAMS, "popsd": lambda words: check_popsd(words, refused=refused)}
    if program not in checks:
        raise WrongCommandError(f"no check for {program!r} in {statement!r}: add one to tests/docs/command_checks.py")
    try:
        checks[program](list(words[1:]))
    except SystemExit as end:
        if end.code:
            raise WrongCommandError(f"popsd does not take these arguments: {statement}") from None
    except UserError as error:
        raise WrongCommandError(f"{statement}: {error}") from None


def check_popsd(words: Sequence[str], *, refused: bool = False) -> None:
    """Check the arguments with the parser, and the settings with the configuration."""
    args = parse([word.replace("%a", "1") for word in words])
    configuration = getattr(args, "config", None)
    if configuration is None:
        return
    if configuration in (files := yaml_files()):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / configuration).write_text(files[configuration])
            load_config(Path(folder) / configuration, args.overrides)
        return
    require_file(configuration)
    if args.command in _WITH_CONFIGURATION:
        load_config(ROOT / configuration, args.overrides)
    elif args.command == "plan" and not refused:
        plan_text(ROOT / configuration, args.overrides, fastest_layout=args.fastest, explain=args.explain)


def check_torchrun(words: Sequence[str]) -> None:
    """torchrun's own options, then `-m nemo_popsd`."""
    from torch.distributed.run import get_args_parser

    own = words.index("-m")
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    for word in words[:own]:
        if word.startswith("-") and word not in known:
            raise WrongCommandError(f"torchrun has no option {word}")
    if words[own + 1] != "nemo_popsd":
        raise WrongCommandError(f"torchrun starts {words[own + 1]}")
    check_popsd(words[own + 2 :])


def check_python(words: Sequence[str]) -> None:
    """A module of this repository or an installed one, and options that its source names."""
    if words[0] != "-m":
        require_file(words[0])
        return
    name = words[1]
    if name == "nemo_popsd":
        check_popsd(words[2:])
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise WrongCommandError(f"python -m {name}: no such module")
    if name == "pip":
        return
    if name == "pytest":
        paths = [word for word in words[2:] if word.startswith("tests")]
        for path in paths:
            require_file(path)
        return
    sources = sorted(Path(str(spec.origin)).parent.glob("*.py")) if spec.submodule_search_locations else []
    if sources and not (Path(str(spec.origin)).parent / "__main__.py").exists():
        raise WrongCommandError(f"python -m {name}: a package without __main__.py")
    source = "".join(path.read_text() for path in sources or [Path(str(spec.origin))])
    for word in words[2:]:
        if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source:
            raise WrongCommandError(f"python -m {name} has no option {word}")


def check_make(words: Sequence[str]) -> None:
    """Targets and variables of the Makefile; ARGS of `make train` as settings."""
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    for word in words:
        name, given, value = word.partition("=")
        if given:
            default = rf"^(export )?{name} \?=|^ifeq \(\$\(origin {name}\), undefined\)"
            if not re.search(default, makefile, re.MULTILINE):
                raise WrongCommandError(f"the Makefile has no variable {name}")
            if name == "ARGS" and "train" in words:
                check_popsd(["train", "conf/tiny.yaml", *shlex.split(value)])
        elif name not in targets:
            raise WrongCommandError(f"the Makefile has no target {name}")


def check_sbatch(words: Sequence[str]) -> None:
    """A job script, and the arguments of its command."""
    scripts = [index for index, word in enumerate(words) if word.endswith(".sh")]
    if not scripts or any(not word.startswith("-") for word in words[: scripts[0]]):
        raise WrongCommandError(f"no script in sbatch {' '.join(words)}")
    script = words[scripts[0]]
    require_file(script)
    check_popsd([JOBS[Path(script).stem], *words[scripts[0] + 1 :]])


def check_training(words: Sequence[str]) -> None:
    """Options of sbatch, then the arguments of the training."""
    rest = [word for word in words if not word.startswith("-")]
    check_popsd(["train", *rest])


def check_sweep(words: Sequence[str]) -> None:
    """Its own options, those of sbatch, then the arguments of the training."""
    rest = [word for word in words if not word.startswith("-")]
    grid = [word.partition("=")[2] for word in words if word.startswith("--grid=")]
    seeds = [word.partition("=")[2] for word in words if word.startswith("--seeds=")]
    check_popsd(["train", *rest, *(word for axis in grid for word in ("--grid", axis)), "--seeds", *seeds])


def check_first_file(words: Sequence[str]) -> None:
    """Check that the first argument is a file of the repository, an environment, or the copy of an example."""
    made = {"slurm/env.sh": "slurm/env.example.sh", ".venv/bin/activate": "Makefile"}
    require_file(made.get(words[0], words[0]))


def check_docker(words: Sequence[str]) -> None:
    """Check that the image is built from the repository; the reader chooses where to push it."""
    if words[0] == "push":
        return
    if words[0] != "build" or words[-1] != ".":
        raise WrongCommandError(f"docker {' '.join(words)}")
    require_file("Dockerfile")


def require_file(path: str | Path) -> None:
    """Raise `WrongCommandError` unless the repository has the file."""
    if not (ROOT / path).exists():
        raise WrongCommandError(f"{path} does not exist")


def needs_nothing(words: Sequence[str]) -> None:
    """A program of the system, applied to the reader's files, is not checked."""


_PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "torchrun": check_torchrun,
    "python": check_python,
    "python3": check_python,
    "make": check_make,
    "sbatch": check_sbatch,
    "slurm/pipeline.sh": check_training,
    "slurm/train.sh": check_training,
    "slurm/sweep.sh": check_sweep,
    "source": check_first_file,
    "cp": check_first_file,
    "docker": check_docker,
    "git": needs_nothing,
    "cd": needs_nothing,
    "tail": needs_nothing,
    "enroot": needs_nothing,
    "hf": needs_nothing,
    "vllm": needs_nothing,
    "pre-commit": needs_nothing,
}
