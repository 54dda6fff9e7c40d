"""Configuration of the student and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from nemo_popsd.errors import UserError
from nemo_popsd.settings.bounds import Bounds, Text, check_numbers
from nemo_popsd.settings.checks import one_of, refuse

_SIZE = Bounds(1, 2**16)

RECOMPUTED_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")
"""Parts of a layer that `student.recompute=selective` can recompute, by megatron-core's names."""

FP8_MULTIPLES = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""By `fp8.recipe`: inputs, outputs and tokens of each rank's part of a linear must be a multiple of this number."""

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this times the tensor-parallel size, as Megatron does."""


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters on the usual linears (Megatron-Bridge's LoRA)."""

    rank: Annotated[int, Bounds(1, 16384)] = 64
    """Rank of the adapters (the paper's value)."""
    alpha: Annotated[float, Bounds(0, 1e6, above=True)] = 128
    """The update is scaled by alpha / rank. The paper does not state its value."""
    dropout: Annotated[float, Bounds(0, 1)] = 0.0
    """Dropout before the adapter. Must be 0: with dropout the student would not equal the base at the start."""
    targets: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    """Megatron linears with an adapter: q, k and v; o; gate and up; down."""

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
    """A Hugging Face directory, a NeMo checkpoint (directory or `.nemo`), the ID of a model in the local Hub cache
    (`Qwen/Qwen3-8B`; nothing is downloaded), or `nemo_popsd:tiny_reasoner`."""
    precision: str = "bf16"
    """`bf16` (gradients and optimizer in fp32) or `fp32`. On a GPU Transformer Engine multiplies fp32 matrices in TF32
    (10 bits of mantissa) unless NVIDIA_TF32_OVERRIDE=0 is set before the start, computes attention in fp32 without a
    fused kernel (memory grows with the square of the length), and does not support fp32 under context parallelism."""
    adaptation: str = "lora"
    """`lora` trains adapters; the base is the same weights with adapters disabled. `full` trains all weights; the base
    is a frozen copy."""
    frozen_copy: str = "device"
    """Location of the frozen copy under full fine-tuning: `device`, or `host`, pinned memory from which it is copied to
    the device for the frozen passes; its output matrix stays on the device, where the loss needs it. LoRA has no
    copy."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters, used if `adaptation` is `lora`."""
    layers: str = "auto"
    """`transformer_engine`, `local` (plain torch, on a GPU or a CPU), or `auto`: Transformer Engine on a GPU if it can
    be imported, otherwise local. Checkpoints are the same; results differ only by rounding."""
    recompute: str = "none"
    """Activations that the backward pass recomputes: `none`, `selective` (the parts of a layer named in
    `recompute_modules`), or `full` (entire layers). `true` means `full`, `false` means `none`."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Parts of a layer for `recompute=selective`: `core_attn` and `mlp`; in a mixture of experts `core_attn`, `moe`,
    and with Transformer Engine's layers `moe_act` (the activation of the experts) and `layernorm` (the norm before
    them). Fused attention always recomputes its scores, so `core_attn` saves memory only without it."""
    recompute_method: str = "uniform"
    """With `recompute=full`: `uniform` recomputes all layers in units of `recompute_layers` and keeps the input of each
    unit; `block` recomputes the first `recompute_layers` layers of each model chunk and keeps the activations of the
    others."""
    recompute_layers: Annotated[int, _SIZE] = 1
    """With `recompute=full`: layers per unit (`uniform`), or recomputed layers per model chunk (`block`)."""
    gradient_accumulation_fusion: str = "auto"
    """Whether the matrix product of a weight gradient accumulates directly into the gradient buffer: `true` (needs
    `fused_weight_gradient_mlp_cuda` of NVIDIA's apex), `false`, or `auto`: on with Transformer Engine's layers if that
    library can be imported."""

    def __post_init__(self) -> None:
        check_numbers(self, "student")
        self.recompute = {"true": "full", "false": "none"}.get(self.recompute, self.recompute)
        one_of("student.recompute", self.recompute, ("none", "selective", "full"))
        one_of("student.recompute_method", self.recompute_method, ("uniform", "block"))
        one_of("student.gradient_accumulation_fusion", self.gradient_accumulation_fusion, ("auto", "true", "false"))
        for module in self.recompute_modules:
            one_of("student.recompute_modules", module, RECOMPUTED_MODULES)
        if self.recompute == "selective" and not self.recompute_modules:
            raise refuse("student.recompute_modules", [], "a part of a layer: student.recompute is selective")
        below = {"linear_qkv", "linear_proj"} & set(self.lora.targets)
        within = {"mlp", "moe"} & set(self.recompute_modules)
        if self.recompute == "selective" and within and self.adaptation == "lora" and not below:
            # Nothing before the first layer's MLP would be trained, and torch recomputes only if an input needs
            # gradient.
            raise UserError(
                "configuration",
                got=f"student.recompute_modules with {', '.join(within)} and student.lora.targets={self.lora.targets}",
                need="an adapter before the first MLP, without which its own adapters would get no gradient",
                fix="add linear_qkv or linear_proj to student.lora.targets, or set student.recompute=full",
            )
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
class FP8Config:
    """FP8 in the linears of the layers by Transformer Engine, with a separate setting for each kind of pass.

    Off by default. Weights stay in bf16 and are quantised on use. FP8 does not affect embedding, norms, attention,
    adapters, output matrix and loss. The self-check and `popsd diagnose` compute in bf16. Needs a dense model, a GPU of
    compute capability 8.9 (Ada) or higher, Transformer Engine's layers and `student.precision=bf16`.
    """

    frozen: bool = False
    """Use FP8 in the frozen passes. Their rounding errors shift the target and are distilled with it:
    `popsd diagnose --fp8` compares them with the effect that is distilled."""
    rollouts: bool = False
    """Use FP8 for decoding with `rollout.engine=megatron`, evaluations included. For vLLM see
    `rollout.vllm.quantization`."""
    training: bool = False
    """Use FP8 in the student's forward and backward pass. The gradient of an adapter is computed in bf16 from
    activations and gradients that FP8 has rounded."""
    recipe: str = "blockwise"
    """How values are scaled (Megatron's `fp8_recipe`): `tensorwise` by the maximum of the tensor; `blockwise` by blocks
    of 1 x 128 inputs and 128 x 128 weights, so that a token does not depend on the rest of its batch (compute
    capability 9.0, CUDA 12.9); `delayed` by the maximum of earlier calls, for training only, because Transformer Engine
    updates scales only where gradients are computed; `mxfp8` by blocks of 1 x 32 (Blackwell). With `delayed` the first
    micro-batch of a new or resumed run uses a scale of 1."""
    format: str = "hybrid"
    """Megatron's `fp8`: `hybrid` (e4m3, and e5m2 for gradients) or `e4m3`."""
    num_layers_at_start_in_bf16: Annotated[int, Bounds(0, 1024)] = 0
    """Number of first layers that stay in bf16; not supported with `delayed`."""
    num_layers_at_end_in_bf16: Annotated[int, Bounds(0, 1024)] = 0
    """Number of last layers that stay in bf16; not supported with `delayed`."""

    def __post_init__(self) -> None:
        check_numbers(self, "fp8")
        one_of("fp8.recipe", self.recipe, tuple(FP8_MULTIPLES))
        one_of("fp8.format", self.format, ("hybrid", "e4m3"))
        if self.recipe != "delayed":
            return
        without_gradients = [name for name in ("frozen", "rollouts") if getattr(self, name)]
        if without_gradients:
            raise UserError(
                "configuration",
                got=f"fp8.{without_gradients[0]}=true with fp8.recipe=delayed",
                need="another recipe: Transformer Engine updates delayed scales only where gradients are computed",
                fix="set fp8.recipe=tensorwise or blockwise",
            )
        if self.layers_in_bf16:
            raise UserError(
                "configuration",
                got=f"fp8.num_layers_at_start_in_bf16={self.num_layers_at_start_in_bf16}, "
                f"fp8.num_layers_at_end_in_bf16={self.num_layers_at_end_in_bf16} with fp8.recipe=delayed",
                need="all layers in FP8: delayed scales are updated for the whole model at once",
                fix="set both to 0, or fp8.recipe=tensorwise or blockwise",
            )

    @property
    def layers_in_bf16(self) -> int:
        """Number of layers that stay in bf16."""
        return self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16

    @property
    def passes(self) -> tuple[str, ...]:
        """The settings of the passes that use FP8; empty if FP8 is off."""
        return tuple(f"fp8.{name}" for name in ("frozen", "rollouts", "training") if getattr(self, name))


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
    """`constant`, `linear` or `cosine`, from the end of warm-up to `training.steps`."""
    weight_decay: Annotated[float, Bounds(0, 100)] = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, Bounds(0, 1, below=True)] = 0.9
    """Adam's decay of the first moment."""
    beta2: Annotated[float, Bounds(0, 1, below=True)] = 0.999
    """Adam's decay of the second moment."""
    eps: Annotated[float, Bounds(1e-30, 1)] = 1e-8
    """Adam's epsilon."""
    clip_grad: Annotated[float, Bounds(1e-6, 1e6, or_zero=True)] = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    distributed: str = "auto"
    """Shard the optimizer state over the data-parallel and context-parallel ranks, which hold the same weights
    (Megatron's distributed optimizer): `true`, `false`, or `auto`, which enables it for two such ranks or more."""
    overlap_grad_reduce: bool = False
    """Reduce the gradients of a bucket while the backward pass computes those of the next bucket."""
    overlap_param_gather: bool = False
    """With `training.updates_per_step` above 1: gather the updated weights of a bucket while the forward pass of the
    next update computes with earlier buckets. The weights after the last update of a step are gathered immediately,
    because rollouts read them. Needs `overlap_grad_reduce` and a sharded optimizer state."""
    bucket_size: Annotated[int, Bounds(1, 2**40, or_zero=True)] = 0
    """Parameters per bucket with `overlap_grad_reduce`; 0 uses Megatron's default, the larger of 40 million and 1
    million times the data-parallel size. On pipeline stages after the first, one bucket holds all parameters."""
    grad_dtype: str = "fp32"
    """Data type in which gradients are accumulated and reduced: `fp32` or `bf16`. `bf16` halves memory and traffic; its
    rounding errors grow with the number of micro-batches and ranks. Needs `student.precision=bf16`."""
    state_dtype: str = "fp32"
    """`fp32`, or `bf16` for both moments (Megatron's precision-aware optimizer); main weights stay fp32. Needs
    Transformer Engine's Adam, `student.precision=bf16` and a sharded optimizer state."""
    host_share: Annotated[float, Bounds(0, 1)] = 0.0
    """Fraction of the optimizer state that is kept and updated on the host (Megatron's hybrid optimizer). It saves
    device memory at the cost of transfers and a slow update. Needs a GPU, Transformer Engine, `student.precision=bf16`
    and a sharded optimizer state."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer")
        one_of("optimizer.decay", self.decay, ("constant", "linear", "cosine"))
        one_of("optimizer.distributed", self.distributed, ("auto", "true", "false"))
        one_of("optimizer.grad_dtype", self.grad_dtype, ("fp32", "bf16"))
        one_of("optimizer.state_dtype", self.state_dtype, ("fp32", "bf16"))
        if self.distributed == "false" and self.needs_sharding:
            raise UserError(
                "configuration",
                got=f"{self.needs_sharding} with optimizer.distributed=false",
                need="a sharded optimizer state",
                fix="set optimizer.distributed=auto or true",
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise UserError(
                "configuration",
                got="optimizer.overlap_param_gather=true with optimizer.overlap_grad_reduce=false",
                need="both: Megatron overlaps the gather of weights only where it overlaps the reduction of gradients",
                fix="set optimizer.overlap_grad_reduce=true, or optimizer.overlap_param_gather=false",
            )
        if self.bucket_size and not self.overlap_grad_reduce:
            raise UserError(
                "configuration",
                got=f"optimizer.bucket_size={self.bucket_size} with optimizer.overlap_grad_reduce=false",
                need="overlap: without it, all gradients are one bucket",
                fix="set optimizer.overlap_grad_reduce=true, or optimizer.bucket_size=0",
            )
        if self.host_share and self.state_dtype != "fp32":
            raise UserError(
                "configuration",
                got=f"optimizer.host_share={self.host_share} with optimizer.state_dtype={self.state_dtype}",
                need="fp32: the Adam of the host keeps no other moments",
                fix="set optimizer.state_dtype=fp32, or optimizer.host_share=0",
            )

    @property
    def needs_sharding(self) -> str:
        """The first setting that needs Megatron's distributed optimizer, as ``name=value``; "" if there is none."""
        if self.overlap_param_gather:
            return "optimizer.overlap_param_gather=true"
        if self.state_dtype != "fp32":
            return f"optimizer.state_dtype={self.state_dtype}"
        return f"optimizer.host_share={self.host_share}" if self.host_share else ""

    def sharded(self, ranks: int) -> bool:
        """Whether optimizer state is sharded over `ranks` ranks that hold the same weights."""
        return self.distributed == "true" or (self.distributed == "auto" and (ranks > 1 or bool(self.needs_sharding)))
