"""`popsd rollouts show RUN [--step N] [--row ID] [--json]`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_popsd.cli.arguments import Subparsers, example, number
from nemo_popsd.config.paths import path_argument

if TYPE_CHECKING:
    from nemo_popsd.rollout.storage import StoredRollout


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to `subparsers`."""
    parser = subparsers.add_parser(
        "rollouts",
        help="show the rollouts that a run was trained on",
        description="Show the rollouts that a run has saved (rollout.save).",
        epilog=example("popsd rollouts show runs/tiny --step 2"),
    )
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="print steps, or the rollouts of a step",
        description="Print one line per step; with --step or --row, the text of each prompt and response; with --json, "
        "token ids and log-probabilities.",
        epilog=example("popsd rollouts show runs/tiny", "popsd rollouts show runs/tiny --step 2"),
    )
    show.add_argument("output", metavar="RUN", type=path_argument, help="output directory of a run")
    show.add_argument(
        "--step",
        metavar="N",
        type=number(int, 0, 10**12),
        default=None,
        help="one step; default: all steps",
    )
    show.add_argument("--row", metavar="ID", default=None, help="rollouts of the row with this id")
    show.add_argument("--json", action="store_true", help="print each rollout as one JSON object")
    show.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print a summary of steps, or rollouts as text or as JSON lines."""
    from nemo_popsd.errors import UserError
    from nemo_popsd.rollout.storage import RolloutStore

    store = RolloutStore(args.output)
    steps = store.steps()
    if not steps or (args.step is not None and args.step not in steps):
        raise UserError(
            f"rollouts of {args.output}",
            got=f"no step {args.step}, but {_ranges(steps)}" if steps else f"nothing in {store.folder}",
            need="the output of a run with rollout.save=true",
            fix="pass another RUN or --step",
        )
    if args.step is None and args.row is None and not args.json:
        for step in steps:
            _print_summary(step, list(store.read(step)))
        return
    decode = None if args.json else _decoder(Path(args.output))
    printed = False
    for step in steps if args.step is None else [args.step]:
        rows, number_of = list(store.read(step)), Counter[str]()
        several = len({row.row_id for row in rows}) < len(rows)
        for row in rows:
            number_of[row.row_id] += 1
            if args.row in (None, row.row_id):
                printed = True
                name = f"{row.row_id}, response {number_of[row.row_id]}" if several else row.row_id
                _print_rollout(step, name, row, decode)
    if not printed:
        raise UserError(
            f"rollouts of {args.output}", got=f"no row {args.row!r}", need="the id of a row", fix="pass another --row"
        )


def _print_summary(step: int, rows: list[StoredRollout]) -> None:
    lengths = [len(row.rollout.response) for row in rows]
    truncated = sum(row.rollout.truncated for row in rows)
    version = rows[0].rollout.weights_version if rows else "-"
    unfinished = sum(row.rollout.unfinished for row in rows)
    prompts = len({row.row_id for row in rows})
    of = f" of {prompts} prompts" if prompts < len(rows) else ""
    print(
        f"step {step}: {len(rows)} rollouts{of} by weights {version}, {sum(lengths)} tokens, "
        f"{truncated} truncated at the limit" + (f", {unfinished} left unfinished" if unfinished else "")
    )


def _print_rollout(step: int, name: str, row: StoredRollout, decode: Callable[[list[int]], str] | None) -> None:
    if decode is None:
        line = {
            "step": step,
            "id": row.row_id,
            "weights_version": row.rollout.weights_version,
            "finish_reason": row.finish_reason,
            "seed": row.seed,
            "prompt": row.prompt,
            "response": row.rollout.response,
            "log_probs": row.rollout.log_probs,
        } | ({"segments": row.rollout.segments} if row.rollout.segments else {})
        print(json.dumps(line))
        return
    tokens = len(row.rollout.response)
    mean = sum(row.rollout.log_probs) / max(tokens, 1)
    print(f"--- step {step}, row {name}: {tokens} tokens, {row.finish_reason}, mean log-probability {mean:.3f}")
    print(decode(row.prompt))
    print(f">>> {decode(row.rollout.response)}")


def _decoder(run: Path) -> Callable[[list[int]], str] | None:
    """Return a decoder with the tokenizer of the run's newest checkpoint, or of its source if there is none."""
    from nemo_popsd.config.loading import load_config
    from nemo_popsd.data.models import model_path
    from nemo_popsd.data.tokenizer import load_tokenizer
    from nemo_popsd.errors import UserError

    configs = sorted((run / "checkpoints").glob("*/huggingface/tokenizer_config.json"))
    try:
        if configs:
            return load_tokenizer(configs[-1].parent, setting="RUN").decode
        return load_tokenizer(model_path(load_config(run / "config.yaml").student.source)).decode
    except UserError as error:
        fix = f"{error.fix}, or print token ids with --json"
        raise UserError(error.what, got=error.got, need=error.need, fix=fix) from error


def _ranges(steps: list[int]) -> str:
    return f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
