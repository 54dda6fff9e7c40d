"""Time, memory, collectives and errors of the distillation loss, compared with other implementations.

    python -m benchmarks.loss            # the tables of RESULTS.md: about twelve minutes on two idle CPU cores
    python -m benchmarks.loss --quick    # small sizes, one minute, only prints

On a GPU: `python -m benchmarks.gpu`. Memory is in units of one fp32 tensor [T, V/tp].
Forms are measured alternately; times are the minimum of the repetitions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.forms import Outcome, PackageLoss, Problem, Products, forms, make_problem
from benchmarks.measure import interleaved, machine, peak_bytes
from benchmarks.tables import table
from nemo_popsd.distillation.chunks import LARGEST_CHUNK

RESULTS = Path(__file__).with_name("RESULTS.md")
PRODUCTS = "its products alone"


def _ratio(value: float, of: float) -> str:
    return f"{value / of:.2f}"


def times(problem: Problem, names: list[str], repetitions: int) -> list[list[str]]:
    """Rows: form, seconds, ratio to the products alone, ratio to the dense form if `names` contains it."""
    every = forms(problem)
    actions: dict[str, Callable[[], Any]] = {PRODUCTS: Products(problem, LARGEST_CHUNK)}
    actions |= {name: every[name] for name in names}
    actions["nemo_popsd"]()  # compiles
    taken = interleaved(actions, repetitions)
    dense = next((seconds for name, seconds in taken.items() if name.startswith("dense")), None)
    return [
        [name, f"{seconds:.2f}", _ratio(seconds, taken[PRODUCTS]), _ratio(seconds, dense) if dense else "not run"]
        for name, seconds in taken.items()
    ]


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def _errors(got: Outcome, want: Outcome) -> list[str]:
    pairs = ((got.total, want.total), (got.dh, want.dh), (got.dw, want.dw))
    return [f"{_relative(a, b):.1e}" for a, b in pairs if a is not None and b is not None]


def errors(group: dist.ProcessGroup | None) -> list[list[str]]:
    """Rows: form, precision, relative errors of value, dh and dW compared with the dense form in float64."""
    exact = make_problem(256, 3000 if group is None else 1500, 256, dtype=torch.float64, group=group)
    rows = []
    for dtype in (torch.float64, torch.float32):
        rounded = exact.to(dtype)
        want = forms(rounded.to(torch.float64))["dense, four logits, autograd"]()
        every = forms(rounded)
        every["nemo_popsd, fused"] = PackageLoss(rounded, fused="always", chunk_tokens=100)
        for name, form in every.items():
            if name != "nemo_popsd, fused" or dtype == torch.float32:
                rows.append([name, str(dtype).removeprefix("torch."), *_errors(form(), want)])
    return rows


def _total_variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p - q).abs().sum(-1) / 2


def bf16_targets() -> list[list[str]]:
    """Rows: computation of the target from bf16 states and matrix, mean and maximum of its total-variation error."""
    problem = make_problem(256, 19000, 512, dtype=torch.bfloat16)
    target = problem.target
    exact = problem.to(torch.float64)
    capped = lambda difference: target.cap * torch.tanh((difference - difference.mean(-1, keepdim=True)) / target.cap)  # noqa: E731
    z_0, z_T, z_ref = (x @ exact.weight.t() for x in (exact.base, exact.privileged, exact.reference))
    want = torch.softmax(z_0 + capped(z_T - z_ref), -1)
    branches = (problem.base, problem.privileged, problem.reference)
    pair = problem.vectors
    assert pair.anchor is not None
    assert pair.shift is not None
    z_0, z_T, z_ref = ((x @ problem.weight.t()).double() for x in branches)
    from_logits = torch.softmax(z_0 + capped(z_T - z_ref), -1)
    z_0, z_d = ((x.bfloat16() @ problem.weight.t()).double() for x in (pair.anchor, pair.shift))
    rounded = torch.softmax(z_0 + capped(z_d), -1)
    z_0, z_d = (x.bfloat16().double() @ exact.weight.t() for x in (pair.anchor, pair.shift))
    kept = torch.softmax(z_0 + capped(z_d), -1)
    named = {
        "three bf16 logits (four with the student's)": from_logits,
        "two vectors, products rounded to bf16 (nemo_popsd on a CPU)": rounded,
        "two vectors, products kept in fp32 (nemo_popsd on a GPU)": kept,
    }
    found = {name: _total_variation(got, want) for name, got in named.items()}
    return [[name, f"{error.mean():.1e}", f"{error.max():.1e}"] for name, error in found.items()]


def memory(problem: Problem, names: list[str]) -> list[list[str]]:
    """Rows: form, peak memory of forward and backward beyond that of the problem, in tensors [T, V/tp]."""
    unit = len(problem.student) * problem.weight.shape[0] * 4
    every = forms(problem)
    every["nemo_popsd"]()  # compiles
    return [[name, _ratio(peak_bytes(every[name]), unit)] for name in names]


def _count_collectives(form: Callable[[], Outcome]) -> int:
    count = 0
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return real[name](*arguments, **options)

        return counted

    for name in real:
        setattr(dist, name, counting(name))
    try:
        form()
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return count


def _one_rank(rank: int, folder: str, sizes: tuple[int, int, int], repetitions: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    problem = make_problem(*sizes, group=dist.group.WORLD)
    every = forms(problem)
    collectives = {name: str(_count_collectives(form)) for name, form in every.items()}
    rows = [[*row, collectives.get(row[0], "0")] for row in times(problem, list(every), repetitions)]
    found = errors(dist.group.WORLD)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps([rows, found]))
    dist.destroy_process_group()


def two_shards(sizes: tuple[int, int, int], repetitions: int) -> tuple[list[list[str]], list[list[str]]]:
    """Times with collectives, and errors, of two processes with one thread each; `sizes` are a shard's."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_rank, (folder, sizes, repetitions), nprocs=2)
        rows, found = json.loads(Path(folder, "found.json").read_text())
    return rows, found


TIME_HEADER = ["form", "s", "÷ products", "÷ dense"]
ERROR_HEADER = ["form", "precision", "value", "dh", "dW"]
MAIN = ["nemo_popsd", "nemo_popsd, not fused", "dense, four logits, autograd"]
EVERY = [*MAIN, "chunks under autograd", "chunks, recomputed in backward", "top-64 (an approximation)"]


def on_cpu(quick: bool) -> str:
    """All tables."""
    parts: list[str] = []

    def section(title: str, *body: str) -> None:
        parts.extend([f"## {title}", *body])
        print("\n\n".join([parts[-len(body) - 1], *body]), flush=True)

    def timed(sizes: tuple[int, int, int], names: list[str], repetitions: int, **settings: Any) -> str:
        return table(TIME_HEADER, times(make_problem(*sizes, **settings), names, repetitions))

    big, small = ((256, 9500, 512), (256, 9500, 256)) if quick else ((2048, 19000, 2048), (1024, 19000, 1024))
    repetitions = 2 if quick else 5
    section(
        f"Time of head, target, divergence and backward: T={big[0]}, V={big[1]}, H={big[2]}, fp32, one shard",
        "With the tanh (three vectors), JSD, dW wanted:",
        timed(big, MAIN, repetitions),
        "With the tanh, JSD, LoRA (no dW):",
        timed(big, MAIN, 1 if quick else repetitions, trained=False),
        "Without the tanh (two vectors), JSD, dW wanted:",
        timed(big, MAIN, repetitions, cap=None),
    )
    section(
        f"All forms: T={small[0]}, V={small[1]}, H={small[2]}",
        "JSD:",
        timed(small, EVERY, repetitions),
        "Forward KL:",
        timed(small, MAIN, repetitions, kind="forward_kl"),
    )
    sizes = (8192, 1188, 128) if quick else (8192, 4750, 512)
    section(
        f"Memory: T={sizes[0]}, V={sizes[1]}, H={sizes[2]}",
        "Peak of forward and backward beyond inputs and the kept gradient of the parameters, in fp32 tensors [T, V].",
        table(["form", "tensors [T, V]"], memory(make_problem(*sizes), EVERY)),
    )
    if not quick:
        full = (8192, 19000, 2048)
        section(
            f"nemo_popsd at full size: T={full[0]}, V={full[1]}, H={full[2]}",
            table(["form", "tensors [T, V]"], memory(make_problem(*full), ["nemo_popsd"])),
        )
    sizes = (256, 4750, 256) if quick else (1024, 9500, 1024)
    rows, sharded_errors = two_shards(sizes, repetitions)
    section(
        f"Two shards (TP=2, gloo, one thread each): T={sizes[0]}, V/tp={sizes[1]}, H={sizes[2]}",
        table([*TIME_HEADER, "collectives"], rows),
    )
    section("Errors against float64, one shard (T=256, V=3000, H=256)", table(ERROR_HEADER, errors(None)))
    section("Errors against float64, two shards", table(ERROR_HEADER, sharded_errors))
    section(
        "Total-variation error of the target from bf16 states (T=256, V=19000, H=512)",
        table(["target from", "mean", "worst"], bf16_targets()),
    )
    return "\n\n".join(parts)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; prints only")
    options = parser.parse_args()
    print(machine(), flush=True)
    tables = on_cpu(options.quick)
    if not options.quick:
        command = shlex.join(["python", "-m", "benchmarks.loss", *sys.argv[1:]])
        head = f"# Results of `{command}`\n\n{datetime.date.today():%d %B %Y}. {machine()}."
        RESULTS.write_text(f"{head}\n\n{tables}\n")


if __name__ == "__main__":
    main()
