"""NeMo-Run: training as a task, and executors for this machine and for Slurm. Needs the package `nemo_run`.

    import nemo_run as run
    from nemo_popsd.launch.nemo_run import local_executor, train_recipe

    recipe = train_recipe("conf/tiny.yaml", output="/scratch/runs/tiny", overrides=["training.steps=10"])
    run.run(recipe, executor=local_executor(ranks=2))

Both executors start the ranks with torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import nemo_run as run

from nemo_popsd.config.loading import load_config
from nemo_popsd.errors import UserError

_TORCHRUN = "torchrun"


def train(configuration: str, output: str, overrides: Sequence[str]) -> None:
    """Run `popsd train` in each rank of a task, and end the process with the exit status of the command.

    Args:
        configuration: YAML file.
        output: directory of the run.
        overrides: ``key=value``.
    """
    from nemo_popsd.cli.main import main

    sys.exit(main(["train", configuration, *overrides, f"output={output}"]))


def train_recipe(configuration: str, *, output: str, overrides: Sequence[str] = ()) -> run.Partial:
    """Return a training run as a NeMo-Run task. A repeated task resumes the run in `output`, like a repeated command.

    The job's environment also needs `nemo_run`. The caller may extend the list `recipe.overrides`.

    Args:
        configuration: YAML file. Its path and the paths in it are those inside the job. If the file exists here, the
            configuration is checked.
        output: absolute path of the run, because each submission of a NeMo-Run task has a new working directory.
        overrides: ``key=value``, as on the command line.

    Raises:
        UserError: `output` is not absolute, or the configuration is refused.
    """
    if not os.path.isabs(output):
        raise UserError(
            "train_recipe",
            got=f"output={output!r}",
            need="an absolute path, on storage that the job can access",
            fix="set output",
        )
    if os.path.isfile(configuration):
        load_config(configuration, [*overrides, f"output={output}"])
    return run.Partial(train, configuration=configuration, output=output, overrides=list(overrides))


def popsd_script(*arguments: str) -> run.Script:
    """Return any command as a NeMo-Run task, such as ``popsd_script("report", "/runs/a", "/runs/b")``.

    Args:
        arguments: arguments of `popsd`, starting with the name of the command.
    """
    return run.Script(path="nemo_popsd", m=True, entrypoint="python", args=list(arguments))


def local_executor(*, ranks: int = 1, **options: Any) -> run.LocalExecutor:
    """Start the ranks on this machine, in the current directory, with the `torchrun` on the PATH.

    Args:
        ranks: number of processes, one per GPU.
        options: further fields of `run.LocalExecutor`, such as ``env_vars``.
    """
    return run.LocalExecutor(ntasks_per_node=ranks, launcher=_TORCHRUN, **options)


def slurm_executor(
    *,
    account: str,
    partition: str,
    time: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    container_image: str | None = None,
    container_mounts: Sequence[str] = (),
    retries: int = 0,
    **options: Any,
) -> run.SlurmExecutor:
    """Submit a job that starts one torchrun per node, with one rank per GPU.

    Args:
        account: `sbatch --account`.
        partition: `sbatch --partition`.
        time: time limit of the job, ``HH:MM:SS``.
        nodes: number of nodes, which the job uses exclusively.
        gpus_per_node: number of GPUs, and of ranks, per node.
        container_image: image for pyxis, such as ``/shared/me/nemo_popsd.sqsh``; None runs without a container.
        container_mounts: ``/path`` or ``/path:/path/in/container`` for models, data and output.
        retries: maximum number of requeues after a failure. The run then resumes from its newest checkpoint.
        options: further fields of `run.SlurmExecutor`, such as ``tunnel``, ``packager``, ``env_vars``.
    """
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        time=time,
        nodes=nodes,
        ntasks_per_node=gpus_per_node,
        gpus_per_node=gpus_per_node,
        exclusive=True,
        container_image=container_image,
        container_mounts=[mount if ":" in mount else f"{mount}:{mount}" for mount in container_mounts],
        retries=retries,
        launcher=_TORCHRUN,
        **options,
    )
