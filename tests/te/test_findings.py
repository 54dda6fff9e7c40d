"""Restrictions, side effects and defects of Transformer Engine for which the project has a workaround or a refusal.

Each test that describes the library fails as soon as an installed version no longer has what it describes; the
workaround can then be removed for that version. What is described here holds for Transformer Engine 2.12 and 2.20
(`tests.te.versions.SUPPORTED`) with Megatron-Bridge 0.3 and 0.6:

- the gradient of a norm's gathered output is dropped (`nemo_popsd.megatron.adapters.gather_in_adapters`)
- Bridge's LoRA gives all experts of a rank one adapter unless told otherwise (`nemo_popsd.megatron.limits`)
- context parallelism by exchange has no sliding window and no fp32 (`nemo_popsd.megatron.limits`)
- a single token with one key-value head has no memory layout that the attention accepts (`decoding`, `microbatches`)
- the variables that choose an attention conflict with Megatron's own choice (`nemo_popsd.megatron.limits`)
- a process has user buffers of one shape (`nemo_popsd.megatron.passthrough`)
- Bridge's LoRA imports Transformer Engine unconditionally (`nemo_popsd.runtime.local_layers`)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.errors import UserError
from tests.harness import LOCAL, TRANSFORMER_ENGINE, run_ranks
from tests.layers import on_transformer_engine
from tests.te import versions
from tests.te.install import version
from tests.te.location import PACKAGE, folder
from tests.tiny_models import build_student, load_dense, save_tiny_model, whole_logits

IDS = torch.randint(0, 203, (1, 8), generator=torch.Generator().manual_seed(2))
ONE_GROUP = {"num_key_value_heads": 1}


@on_transformer_engine
def test_the_findings_are_stated_for_the_installed_version() -> None:
    assert version() in versions.SUPPORTED


def _norm_of_gathered(rank: int, world_size: int, gathered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a rank's tokens through the returned output of the norm, and the gradient in plain torch."""
    import transformer_engine.pytorch as te

    group = torch.distributed.group.WORLD
    generator = torch.Generator().manual_seed(rank)
    x, upstream = (torch.randn(4, 2, 8, generator=generator) for _ in range(2))
    linear = te.LayerNormLinear(
        *(8, 4 * world_size),
        sequence_parallel=True,
        tp_group=group,
        tp_size=world_size,
        bias=False,
        normalization="RMSNorm",
        parallel_mode="column",
        return_layernorm_output=True,
        return_layernorm_output_gathered=gathered,
        params_dtype=torch.float32,
        device="cpu",
    )
    leaf = x.clone().requires_grad_()
    _, normed = linear(leaf)
    whole = upstream
    if gathered:
        parts = [torch.empty_like(upstream) for _ in range(world_size)]
        torch.distributed.all_gather(parts, upstream)
        # The ranks' gradients of the gathered output are summed: one of them has all.
        whole = torch.cat(parts) if rank == 0 else torch.zeros(4 * world_size, 2, 8)
    (normed * whole).sum().backward()
    plain = x.clone().requires_grad_()
    (torch.nn.functional.rms_norm(plain, (8,), linear.layer_norm_weight.detach(), 1e-5) * upstream).sum().backward()
    assert leaf.grad is not None
    assert plain.grad is not None
    return leaf.grad, plain.grad


@on_transformer_engine
@pytest.mark.parametrize("gathered", [True, False])
def test_the_gradient_of_a_gathered_norm_is_dropped(gathered: bool) -> None:
    """Bridge's LoRA asks for the gathered output under sequence parallelism; `gather_in_adapters` prevents it."""
    for got, right in run_ranks(_norm_of_gathered, 2, gathered, layers=TRANSFORMER_ENGINE):
        assert right.abs().max() > 0.1
        if gathered:
            assert torch.count_nonzero(got) == 0, "fixed in this version: remove gather_in_adapters for it"
        else:
            torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


def _adapters_of_experts(rank: int, world_size: int, model: Path) -> list[tuple[int, int, bool]]:
    """For each grouped linear: experts, dimensions of the adapter's first matrix, whether Bridge gathers its norm."""
    from megatron.bridge.peft.lora import LoRA

    gpt = build_student(model).gpt
    LoRA(target_modules=["linear_fc1", "linear_fc2"], dim=4)(gpt, training=True)
    grouped = [m for name, m in gpt.named_modules() if name.endswith(("experts.linear_fc1", "experts.linear_fc2"))]
    return [
        (m.to_wrap.num_gemms, m.adapter.linear_in.weight.dim(), m.adapter.linear_in.weight.shape[0] == 4)
        for m in grouped
    ]


@on_transformer_engine
def test_all_experts_of_a_rank_share_one_adapter(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "qwen3_moe")
    [adapters] = run_ranks(_adapters_of_experts, 1, model, layers=TRANSFORMER_ENGINE)
    assert adapters
    assert set(adapters) == {(4, 2, True)}, "an adapter for each expert: LoRA on experts need not be refused"


def _with_window(rank: int, world_size: int) -> str:
    from megatron.core.extensions.transformer_engine import torch as emulated
    from transformer_engine.pytorch.attention import DotProductAttention

    attention = DotProductAttention(2, 8, qkv_format="sbhd", attn_mask_type="causal", attention_dropout=0.0)
    group: Any = torch.distributed.group.WORLD
    attention.set_context_parallel_group(group, list(range(world_size)), emulated.cuda.Stream(), "p2p")
    x = torch.randn(8, 1, 2, 8).bfloat16()
    attention(x, x, x)
    try:
        attention(x, x, x, window_size=(2, 0))
    except Exception as error:
        return str(error)
    return "computed"


@on_transformer_engine
def test_there_is_no_sliding_window_under_context_parallelism() -> None:
    for said in run_ranks(_with_window, 2, layers=TRANSFORMER_ENGINE):
        assert "does not support sliding window" in said or "No dot product attention" in said, said


@on_transformer_engine
def test_fused_attention_is_for_half_precision_alone() -> None:
    """The emulation also supports fp32 (`tests.te.install`); the library, which has no other under context parallelism,
    does not.
    """
    package = folder() / PACKAGE / "pytorch" / "attention" / "dot_product_attention"
    text = (package / "utils.py").read_text()
    condition = "if qkv_dtype not in [torch.bfloat16, torch.float16, torch.float8_e4m3fn]"
    assert "Disabling FusedAttention" in text.rpartition(condition)[2].partition("# Filter")[0]
    for backend in ("FlashAttention", "FusedAttention"):
        body = (package / "backends.py").read_text().partition(f"class {backend}(")[2].partition("\nclass ")[0]
        assert "x.dtype in [torch.float16, torch.bfloat16]" in body, backend


def _single_tokens(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """A prefill and a micro-batch of one token, in a model with one key-value head."""
    from nemo_popsd.megatron import decoding, microbatches
    from nemo_popsd.megatron.forward import frozen_hidden_states, student_batches
    from nemo_popsd.megatron.microbatches import ContextSequence

    student = build_student(model)
    sequence = ContextSequence([int(IDS[0, 0])], [])

    def decoded() -> torch.Tensor:
        decoder = decoding.SlotDecoder(student.chunks, slots=1, capacity=8)
        with torch.no_grad(), decoder.open():
            decoder.prefill(torch.tensor([0]), IDS[:, :1])
            logits = decoder.next_logits(IDS[:, 1], torch.tensor([1]), 2)
        assert logits is not None
        return logits[:, :203].clone()

    def forward(packed: bool) -> tuple[int, int]:
        batches = student_batches(student.chunks, [sequence], 1, packed=packed)
        frozen_hidden_states(student.chunks, batches)
        return batches[0].shape

    seen: dict[str, Any] = {"logits": decoded(), "padded": forward(False), "packed": forward(True), "raised": []}
    decoding.FEWEST_TOKENS = microbatches.FEWEST_TOKENS = 1
    for call in (decoded, lambda: forward(False)):
        try:
            call()
        except Exception as error:
            seen["raised"].append(str(error))
    return seen


@on_transformer_engine
def test_one_token_with_one_key_value_head_is_computed(tmp_path: Path) -> None:
    """Transformer Engine cannot determine the memory layout of a single token; a token of padding is added."""
    model = save_tiny_model(tmp_path / "model", "qwen3", **ONE_GROUP)
    [seen] = run_ranks(_single_tokens, 1, model, layers=TRANSFORMER_ENGINE)
    with torch.no_grad():
        expected = load_dense(model)(IDS[:, :2]).logits[:, 1]
    torch.testing.assert_close(seen["logits"], expected, rtol=0, atol=2e-5)
    assert seen["padded"] == seen["packed"] == (2, 1)
    assert len(seen["raised"]) == 2, "without the padding both are refused"
    assert all("layout is not supported" in message for message in seen["raised"]), seen["raised"]


def _modules_of_lora(rank: int, world_size: int) -> tuple[str, bool, bool]:
    import sys

    from megatron.bridge.peft import lora_layers
    from megatron.bridge.peft import utils as peft_utils

    from nemo_popsd.runtime.cpu import adapt_megatron
    from nemo_popsd.runtime.local_layers import transformer_engine_imports

    adapt_megatron()
    engine: Any = lora_layers.te
    real = engine is sys.modules.get("transformer_engine.pytorch")
    assert transformer_engine_imports() == real
    return str(getattr(engine, "__file__", None)), real, bool(peft_utils.HAVE_TE)


@pytest.mark.parametrize(
    "layers", [LOCAL, pytest.param(TRANSFORMER_ENGINE, marks=on_transformer_engine)], ids=["absent", "importable"]
)
def test_lora_wraps_the_real_transformer_engine_where_it_imports(layers: str) -> None:
    """The stand-in for the import of Megatron-Bridge's LoRA is for machines without Transformer Engine alone."""
    [(file, real, believed)] = run_ranks(_modules_of_lora, 1, layers=layers)
    assert real == believed == (layers == TRANSFORMER_ENGINE)
    assert ("transformer_engine/pytorch/__init__.py" in file) == real


VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def _with_variables(rank: int, world_size: int, model: Path) -> dict[str, str]:
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    assert not before, f"set before a model is built: {before}"
    seen = {}
    for name in VARIABLES:
        os.environ[name] = "0"
        try:
            build_student(model)
        except UserError as error:
            seen[name] = str(error)
        del os.environ[name]
    whole_logits(build_student(model).gpt, IDS, 203)
    for name in VARIABLES:  # Megatron sets them from the model's configuration
        seen[f"{name} afterwards"] = os.environ[name]
    build_student(model)
    return seen


@on_transformer_engine
def test_variables_that_choose_the_attention_are_refused_by_name(tmp_path: Path) -> None:
    """Megatron would fail with an assertion about a setting that a run does not have."""
    [seen] = run_ranks(_with_variables, 1, save_tiny_model(tmp_path / "model"), layers=TRANSFORMER_ENGINE)
    for name in VARIABLES:
        assert f"got {name}=0" in seen[name]
        assert f"unset {name}" in seen[name]
        assert seen[f"{name} afterwards"] == "1"


def test_nothing_in_the_project_sets_the_variables() -> None:
    root = Path(__file__).parents[2]
    folders = ("nemo_popsd", "slurm", "docker", "conf", "experiments")
    files = [root / "Dockerfile", *(file for name in folders for file in (root / name).rglob("*") if file.is_file())]
    assert len(files) > 100
    for file in files:
        if file.suffix in (".py", ".sh", ".yaml", ".slurm", ".sbatch") or file.name == "Dockerfile":
            text = file.read_text()
            for name in VARIABLES:
                assert f"{name}=" not in text, file
                assert f'environ["{name}"]' not in text, file


def _second_shape(rank: int, world_size: int) -> str:
    from transformer_engine.pytorch.module import base

    base.tex.device_supports_multicast = lambda: True
    base._ub_communicators = {}  # as after a first shape
    try:
        base.initialize_ub([64, 8], world_size)
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return ""


@on_transformer_engine
def test_user_buffers_have_one_shape_in_a_process() -> None:
    """A tensor must fill its buffer: `CommOverlap::copy_into_buffer` of its C++ extension compares the sizes."""
    [said] = run_ranks(_second_shape, 1, layers=TRANSFORMER_ENGINE)
    assert "UB communicators are already initialized" in said
    source = (folder() / PACKAGE / "pytorch" / "module" / "base.py").read_text()
    filling = source[source.index("def fill_userbuffers_buffer_for_all_gather") :]
    assert "comm.copy_into_buffer(local_tensor, local_chunk=True)" in filling
