"""Compares the formulas with the memory, operations and traffic of a small model on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_popsd.planning import compute, memory, traffic
from nemo_popsd.planning.parameters import count, padded_vocabulary, stages
from tests.harness import run_ranks
from tests.planning import cases
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow
KINDS = ("qwen3", "qwen3_tied", "qwen2", "llama")


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer_bytes(run: Any) -> int:
    """Bytes of moments and main weights on this rank: optimizer memory that is not shared with the model."""
    megatron = run.optimizer.megatron
    inner = megatron.chained_optimizers[0] if hasattr(megatron, "chained_optimizers") else megatron
    own = {p.untyped_storage()._cdata for p in run.student.gpt.parameters()}
    mains = [p for group in inner.optimizer.param_groups for p in group["params"]]
    mains = [p for p in mains if p.untyped_storage()._cdata not in own]
    moments = [v for state in inner.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return _bytes(mains) + _bytes(v for v in moments if v.dim() > 0)


def _gradient_bytes(run: Any) -> int:
    """Megatron's gradient buffers."""
    return _bytes(buffer.grad_data for chunk in run.optimizer.chunks for buffer in chunk.buffers)


def _measure(directory: Path, config: Any, world_size: int) -> dict[str, Any]:
    from nemo_popsd.megatron.forward import forward_backward, frozen_hidden_states, student_batches
    from nemo_popsd.megatron.microbatches import ContextSequence
    from nemo_popsd.rehearsal.counters import Flops, LiveBytes
    from tests.planning.counters import SentBytes
    from tests.training.runs import start

    run = start(directory, config)
    engine = run.engine()
    caches = _watch_caches()
    tensor = config.parallel.tensor
    mine = cases.rows(config.training.prompts_per_step * tensor // world_size)
    step = _step_to_the_limit(run, engine)
    run.steps = 1  # the first step includes the self-check
    found: dict[str, Any] = {"weights": _bytes(run.student.gpt.parameters())}
    found["gradients"] = _gradient_bytes(run)
    with SentBytes(world_size) as sent, Flops() as counter:
        step(2, mine, run.optimizer, run.update)
    found["step flops"], found["sent"] = counter.total, sent.bytes
    found["optimizer"] = _optimizer_bytes(run)
    found["cache"] = max(caches)

    student = [ContextSequence(row.contexts.student, [3] * cases.RESPONSE) for row in mine]
    privileged = [ContextSequence(row.contexts.privileged, [3] * cases.RESPONSE) for row in mine]
    batches = student_batches(run.student.chunks, student, config.training.microbatch_tokens, packed=True)
    passes = student_batches(run.student.chunks, privileged, config.training.frozen_tokens, packed=True)

    def train() -> None:
        forward_backward(run.optimizer.chunks, batches, lambda _, hidden: (hidden.sum(), None))

    with run.student.base.model() as base:
        with LiveBytes() as live:
            frozen_hidden_states(base, passes)
        found["frozen forward"] = live.peak
        with Flops() as counter:
            frozen_hidden_states(base, passes)
        found["frozen flops"] = counter.total
    found["activations"] = min(_peak(train) for _ in range(5))  # gloo's threads may keep a tensor for a moment
    with Flops() as counter:
        train()
    found["training flops"] = counter.total
    found["loss"], found["loss flops"] = _measure_loss(run)
    return found


def _peak(work: Callable[[], None]) -> int:
    from nemo_popsd.rehearsal.counters import LiveBytes

    with LiveBytes() as live:
        work()
    return live.peak


def _step_to_the_limit(run: Any, engine: Any) -> Any:
    """The step of the package, with responses as long as the limit."""
    from nemo_popsd.rollout.engine import SamplingParams

    section = run.config.rollout
    sampling = SamplingParams(1.0, section.top_p, section.top_k, section.max_response_tokens, frozenset())
    return run.on_policy_step(engine, sampling=sampling)


def _watch_caches() -> list[int]:
    """Bytes of the engine's cache at each step of decoding from now on."""
    from nemo_popsd.megatron.decoding import SlotDecoder

    seen: list[int] = []
    forward = SlotDecoder.next_logits

    def watched(self: SlotDecoder, *args: Any) -> Any:
        seen.append(self.cache_bytes)
        return forward(self, *args)

    SlotDecoder.next_logits = watched  # type: ignore[method-assign]
    return seen


def _measure_loss(run: Any) -> tuple[int, int]:
    """Peak bytes and operations of the loss of one micro-batch of all rows, forward and backward."""
    from nemo_popsd.distillation import DiagnosedTokens, HiddenPair, loss_from_hidden
    from nemo_popsd.distillation.divergence import build_divergence
    from nemo_popsd.distillation.target_families import build_target
    from nemo_popsd.megatron.forward import upstream_of_loss
    from nemo_popsd.rehearsal.counters import Flops, LiveBytes

    student, settings = run.student, run.config.distillation
    tokens, width = cases.ROWS * cases.RESPONSE, student.weight.shape[1]
    source = torch.randn(tokens, width)
    count = settings.diagnosed_tokens
    sample = DiagnosedTokens(torch.arange(count) * tokens // count, source[:count].clone(), source[:count].clone())

    def loss() -> None:
        hidden, anchor, shift = source.clone().requires_grad_(), source.clone(), source.clone()
        found = loss_from_hidden(
            hidden,
            student.weight,
            HiddenPair(anchor, shift),
            student.base_weight,
            target=build_target(settings.target),
            divergence=build_divergence(settings.divergence),
            shard=student.vocab_shard,
            token_weights=torch.ones(tokens),
            chunk_tokens=settings.chunk_tokens,
            centre=student.centre,
            main_gradient=student.main_gradient,
            diagnosed=sample,
        )
        (found.total * upstream_of_loss()).backward()

    with LiveBytes() as live:
        loss()
    with Flops() as counter:
        loss()
    return live.peak, counter.total


def measure(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """Everything for each variant, tensor-parallel over all ranks."""
    return {
        name: _measure(directory, cases.run_config(tensor=world_size, **student), world_size)
        for name, student in cases.VARIANTS.items()
    }


def _on_a_gpu(choice: Callable[..., Any]) -> Callable[..., Any]:
    """`choice` as for a GPU on any device. The type of the device is its last positional argument."""
    return lambda *arguments, **options: choice(*arguments[:-1], "cuda", **options)


def measure_kernels_of_a_gpu(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """The same in fp32 with repeated heads and cache positions as on a GPU."""
    from nemo_popsd.megatron import kernel_choice, kernels, kv_cache

    for module, name in ((kernels, "takes_groups"), (kv_cache, "cache_positions")):
        setattr(module, name, _on_a_gpu(getattr(kernel_choice, name)))
    return measure(rank, world_size, directory)


def measure_objects(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer of each family and precision, data-parallel over all ranks."""
    found = {}
    for kind in KINDS:
        for precision in ("fp32", "bf16"):
            for adaptation in ("full", "lora"):
                config = cases.run_config(distributed=world_size > 1, adaptation=adaptation, precision=precision)
                found[f"{kind} {precision} {adaptation}"] = _objects(folder / kind, config)
    return found


def _objects(directory: Path, config: Any) -> dict[str, int]:
    from tests.training.runs import start

    run = start(directory, config)
    run.optimizer.zero_grad()
    for parameter in run.student.gpt.parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1e-3)
    run.optimizer.prepare()
    run.optimizer.step()
    return {
        "weights": _bytes(run.student.gpt.parameters()),
        "gradients": _gradient_bytes(run),
        "optimizer": _optimizer_bytes(run),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save_tiny_model(folder / kind, kind, **{**cases.MODEL, **({} if "qwen3" in kind else {"head_dim": 16})})
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def measured(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, int, list[dict[str, Any]]]:
    return folder / "qwen3", request.param, run_ranks(measure, request.param, folder / "qwen3", timeout=240)


def _case(measured: Any, variant: str) -> Any:
    directory, tensor, _ = measured
    return cases.planned(directory, cases.run_config(tensor=tensor, **cases.VARIANTS[variant]), ranks=tensor)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_a_rank_allocates_the_planned_weights_gradients_and_optimizer_state(measured: Any, variant: str) -> None:
    standing = memory.memory(_case(measured, variant)).standing
    for rank in measured[2]:
        for name in ("weights", "gradients", "optimizer"):
            assert rank[variant][name] == standing[name], name


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_the_planned_cache_is_allocated(measured: Any, variant: str) -> None:
    case = _case(measured, variant)
    (stage,) = stages(case.sizes, case.layout)
    assert case.decoded_rows == cases.ROWS
    assert measured[2][0][variant]["cache"] == memory.cache_bytes(case, stage)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_activations_and_the_loss_take_the_planned_bytes(measured: Any, variant: str) -> None:
    case, found = _case(measured, variant), measured[2][0][variant]
    (stage,) = stages(case.sizes, case.layout)
    frozen = memory.working_set(case, case.limits.privileged) * case.frozen_tokens * case.element
    # Recomputation under LoRA holds one more tensor of the residual stream.
    assert found["frozen forward"] == pytest.approx(frozen, rel=0.1)
    assert found["activations"] == pytest.approx(memory.activation_bytes(case, stage), rel=0.08)
    # Uncompiled arithmetic takes up to a dozen tiles of scratch, which the plan leaves out; at this size a tile is the
    # whole chunk.
    tile = 4 * case.config.distillation.chunk_tokens * padded_vocabulary(case.sizes, case.layout) / case.layout.tensor
    assert memory.loss_bytes(case) <= found["loss"] <= memory.loss_bytes(case) + 12 * tile


@pytest.fixture(scope="module")
def measured_as_on_a_gpu(folder: Path) -> dict[str, Any]:
    return run_ranks(measure_kernels_of_a_gpu, 1, folder / "qwen3", timeout=240)[0]


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_cache_and_activations_with_the_kernels_of_a_gpu_are_planned(
    folder: Path, measured_as_on_a_gpu: dict[str, Any], variant: str
) -> None:
    """Local layers in fp32: heads are repeated; the cache has a multiple of 256 positions."""
    config = cases.run_config(**cases.VARIANTS[variant])
    found, case = measured_as_on_a_gpu[variant], cases.planned(folder / "qwen3", config, ranks=1, device="cuda")
    (stage,) = stages(case.sizes, case.layout)
    assert found["cache"] == memory.cache_bytes(case, stage)
    on_cpu = cases.planned(folder / "qwen3", config, ranks=1)
    assert found["cache"] == memory.cache_bytes(on_cpu, stage) * 256 / case.limits.student
    assert found["activations"] == pytest.approx(memory.activation_bytes(case, stage), rel=0.08)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_the_planned_operations_are_counted(measured: Any, variant: str) -> None:
    case = _case(measured, variant)
    tokens, longest = case.rows * case.limits.student, case.limits.privileged
    expected = {
        "frozen flops": compute.forward(case, case.frozen_tokens, case.rows * longest**2, adapters=False).counted,
        "training flops": compute.training(case, tokens, case.rows * case.limits.student**2).counted,
    }
    for name, value in expected.items():
        for rank in measured[2]:
            assert rank[variant][name] == pytest.approx(value, rel=1e-12), name
    # The vocabulary is not split evenly: ranks differ, the mean does not.
    responses = case.rows * case.limits.response
    wanted = {"loss flops": compute.loss(case, responses, case.config.distillation.diagnosed_tokens).counted}
    flops = compute.step(case)
    wanted["step flops"] = flops.rollout.counted + flops.frozen.counted + flops.training.counted
    for name, value in wanted.items():
        mean = sum(rank[variant][name] for rank in measured[2]) / len(measured[2])
        assert mean == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_the_planned_bytes_are_sent(measured: Any, variant: str) -> None:
    case = _case(measured, variant)
    moved = traffic.step(case, from_host=0.0)
    planned = moved.rollout.tensor + moved.frozen.tensor + moved.training.tensor
    for rank in measured[2]:
        kinds = dict(rank[variant]["sent"])
        # The former are over groups of one rank, which send nothing; the latter send the sampled tokens.
        reduced = kinds.pop("allreduce_coalesced_", 0.0)
        kinds.pop("broadcast_", None)
        assert (reduced == 0) == (measured[1] == 1)
        assert sum(kinds.values()) == pytest.approx(planned, rel=0.03)


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "distributed optimizer over two"])
def objects(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, int, list[dict[str, Any]]]:
    return folder, request.param, run_ranks(measure_objects, request.param, folder, timeout=240)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_and_optimizer_of_families_and_precisions_are_planned(objects: Any, kind: str) -> None:
    folder, ranks, found = objects
    for precision in ("fp32", "bf16"):
        for adaptation in ("full", "lora"):
            config = cases.run_config(distributed=ranks > 1, adaptation=adaptation, precision=precision)
            case = cases.planned(folder / kind, config, ranks=ranks)
            standing = memory.memory(case).standing
            seen = [rank[f"{kind} {precision} {adaptation}"] for rank in found]
            for rank in seen:
                assert rank["weights"] == standing["weights"]
                # Buckets are padded so that they divide.
                assert standing["gradients"] <= rank["gradients"] < standing["gradients"] + 4 * 2048
            total = sum(rank["optimizer"] for rank in seen)
            assert total == pytest.approx(ranks * standing["optimizer"], rel=1e-6)


def test_the_models_have_norms_biases_ties_and_padding(folder: Path) -> None:
    """So a count without one of them would differ in the tests above."""
    for kind in KINDS:
        case = cases.planned(folder / kind, cases.run_config(), ranks=1)
        (stage,) = stages(case.sizes, case.layout)
        assert count(case.sizes, case.layout, stage, None).vocabulary == 256 * case.sizes.hidden
        assert (case.sizes.qk_norm, case.sizes.qkv_bias) == ("qwen3" in kind, kind == "qwen2")
        assert case.sizes.tied == (kind == "qwen3_tied")
