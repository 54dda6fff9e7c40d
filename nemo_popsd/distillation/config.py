"""Configuration of the target and of the divergence that the student minimises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.distillation.target_families import FAMILIES
from nemo_popsd.settings.bounds import Bounds, check_numbers
from nemo_popsd.settings.checks import one_of, refuse


@dataclass(kw_only=True)
class TargetConfig:
    """The target distribution: a family by name, and its parameters; see `nemo_popsd.distillation.target_families`."""

    family: str = "purified"
    """`purified` (arXiv 2607.02234), `opsd` (2601.18734), `beta_opsd` (2607.28582), `student_pmi` (PMI on the live
    student, an ablation), `reference_free` (a teacher that sees only the question, a baseline), `other_reference`
    (OPSD whose teacher sees another row's reference, OP²SD, 2608.09228) or `wrong_reference` (the contrast of OPSD's
    teacher with one that sees another row's reference). `data.privileged.view` determines the reference."""
    beta: Annotated[float, Bounds(1e-3, 1e6)] = 1.0
    """Strength of the anchor for `purified` and `student_pmi`; divides the PMI after the tanh."""
    cap: Annotated[float | None, Bounds(1e-3, 1e6)] = 10.0
    """Bound c of the soft cap c·tanh(Δ/c), for `purified` and `student_pmi`; null means no cap."""
    weight: Annotated[float, Bounds(0, 1)] = 0.5
    """Weight of the privileged teacher in `beta_opsd`."""
    alpha: Annotated[float, Bounds(1e-3, 1e3)] = 1.0
    """Strength of the contrast in `wrong_reference`."""
    temperature: Annotated[float, Bounds(1e-3, 1e3)] = 1.0
    """Softmax temperature of every distribution in the loss; independent of rollout sampling."""

    def __post_init__(self) -> None:
        one_of("distillation.target.family", self.family, tuple(FAMILIES))
        check_numbers(self, "distillation.target")

    @property
    def borrowed(self) -> str:
        """The context that holds another row's reference: "privileged", "reference", or "" for none."""
        return FAMILIES[self.family].borrowed


@dataclass(kw_only=True)
class DivergenceConfig:
    """The divergence between student and target."""

    kind: str = "jsd"
    """`jsd`, `forward_kl` (KL(target ‖ student)) or `reverse_kl` (KL(student ‖ target))."""
    weight: Annotated[float, Bounds(1e-6, 1 - 1e-6)] = 0.5
    """Weight of the target in the mixture of the JSD. The paper does not state it; 0.5 is official OPSD's."""
    clip: Annotated[float | None, Bounds(1e-6, 1e3)] = None
    """Largest contribution of one vocabulary entry to the divergence of a token (0.05 in official OPSD's later recipe).
    null: no clip. A clipped KL may become negative, because negative contributions are not clipped."""

    def __post_init__(self) -> None:
        one_of("distillation.divergence.kind", self.kind, ("jsd", "forward_kl", "reverse_kl"))
        check_numbers(self, "distillation.divergence")


@dataclass(kw_only=True)
class TokensConfig:
    """Which response tokens count in the loss, and with which weight. The weights of a token are multiplied.

    *Weights* (`markers` to `wrong`) are known before the forward pass. The loss is a weighted mean: it is divided by
    the sum of the weights, not by the number of tokens. With `loss_mean=sequence`, token weights apply to the mean over
    the tokens of a response, and response weights to the mean over responses. *Gates* (the bounds on probability and
    entropy) depend on the distributions at the token: a closed token counts in the mean, with loss 0.
    """

    markers: Annotated[float, Bounds(0, 1e3)] = 1.0
    """Weight of tokens that belong to an epistemic marker (`evaluation.markers`); 0 excludes them."""
    horizon: Annotated[int, Bounds(0, 10**7)] = 0
    """Number of tokens at the start of each response that have a loss; 0: all tokens."""
    half_life: Annotated[float, Bounds(1e-2, 1e7, or_zero=True)] = 0.0
    """Number of tokens after which the weight of a position is halved: 2^(-position/half_life); 0: no decay."""
    truncated: Annotated[float, Bounds(0, 1e3)] = 1.0
    """Weight of responses that were truncated at `rollout.max_response_tokens`."""
    right: Annotated[float, Bounds(0, 1e3)] = 1.0
    """Weight of responses whose final answer matches that of the row. A value other than 1, here or for `wrong`,
    requires rows with answers."""
    wrong: Annotated[float, Bounds(0, 1e3)] = 1.0
    """Weight of responses with a different answer or none."""
    max_student_probability: Annotated[float, Bounds(0, 1, above=True)] = 1.0
    """Gate: a token has a loss only if the student's most likely token has at most this probability (N-OPSD: 0.99)."""
    min_student_entropy: Annotated[float, Bounds(0, 100)] = 0.0
    """Gate: a token has a loss only if the student's entropy is at least this value, in nats."""
    max_student_entropy: Annotated[float | None, Bounds(0, 100)] = None
    """Gate: maximum entropy of the student, in nats; null: no maximum."""
    min_target_entropy: Annotated[float, Bounds(0, 100)] = 0.0
    """Gate: minimum entropy of the target, in nats."""
    max_target_entropy: Annotated[float | None, Bounds(0, 100)] = None
    """Gate: maximum entropy of the target, in nats; null: no maximum."""

    def __post_init__(self) -> None:
        check_numbers(self, "distillation.tokens")
        for name, low, high in (
            ("student", self.min_student_entropy, self.max_student_entropy),
            ("target", self.min_target_entropy, self.max_target_entropy),
        ):
            if high is not None and low > high:
                need = f"at least distillation.tokens.min_{name}_entropy={low}, otherwise no token has a loss"
                raise refuse(f"distillation.tokens.max_{name}_entropy", high, need)
        if self.right == self.wrong == 0:
            raise refuse("distillation.tokens.wrong", 0.0, "more than 0 if distillation.tokens.right is 0")

    @property
    def by_answer(self) -> bool:
        """Whether token weights depend on the answers of the rows."""
        return (self.right, self.wrong) != (1.0, 1.0)


@dataclass(kw_only=True)
class WeightsConfig:
    """The weights of a frozen branch."""

    weights: str = "frozen"
    """`frozen`: the initial weights (as in the paper and in OPSD). `live`: the student's weights before the step.
    `ema`: the exponential moving average of the student's weights. `snapshot`: a copy of the student's weights,
    refreshed every `every` steps. `ema` and `snapshot` need a second fp32 copy of the trained weights: of the adapters
    with LoRA, of all weights with full fine-tuning (in host memory with `student.frozen_copy=host`)."""
    decay: Annotated[float, Bounds(0, 1, below=True)] = 0.999
    """For `ema`: average = decay · average + (1 - decay) · weights."""
    every: Annotated[int, Bounds(1, 10**8)] = 1
    """For `ema` and `snapshot`: number of steps between two refreshes; a refresh follows a step."""


@dataclass(kw_only=True)
class DistillationConfig:
    """Target, divergence and mean of the loss, and the weights of the frozen branches."""

    target: TargetConfig = field(default_factory=TargetConfig)
    """The target distribution."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """The divergence."""
    teacher: WeightsConfig = field(default_factory=WeightsConfig)
    """Weights of the privileged and of the reference-only teacher. A diagnosis always uses the frozen weights."""
    anchor: WeightsConfig = field(default_factory=WeightsConfig)
    """Weights of the base in the target."""
    loss_mean: str = "sequence"
    """`sequence`: mean over the tokens of each response, then over responses (as in the paper). `token`: mean over all
    tokens of the global batch (as in official OPSD)."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    """Which tokens count, and their weights."""
    chunk_tokens: Annotated[int | None, Bounds(1, 10**7)] = None
    """Number of response tokens whose logits exist at the same time, on each tensor-parallel rank. null: at most 1,024,
    and fewer if the target or the layout needs more buffers, so that the loss takes at most 0.8 of the memory of an
    fp32 [8192, V/tp] tensor."""
    fused: str = "auto"
    """Whether the arithmetic between the matrix products of the loss is compiled into fused kernels: `always`, `never`,
    or `auto`, which compiles if a rank has at least 8,192 vocabulary entries. If compilation fails, the loss logs a
    warning and runs uncompiled."""
    diagnosed_tokens: Annotated[int, Bounds(0, 10**7)] = 256
    """Tokens per step and data-parallel rank on which the norms and cosines of Δ are measured; 0 disables the
    measurement. It needs both teachers on every row, even if the target (`opsd`, `beta_opsd`) uses no reference-only
    teacher."""

    def __post_init__(self) -> None:
        one_of("distillation.loss_mean", self.loss_mean, ("sequence", "token"))
        one_of("distillation.fused", self.fused, ("auto", "always", "never"))
        for name, section in (("teacher", self.teacher), ("anchor", self.anchor)):
            one_of(f"distillation.{name}.weights", section.weights, ("frozen", "live", "ema", "snapshot"))
            check_numbers(section, f"distillation.{name}")
        check_numbers(self, "distillation")

    @property
    def moving_copies(self) -> int:
        """Number of additional copies of the trained weights that teachers and anchor need."""
        moving = [section for section in (self.teacher, self.anchor) if section.weights in ("ema", "snapshot")]
        return len(moving) - (len(moving) == 2 and self.teacher == self.anchor)
