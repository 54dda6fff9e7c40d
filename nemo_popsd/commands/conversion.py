"""The command `convert`, after the paths have been checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from nemo_popsd.checkpoint.conversion import huggingface_to_nemo, to_huggingface
from nemo_popsd.checkpoint.huggingface import HuggingFaceModel
from nemo_popsd.checkpoint.source import open_source
from nemo_popsd.checkpoint.verification import TOLERANCE, verify
from nemo_popsd.commands.cards import card_of, run_of
from nemo_popsd.errors import UserError
from nemo_popsd.observability.rank import is_rank_zero
from nemo_popsd.parallel.config import ParallelConfig
from nemo_popsd.parallel.distributed import initialize, shutdown, world_size


def hf_to_nemo(source: str, output: str, *, precision: str | None, verifies: bool, trust_remote_code: bool) -> None:
    """Convert a Hugging Face directory into a NeMo checkpoint. Rank 0 converts, all ranks verify.

    Args:
        source: Hugging Face directory.
        output: directory, or a file name ending in `.nemo`.
        precision: precision of the checkpoint; None keeps that of the files.
        verifies: compare source and output afterwards.
        trust_remote_code: run Python files in `source` if transformers needs them.
    """
    initialize(ParallelConfig(tensor=world_size()), seed=0)
    model = HuggingFaceModel(source, setting="SRC", trust_remote_code=trust_remote_code)
    precision = precision or model.precision()
    with _bar("converting", len(model.tensor_map().tensors)) as step:
        huggingface_to_nemo(model, Path(output), precision, written=step)
    _print(f"NeMo checkpoint: {output} ({len(model.tensor_names)} tensors, {precision})")
    if verifies:
        _verify(model, output, precision, trust_remote_code, written=Path(output))
    shutdown()


def nemo_to_hf(
    source: str,
    output: str,
    *,
    precision: str | None,
    shard_bytes: int,
    verifies: bool,
    trust_remote_code: bool,
) -> None:
    """Convert a NeMo checkpoint into a Hugging Face directory with merged adapters and the card of `popsd export`.

    Rank 0 converts, all ranks verify.

    Args:
        source: directory or `.nemo` file.
        output: directory to write.
        precision: precision of the files; None keeps that of the checkpoint.
        verifies: compare source and output afterwards.
        shard_bytes: size at which a new file starts.
        trust_remote_code: run Python files in `source` if transformers needs them.
    """
    initialize(ParallelConfig(tensor=world_size()), seed=0)
    opened = open_source(source, trust_remote_code=trust_remote_code)
    precision = precision or opened.precision()
    card = None
    if opened.checkpoint is not None and is_rank_zero():
        card = card_of(opened.checkpoint, Path(output).absolute(), run=run_of(source), adapter=False)
    with _bar("converting", len(opened.architecture.tensor_names)) as step:
        to_huggingface(opened, Path(output), precision, shard_bytes=shard_bytes, card=card, written=step)
    _print(f"Hugging Face checkpoint: {output} ({len(opened.architecture.tensor_names)} tensors, {precision})")
    if verifies:
        model = HuggingFaceModel(output, setting="OUT", trust_remote_code=trust_remote_code)
        _verify(model, source, precision, trust_remote_code, written=Path(output))
    shutdown()


def _verify(model: HuggingFaceModel, nemo: str, precision: str, trust_remote_code: bool, *, written: Path) -> None:
    """Compare source and output, and rename the output if they differ."""
    try:
        with _bar("comparing", len(model.tensor_names)) as step:
            result = verify(model, open_source(nemo), precision, trust_remote_code=trust_remote_code, compared=step)
    except UserError as error:
        names = (written.with_name(f"{written.name}.refused{suffix}") for suffix in ("", *range(2, 1000)))
        refused = next(path for path in names if not os.path.lexists(path))
        if dist.is_initialized():
            dist.barrier()  # all ranks choose the name before the file exists
        if is_rank_zero():
            written.rename(refused)
        fix = f"{error.fix}; the output was renamed to {refused}"
        raise UserError(error.what, got=error.got, need=error.need, fix=fix) from error
    sample = "text" if result.text else "random tokens (no tokenizer)"
    _print(
        f"verified: {result.tensors} tensors equal bit for bit; logits of {result.tokens} tokens of {sample} differ by "
        f"at most {result.difference:.1e} of the largest (limit {TOLERANCE[precision]:g}); same most likely token at "
        f"{100 * result.same_choice:.1f} % of the positions"
    )


@contextmanager
def _bar(what: str, tensors: int) -> Iterator[Callable[[], object]]:
    """Show a progress bar over `tensors` on rank 0; yields the function to call after each tensor."""
    with tqdm(total=tensors, desc=what, unit=" tensors", disable=not is_rank_zero()) as bar:
        yield bar.update


def _print(text: str) -> None:
    if is_rank_zero():
        print(text, flush=True)
