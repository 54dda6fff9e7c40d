"""`popsd convert hf-to-nemo SRC OUT` and `popsd convert nemo-to-hf SRC OUT`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nemo_popsd.cli.arguments import Subparsers, example, number
from nemo_popsd.cli.launch import run_command
from nemo_popsd.config.paths import path_argument

_GIB = 1 << 30


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a Hugging Face directory to a NeMo checkpoint, or back",
        description="Convert a model between the two formats, tensor by tensor. One process with memory for one shard "
        "is sufficient. Under torchrun, --verify splits Megatron's model over the ranks by tensor parallelism.",
        epilog=example(
            "popsd convert hf-to-nemo /models/Qwen3-8B /models/Qwen3-8B-nemo --verify",
            "popsd convert nemo-to-hf runs/tiny/checkpoints/final models/tiny",
        ),
    )
    directions = parser.add_subparsers(title="directions", dest="direction", required=True, metavar="DIRECTION")
    to_nemo = directions.add_parser(
        "hf-to-nemo",
        help="write a Hugging Face directory as a NeMo checkpoint",
        epilog=example("popsd convert hf-to-nemo /models/Qwen3-8B /models/Qwen3-8B-nemo --verify"),
    )
    to_nemo.add_argument(
        "source", metavar="SRC", type=path_argument, help="directory with config.json and *.safetensors"
    )
    to_nemo.add_argument(
        "output", metavar="OUT", type=path_argument, help="directory to write, or a file name ending in .nemo"
    )
    to_hf = directions.add_parser(
        "nemo-to-hf",
        help="write a NeMo checkpoint as a Hugging Face directory",
        epilog=example("popsd convert nemo-to-hf runs/tiny/checkpoints/final models/tiny"),
    )
    to_hf.add_argument("source", metavar="SRC", type=path_argument, help="NeMo checkpoint: a directory or a .nemo file")
    to_hf.add_argument("output", metavar="OUT", type=path_argument, help="directory to write")
    to_hf.add_argument(
        "--shard-size",
        type=number(float, 1e-6, 1e6),
        default=4.0,
        metavar="GIB",
        help="size at which a new weight file starts; default: 4",
    )
    for direction in (to_nemo, to_hf):
        direction.add_argument(
            "--precision", choices=("bf16", "fp32"), help="precision of OUT; default: the precision of SRC"
        )
        direction.add_argument("--verify", action="store_true", help="compare every tensor, and logits on sample text")
        direction.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="accept auto_map in config.json; --verify then runs the Python files in SRC",
        )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check both paths, then convert."""
    from nemo_popsd.config.consistency import check_checkpoint, check_model_directory, check_new_output

    if args.direction == "hf-to-nemo":
        check_model_directory(args.source, setting="SRC")
    else:
        check_checkpoint(args.source, setting="SRC")
    check_new_output(args.output, setting="OUT")
    options: dict[str, object] = {
        "precision": args.precision,
        "verifies": args.verify,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.direction == "hf-to-nemo":
        run_command(_load_hf_to_nemo, args.source, args.output, **options)
    else:
        shard_bytes = max(1, int(args.shard_size * _GIB))
        run_command(_load_nemo_to_hf, args.source, args.output, shard_bytes=shard_bytes, **options)


def _load_hf_to_nemo() -> Callable[..., None]:
    from nemo_popsd.commands.conversion import hf_to_nemo

    return hf_to_nemo


def _load_nemo_to_hf() -> Callable[..., None]:
    from nemo_popsd.commands.conversion import nemo_to_hf

    return nemo_to_hf
