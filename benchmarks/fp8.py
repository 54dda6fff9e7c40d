"""What FP8 in the frozen passes would do to the target, beside the effect that is distilled.

    python -m benchmarks.fp8 [CONF] [--rows 24] [--tokens 192] [key=value ...]

Inputs and weights of the linears of all layers are rounded to e4m3, as Transformer Engine's recipes scale them;
embedding, norms, attention and output matrix stay in bf16, and products are computed in fp32 from the rounded values.
The model is that of transformers. For responses that the base samples, each recipe's target is compared with that of
bf16, in total variation; the effect is the total variation of the target from the base, both in bf16. A recipe whose
error is larger than the effect distils noise, and is warned of.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measure import machine
from benchmarks.tables import table
from nemo_popsd.config.loading import load_config
from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.config.sections import data_settings
from nemo_popsd.data.contexts import Borrowed
from nemo_popsd.data.dataset import PromptRow, build_dataset
from nemo_popsd.data.models import model_path
from nemo_popsd.data.tokenizer import load_tokenizer
from nemo_popsd.distillation.definition import Branches, target_from_logits
from nemo_popsd.distillation.target_families import build_target
from nemo_popsd.parallel.vocabulary import VocabShard

logger = logging.getLogger("benchmarks.fp8")

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""
BLOCK = 128
HISTORY = 16
"""Calls whose largest values scale the next one under delayed scaling; Transformer Engine's default is 1,024."""
HEAD = [
    "linears",
    "base's error, TV",
    "target's error, TV",
    "target from base, TV",
    "error by effect",
    "tokens where larger",
]


def rounded(x: Tensor, largest: Tensor) -> Tensor:
    """`x` rounded to e4m3 with the scale at which `largest`, which broadcasts to its shape, is 448; fp32."""
    scale = LARGEST / torch.where(largest > 0, largest, LARGEST).float()
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() / scale


def per_tensor(x: Tensor) -> Tensor:
    """Current scaling: by the largest value of the tensor itself."""
    return rounded(x, x.abs().max())


def per_block(x: Tensor, rows: int) -> Tensor:
    """Scaled by blocks of `rows` × 128 of [..., r, k] by powers of two, as blockwise scaling does: 1 for inputs, 128
    for weights.
    """
    flat = x.reshape(-1, x.shape[-1])
    height, width = flat.shape
    padded = functional.pad(flat.float(), (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    power = LARGEST * torch.exp2(torch.ceil(torch.log2(torch.where(largest > 0, largest, LARGEST) / LARGEST)))
    return rounded(blocks, power).view_as(padded)[:height, :width].reshape(x.shape)


@dataclass
class Delayed:
    """Delayed scaling of one tensor: by the largest value of the calls before it."""

    history: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` rounded; larger values than any before saturate."""
        largest = x.abs().max()
        scale = torch.stack(self.history).max() if self.history else largest
        self.history = [*self.history, largest][-HISTORY:]
        return rounded(x, scale)


Rounding = Callable[[Tensor], Tensor]
RECIPES: dict[str, Callable[[], tuple[Rounding, Rounding]]] = {
    "FP8, delayed": lambda: (Delayed(), per_tensor),
    "FP8, current": lambda: (per_tensor, per_tensor),
    "FP8, blockwise": lambda: (lambda x: per_block(x, 1), lambda weight: per_block(weight, BLOCK)),
}
"""By name: the rounding of a linear's inputs and of its weight, which does not change."""


@contextmanager
def quantised(layers: nn.Module, recipe: Callable[[], tuple[Rounding, Rounding]]) -> Iterator[None]:
    """Rounds inputs and weights of all linears below `layers` within the context."""

    def forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        inputs, weights = recipe()
        weight = weights(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.float()
        return lambda x: functional.linear(inputs(x), weight, bias).to(x.dtype)

    changed = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    assert changed, "the layers have no linears"
    for module in changed:
        module.forward = forward_of(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of absolute differences of probabilities, per token: [N, v], [N, v] -> [N]."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


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


def distributions(
    model: Any, config: PopsdConfig, rows: list[PromptRow], responses: list[list[int]]
) -> tuple[Tensor, Tensor]:
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


def compared(name: str, measured: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[list[str], float]:
    """The row of `name`, and the target's error divided by the effect."""
    (base, target), (true_base, true_target) = measured, expected
    error, effect = total_variation(target, true_target), total_variation(true_target, true_base)
    ratio = float(error.mean() / effect.mean())
    if ratio > 1:
        logger.warning("%s: the target's error is %.1f times what is distilled; do not compute it so", name, ratio)
    numbers = total_variation(base, true_base).mean(), error.mean(), effect.mean()
    cells = [f"{float(number):.4f}" for number in numbers]
    return [name, *cells, f"{ratio:.2f}", f"{float((error > effect).float().mean()):.0%}"], ratio


def main() -> None:
    """Runs the command."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="conf/tiny.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=192, help="of a response, at most")
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
    table_rows = [compared("fp32", in_fp32, expected)[0]]
    for name, recipe in RECIPES.items():
        with quantised(model.model.layers, recipe):
            table_rows.append(compared(name, distributions(model, config, rows, responses), expected)[0])
    print(f"{config.student.source}, {len(rows)} rows, {len(expected[0]):,} response tokens; {machine()}\n")
    print(table(HEAD, table_rows))


if __name__ == "__main__":
    main()
