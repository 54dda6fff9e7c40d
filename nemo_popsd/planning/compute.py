"""Floating-point operations of one GPU in one step, two per multiply-add. Formulas: docs/planning.md, "FLOPs".

Only matrix products and attention are counted, for the pipeline stage with the most work in training. This is the last
stage, which has the loss, unless another stage has enough additional layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from nemo_popsd.planning.packing import Packed
from nemo_popsd.planning.parameters import Stage, linears, padded_vocabulary, stages
from nemo_popsd.planning.recomputation import recomputed
from nemo_popsd.planning.workload import Case
from nemo_popsd.rollout.scheduler import reach_of


@dataclass(frozen=True)
class Flops:
    """Operations of one GPU."""

    linear: float
    """Operations of the linears of the layers, adapters included."""
    attention: float = 0.0
    """Operations of attention within a sequence: the full square, as flop counters count it."""
    cached: float = 0.0
    """Operations of attention from new tokens to the cache, and from pieces of a sequence to preceding tokens."""
    head: float = 0.0
    """Operations of products with the output matrix."""

    @property
    def counted(self) -> float:
        """Operations as a flop counter counts them."""
        return self.linear + self.attention + self.cached + self.head

    @property
    def needed(self) -> float:
        """Operations of a causal kernel, which computes half of the square."""
        return self.counted - self.attention / 2

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def __mul__(self, times: float) -> Flops:
        return Flops(*(getattr(self, item.name) * times for item in fields(self)))


def layer_weights(case: Case) -> tuple[float, float]:
    """Elements by which one token is multiplied in one layer on one rank: those of the model, those of the adapters."""
    layout, sizes, lora = case.layout, case.sizes, case.config.student.lora
    router = sizes.hidden * sizes.experts / (layout.tensor if layout.sequence else 1)
    model, adapters = router, 0.0
    for linear in linears(sizes):
        visits = sizes.experts_per_token if linear.expert else 1
        # Tokens of all e ranks of an expert group are routed to the experts of one rank: k each on average. Experts
        # that are not split have t times fewer tokens, because a mixture of experts uses sequence parallelism for t >
        # 1.
        model += linear.weights * visits / layout.tensor
        if case.lora and linear.name in lora.targets:
            adapters += linear.adapter(lora.rank) * visits / layout.tensor
    return model, adapters


def forward(case: Case, tokens: float, squares: float, *, adapters: bool, layers: int | None = None) -> Flops:
    """Operations of one forward pass of the layers of a rank.

    Args:
        case: the run.
        tokens: tokens of all sequences, padding included.
        squares: sum of the squares of their lengths, padding included.
        adapters: whether adapters are enabled.
        layers: layers of the rank's stage; by default those of the last stage.
    """
    layout, sizes = case.layout, case.sizes
    model, adapter = layer_weights(case)
    layers = layout.stage_layers(sizes.layers)[-1] if layers is None else layers
    linear = 2 * tokens / layout.context * layers * (model + (adapter if adapters else 0))
    attention = 4 * squares * sizes.query_width * layers / (layout.tensor * layout.context)
    return Flops(linear, attention)


def training(case: Case, tokens: float, squares: float, *, layers: int | None = None, first: bool = True) -> Flops:
    """Operations of forward, recomputation and backward of the student's layers.

    Arguments are those of `forward`; `first` says whether the layers include the first one of the model. The backward
    of a trained linear costs two forwards, that of a frozen linear under adapters one, that of attention 2.5.
    """
    once = forward(case, tokens, squares, adapters=case.lora, layers=layers)
    model, adapter = layer_weights(case)
    ratio = (model + 2 * adapter) / (model + adapter) if case.lora else 2.0
    linear = once.linear * (1 + ratio)
    attention = once.attention * 3.5
    again = recomputed(case, layers or case.layout.stage_layers(case.sizes.layers)[-1])
    linear, attention = linear + again.linear * once.linear, attention + again.attention * once.attention
    if case.lora and first and case.config.student.recompute != "full":
        # Nothing before the first linear is trained, so the gradient of its input is not computed.
        skipped = linears(case.sizes)[0].weights / case.layout.tensor
        linear -= 2 * tokens / case.layout.context * skipped
    return Flops(linear, attention)


def loss(case: Case, responses: float, diagnosed: float) -> Flops:
    """Operations of the loss and its gradients on `responses` tokens, and of the decomposition on `diagnosed` of them.

    Products with the output matrix per token: student, anchor, shift, gradient of the hidden state, and under full
    fine-tuning gradient of the matrix; for a diagnosed token also that of the teacher, and that of the second teacher
    if the target has no shift.
    """
    products = 1 + case.target.vectors + 1 + (0 if case.lora else 1)
    sampled = 1 if case.target.uses_shift else 2
    columns = case.sizes.vocab / case.layout.tensor
    return Flops(0.0, head=2 * case.sizes.hidden * columns * (products * responses + sampled * diagnosed))


def decoding(case: Case, rows: float, length: float, *, layers: int | None = None) -> Flops:
    """Operations of one decoding step: one token per row of the rank, attending to `length` cached positions."""
    layout, sizes = case.layout, case.sizes
    layers = layout.stage_layers(sizes.layers)[-1] if layers is None else layers
    linear = forward(case, rows * layout.context, 0, adapters=case.lora, layers=layers).linear
    cached = 4 * rows * length * sizes.query_width * layers / layout.tensor
    head = 2 * rows * sizes.hidden * padded_vocabulary(sizes, layout) / layout.tensor
    return Flops(linear, cached=cached, head=head)


@dataclass(frozen=True)
class StepFlops:
    """Operations of one GPU in one step, at the mean lengths."""

    rollout: Flops
    """Prefill and decoding."""
    frozen: Flops
    """All frozen branches."""
    training: Flops
    """Student and loss."""


def prefill(case: Case, *, layers: int | None = None) -> Flops:
    """Operations of the forward pass that fills the cache with the prompts of a rank, without their last tokens."""
    length = case.means.prompt - 1
    tokens = case.prefilled_rows * length * case.layout.context  # no sequence is split while decoding
    return forward(case, tokens, tokens * length, adapters=case.lora, layers=layers)


def attended(case: Case) -> float:
    """Positions to which a decoding step attends, on average over the steps of a response."""
    mean, capacity = case.means, case.limits.student
    begin, steps = int(mean.prompt), max(1, int(mean.response))
    sampled = range(begin, begin + steps, math.ceil(steps / 256))
    return sum(reach_of(position + 1, max(capacity, position + 1)) for position in sampled) / len(sampled)


def step(case: Case) -> StepFlops:
    """Operations of one step on the stage with the most work in training."""
    found = stages(case.sizes, case.layout)
    last = of_stage(case, found[-1])
    most = max(found, key=lambda stage: stage.layers)
    if most.layers == found[-1].layers:
        return last
    return max(last, of_stage(case, most), key=lambda flops: flops.training.needed)


def of_stage(case: Case, stage: Stage) -> StepFlops:
    """Operations of one step on a stage; the last stage has the output matrix and the loss."""
    rows, mean, layers = case.rows, case.means, stage.layers
    decoded = decoding(case, case.generated_rows, attended(case), layers=layers)
    if case.layout.virtual_pipeline > 1:
        batches, own = case.frozen_batches(mean), case.student_batches(mean)
        frozen = _padded(batches, lambda tokens, squares: forward(case, tokens, squares, adapters=False, layers=layers))
        trained = _padded(own, lambda *sums: training(case, *sums, layers=layers, first=stage.first)) * case.updates
    else:
        work = case.frozen_work(mean)
        tokens, squares = case.questions * work.tokens, case.questions * work.squares
        frozen = forward(case, tokens, squares, adapters=False, layers=layers)
        earlier = 4 * case.questions * work.earlier * case.sizes.query_width * layers / case.layout.tensor
        frozen += Flops(0.0, cached=earlier)
        tokens, squares = rows * mean.student, rows * mean.student**2
        trained = training(case, tokens, squares, layers=layers, first=stage.first)
    if stage.last:
        responses = case.owned_rows * mean.response
        trained += loss(case, responses, min(case.config.distillation.diagnosed_tokens, responses))
    else:
        decoded = replace(decoded, head=0.0)
    return StepFlops(prefill(case, layers=layers) + decoded * mean.response, frozen, trained)


def _padded(batches: Sequence[Packed], cost: Callable[[float, float], Flops]) -> Flops:
    """Operations of micro-batches including padding, which is large if all have the same shape."""
    return cost(sum(batch.tokens for batch in batches), sum(batch.squares for batch in batches))
