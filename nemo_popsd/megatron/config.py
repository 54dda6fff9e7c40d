"""Configuration of the student and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of

_SIZE = Bounds(1, 2**16)

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this times the tensor-parallel size, as Megatron does."""


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters on the usual linears (Megatron-Bridge's LoRA)."""

    rank: Annotated[int, Bounds(1, 16384)] = 64
    """Rank of the update (the paper's)."""
    alpha: Annotated[float, Bounds(0, 1e6, above=True)] = 128
    """The update is scaled by alpha / rank. The paper does not state its value."""
    dropout: Annotated[float, Bounds(0, 1)] = 0.0
    """Dropout before the adapter. Must be 0: with dropout the student would not equal the base at the start."""
    targets: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    """Megatron's linears that get an adapter: q, k and v; o; gate and up; down."""

    def __post_init__(self) -> None:
        check_numbers(self, "student.lora")
        if self.dropout != 0:
            raise UserError(
                "configuration",
                got=f"student.lora.dropout={self.dropout}",
                need="0: the branches are compared under the same weights",
                fix="set student.lora.dropout=0",
            )


@dataclass(kw_only=True)
class StudentConfig:
    """The trained model; its initial weights are the frozen base."""

    source: Annotated[str, Text.PATH] = ""
    """A Hugging Face directory, a NeMo checkpoint (directory or `.nemo`), or `nemo_popsd:tiny_reasoner`."""
    precision: str = "bf16"
    """`bf16` (gradients and optimizer in fp32) or `fp32`. On a GPU Transformer Engine multiplies fp32 matrices in TF32
    (10 bits of mantissa) unless NVIDIA_TF32_OVERRIDE=0 is set before the start, computes attention in fp32 without a
    fused kernel (memory grows with the square of the length), and does not support fp32 under context parallelism."""
    adaptation: str = "lora"
    """`lora`: adapters are trained, the base is the same weights with the adapters off. `full`: all weights are
    trained, the base is a frozen copy."""
    frozen_copy: str = "device"
    """Where the frozen copy of full fine-tuning is kept: `device`, or `host`, pinned memory from which it is copied to
    the device for the frozen passes; its output matrix stays on the device, where the loss needs it. LoRA has no
    copy."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters, when `adaptation` is `lora`."""
    layers: str = "auto"
    """`transformer_engine`, `local` (plain torch, on a GPU or a CPU), or `auto`: Transformer Engine on a GPU where it
    imports, else local. Checkpoints are the same; results differ only by rounding."""
    recompute: bool = False
    """Gradient checkpointing: recompute each layer in the backward pass."""

    def __post_init__(self) -> None:
        one_of("student.precision", self.precision, ("bf16", "fp32"))
        one_of("student.adaptation", self.adaptation, ("lora", "full"))
        one_of("student.layers", self.layers, ("auto", "transformer_engine", "local"))
        one_of("student.frozen_copy", self.frozen_copy, ("device", "host"))
        if self.frozen_copy == "host" and self.adaptation == "lora":
            raise UserError(
                "configuration",
                got="student.frozen_copy='host' with student.adaptation='lora'",
                need="full fine-tuning: under LoRA the base is the student with its adapters off, and there is no copy",
                fix="set student.frozen_copy=device, or student.adaptation=full",
            )


@dataclass(kw_only=True)
class OptimizerConfig:
    """Megatron's Adam, its schedule and clipping."""

    lr: Annotated[float, Bounds(0, 1, above=True)] = 5e-6
    """Peak learning rate (the paper's)."""
    min_lr: Annotated[float, Bounds(0, 1)] = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: Annotated[int, Bounds(0, 10**8)] = 0
    """Steps of linear warm-up from 0."""
    decay: str = "constant"
    """`constant`, `linear` or `cosine`, from the warm-up's end to `training.steps`."""
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, Bounds(0, 1, below=True)] = 0.9
    """Adam's decay of the first moment."""
    beta2: Annotated[float, Bounds(0, 1, below=True)] = 0.999
    """Adam's decay of the second moment."""
    eps: Annotated[float, Bounds(1e-30, 1)] = 1e-8
    """Adam's epsilon."""
    clip_grad: Annotated[float, Bounds(1e-6, 1e6, or_zero=True)] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer")
        one_of("optimizer.decay", self.decay, ("constant", "linear", "cosine"))
