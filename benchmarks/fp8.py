"""Compares the error of the target by FP8 in the frozen passes with the effect that is distilled, for every recipe.

    python -m benchmarks.fp8 [CONF] [--rows 24] [--tokens 192] [key=value ...]

Inputs and weights of the linears of all layers are rounded to e4m3 with the scales of Transformer Engine's recipes;
embedding, norms, attention and output matrix stay in bf16. The model is that of transformers; `popsd diagnose --fp8`
measures the same on the run's own model, in any layout. For responses that the base samples, each recipe's target is
compared with that of bf16, in total variation; the effect is the total variation of the target from the base, both in
bf16. A recipe whose error is larger than the effect distils noise, and causes a warning.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import machine
from benchmarks.tables import table
from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.data.dataset import PromptRow, build_dataset
from nemo_popsd.data.models import model_path
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.diagnosis.fp8 import Distributions, TargetError, error_sums
from nemo_popsd.diagnosis.fp8_rounding import emulated
from nemo_popsd.distillation.definition import Branches, target_from_logits
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.parallel.vocabulary import VocabShard

logger = logging.getLogger("benchmarks.fp8")

RECIPES = ("delayed", "tensorwise", "blockwise")
HEAD = [
    "linears",
    "base's error, TV",
    "target's error, TV",
    "target from base, TV",
    "error by effect",
    "tokens where larger",
]


@torch.no_grad()
def response_logits(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Logits [R, v] in fp32 that predict each token of `response` after `prompt`."""
    ids = torch.tensor([prompt + response], device=model.device)
    return model(ids).logits[0, len(prompt) - 1 : -1].float()  # type: ignore[no-any-return]


@torch.no_grad()
def _sampled(model: Any, prompt: list[int], tokens: int, stop: int | None) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(ids, max_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=stop, pad_token_id=0)
    return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def distributions(model: Any, config: PopsdConfig, rows: list[PromptRow], responses: list[list[int]]) -> Distributions:
    """Log-probabilities of the base and of the target at all response tokens: [N, v] each."""
    target = build_target(config.distillation.target)
    bases, targets = [], []
    for row, response in zip(rows, responses, strict=True):
        contexts = row.contexts
        prompts = contexts.student, contexts.privileged, contexts.reference
        base, privileged, reference = (response_logits(model, prompt, response) for prompt in prompts)
        shard = VocabShard(base.shape[1], base.shape[1])
        logits = Branches(base, base=base, privileged=privileged, reference=reference)
        bases.append(torch.log_softmax(base, -1))
        targets.append(target_from_logits(logits, target=target, shard=shard))
    return torch.cat(bases), torch.cat(targets)


def _cells(name: str, measured: Distributions, expected: Distributions) -> list[str]:
    """The row of `name`; warns if the error is larger than the effect."""
    found = TargetError.of(name, error_sums(measured, expected).tolist())
    if found.ratio > 1:
        logger.warning("%s", found.sentence())
    numbers = [f"{number:.4f}" for number in (found.base_error, found.error, found.effect)]
    return [name, *numbers, f"{found.ratio:.2f}", f"{found.larger:.0%}"]


def main() -> None:
    """Runs the command."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="conf/tiny.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=192, help="maximum number of tokens per response")
    options = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    torch.manual_seed(0)
    config = load_config(options.config, options.overrides)
    directory = model_path(config.student.source)
    tokenizer = load_tokenizer(directory)
    borrowed = Borrowed(config.distillation.target.borrowed)
    dataset, _ = build_dataset(data_settings(config), config.data.train, tokenizer, borrowed)
    rows = [dataset[index] for index in range(min(options.rows, len(dataset)))]
    place = "cuda" if torch.cuda.is_available() else "cpu"
    exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(place).eval()
    responses = [_sampled(exact, row.contexts.student, options.tokens, tokenizer.eos_token_id) for row in rows]
    in_fp32 = distributions(exact, config, rows, responses)
    model = exact.to(torch.bfloat16)
    expected = distributions(model, config, rows, responses)
    table_rows = [_cells("fp32", in_fp32, expected)]
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    for recipe in RECIPES:
        with emulated(linears, recipe):
            measured = distributions(model, config, rows, responses)
        table_rows.append(_cells(f"FP8, {recipe}", measured, expected))
    print(f"{config.student.source}, {len(rows)} rows, {len(expected[0]):,} response tokens; {machine()}\n")
    print(table(HEAD, table_rows))


if __name__ == "__main__":
    main()
