"""Refusals, nearest layouts, and how the numbers depend on layouts for which no test allocates the objects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_popsd.config.schema import PopsdConfig
from nemo_popsd.planning import compute, memory, report, traffic
from nemo_popsd.planning.config import PlanConfig
from nemo_popsd.planning.layout import Layout, misfits
from nemo_popsd.planning.parameters import Stage, count, stages, total_parameters
from nemo_popsd.planning.plan import _distance, estimate, fastest, nearest, problems
from nemo_popsd.planning.settings import split_settings
from nemo_popsd.planning.sizes import read_sizes
from nemo_popsd.planning.workload import frozen_branches
from tests.planning.cases import case


@pytest.mark.parametrize(
    ("family", "diagnosed", "weight", "branches"),
    [
        ("purified", 0, 0.5, ("base", "privileged", "reference")),
        ("opsd", 0, 0.5, ("privileged",)),
        ("opsd", 5, 0.5, ("privileged", "reference")),
        ("beta_opsd", 0, 0.0, ("base",)),
        ("beta_opsd", 0, 0.5, ("base", "privileged")),
        ("beta_opsd", 0, 1.0, ("privileged",)),
        ("student_pmi", 0, 0.5, ("privileged", "reference")),
        ("wrong_reference", 0, 0.5, ("privileged", "privileged")),
    ],
)
def test_branches_are_those_of_the_target_by_the_context_that_each_reads(
    family: str, diagnosed: int, weight: float, branches: tuple[str, ...]
) -> None:
    settings = PopsdConfig().distillation
    settings.target.family, settings.target.weight, settings.diagnosed_tokens = family, weight, diagnosed
    assert frozen_branches(settings) == branches


@pytest.mark.parametrize(
    ("settings", "bytes_of_sums"),
    [
        (["distillation.target.family=purified"], 4),
        (["distillation.target.family=purified", "distillation.target.cap=null"], 4),
        (["distillation.target.family=opsd"], 0),
        (["distillation.target.family=beta_opsd"], 4),
        (["distillation.target.family=wrong_reference"], 4),
    ],
)
def test_frozen_states_hold_the_fp32_sums_of_the_target(settings: list[str], bytes_of_sums: int) -> None:
    """An anchor that is a sum of branches is a new fp32 vector; one branch's own states are not copied."""
    planned = case("Qwen3-8B", "distillation.diagnosed_tokens=0", *settings)
    found = memory.memory(planned).phases["frozen"]["frozen states"]
    per_token = planned.sizes.hidden * (len(planned.branches) * planned.element + bytes_of_sums)
    assert found == planned.owned_rows * planned.limits.response * per_token


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 3}, "32 query heads do not divide by parallel.tensor=3"),
        ({"tensor": 16}, "8 key-value heads do not divide by parallel.tensor=16"),
        ({"pipeline": 5}, "36 layers do not divide"),
        ({"pipeline": 4, "virtual_pipeline": 2}, "36 layers do not divide by pipeline·virtual_pipeline=8"),
        ({"pipeline": 4, "last_stage_layers": 4}, "36 layers do not divide by parallel.pipeline=4 with"),
        ({"last_stage_layers": 4}, "36 layers do not divide by parallel.pipeline=1 with"),
        ({"context": 16}, "8 GPUs do not divide by tensor·pipeline·context=16"),
        ({"expert": 2}, "a model that has no experts"),
        ({"sequence": True}, "needs parallel.tensor above 1"),
        ({"virtual_pipeline": 2}, "needs parallel.pipeline above 1"),
    ],
)
def test_misfits_are_reported_with_both_numbers(layout: dict[str, Any], message: str) -> None:
    found = misfits(case(**layout).layout, read_sizes("Qwen3-8B")[0], 32)
    assert any(message in line for line in found), found


def test_settings_of_the_optimizer_change_the_planned_bytes() -> None:
    full = ("student.adaptation=full", "student.frozen_copy=host")
    plain, aware, low, host = (
        memory.memory(case("Qwen3-8B", *full, *settings))
        for settings in (
            [],
            ["optimizer.state_dtype=bf16"],
            ["optimizer.grad_dtype=bf16"],
            ["optimizer.host_share=0.75"],
        )
    )
    assert aware.standing["optimizer"] == pytest.approx(plain.standing["optimizer"] * 8 / 12)
    assert low.standing["gradients"] == plain.standing["gradients"] / 2
    assert host.standing["optimizer"] == pytest.approx(plain.standing["optimizer"] / 4)
    assert host.host - plain.host == pytest.approx(plain.standing["optimizer"] * 3 / 4)
    halved = [
        traffic.step(case("Qwen3-8B", *full, f"optimizer.grad_dtype={dtype}"), from_host=0.0).training.data
        for dtype in ("fp32", "bf16")
    ]
    assert halved[1] == pytest.approx(halved[0] * 4 / 6)  # the gather of bf16 weights is the same


def test_fp8_takes_memory_and_saves_time_in_its_passes_alone() -> None:
    def planned(*settings: str) -> Any:
        return estimate(case("Qwen3-8B", *settings))

    off = planned()
    linears = 36 * (4096 * (32 + 16) * 128 + 4096 * 4096 + 3 * 4096 * 12288)
    seconds = {}
    for name, bytes_of_each in (("frozen", 1), ("rollouts", 1), ("training", 2)):
        on = planned(f"fp8.{name}=true")
        assert on.memory.standing["quantised weights"] == bytes_of_each * linears
        phase = name.removesuffix("s") if name == "rollouts" else name
        for other in ("rollout", "frozen", "training"):
            before, after = (getattr(found.seconds, other).compute for found in (off, on))
            assert after < before if other == phase else after == before, (name, other)
        seconds[name] = getattr(on.seconds, phase).compute / getattr(off.seconds, phase).compute
    assert off.memory.standing["quantised weights"] == 0
    assert all(1 / 1.5 < seconds[name] < 0.8 for name in ("frozen", "training")), "attention and loss stay"
    both = planned("student.adaptation=full", "fp8.frozen=true", "fp8.training=true", "parallel.tensor=2")
    assert both.memory.standing["quantised weights"] == 3 * linears / 2
    ends = planned("fp8.frozen=true", "fp8.num_layers_at_end_in_bf16=9")
    assert ends.memory.standing["quantised weights"] == linears * 27 / 36
    assert seconds["frozen"] < ends.seconds.frozen.compute / off.seconds.frozen.compute < 1


def test_fp8_that_would_be_refused_is_a_problem() -> None:
    on = "fp8.frozen=true"
    assert problems(case("Qwen3-4B", on, tensor=2)) == problems(case("Qwen3-4B", tensor=8)) == []
    narrow = problems(case("Qwen3-4B", on, tensor=8))
    assert [line.split()[0] for line in narrow] == ["linear_fc2"], narrow
    assert "1216 x 2560 on a rank is not a multiple of 128" in narrow[0]
    assert problems(case("Qwen3-4B", on, "fp8.recipe=tensorwise", tensor=8)) == []
    assert problems(case("Qwen3-30B-A3B", on)) == ["fp8.frozen=true needs a dense model"]


def test_a_state_is_sharded_by_default_from_two_ranks() -> None:
    one, eight, off = (
        memory.memory(case("Qwen3-8B", *settings, plan=PlanConfig(gpus_per_node=gpus))).standing["optimizer"]
        for gpus, settings in ((1, []), (8, []), (8, ["optimizer.distributed=false"]))
    )
    assert one == off == pytest.approx(8 * eight)


def test_overlap_hides_communication_behind_arithmetic() -> None:
    full = ("student.adaptation=full", "training.updates_per_step=2")
    overlap = "optimizer.overlap_grad_reduce=true"
    plain, gradients, weights = (
        estimate(case("Qwen3-8B", *full, *settings)).seconds.training
        for settings in ([], [overlap], [overlap, "optimizer.overlap_param_gather=true"])
    )
    assert plain.communication > gradients.communication > weights.communication > 0
    assert plain.compute == gradients.compute == weights.compute
    stages = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    waiting, sending = (
        estimate(case("Qwen3-8B", *stages, f"parallel.overlap_transfers={on}")).seconds.training.communication
        for on in ("false", "true")
    )
    assert sending < waiting


def test_fewer_layers_on_the_last_stage_make_room_for_its_loss() -> None:
    """The stage with the most work counts: of even stages the last one, which has the loss."""
    even, uneven = (
        estimate(case("Qwen3-8B", "student.adaptation=full", "parallel.pipeline=2", *settings))
        for settings in ([], ["parallel.last_stage_layers=17"])
    )
    assert even.flops.training.head > 0
    assert uneven.flops.training.head == 0, "19 layers are more than 17 and the loss"
    assert uneven.flops.training.needed < even.flops.training.needed
    assert uneven.seconds.training.compute < even.seconds.training.compute
    assert all(problems(uneven.case.replace(changes)) == [] for changes, _ in nearest(uneven.case))
    assert report.shape(uneven.case).startswith("PP2·stages of 19-17·DP4")
    four = replace(even.case.layout, pipeline=4, last_stage_layers=6)
    built = stages(even.case.sizes, four)
    assert [(stage.layers, stage.first, stage.last) for stage in built] == [(10, True, False), (6, False, True)]
    built = stages(even.case.sizes, replace(four, first_stage_layers=6, last_stage_layers=0))
    assert [stage.layers for stage in built] == [6, 10, 10]


def test_recomputation_trades_memory_for_operations() -> None:
    selective = ["student.recompute=selective", "student.recompute_modules=[core_attn,mlp]"]
    block = ["student.recompute=full", "student.recompute_method=block", "student.recompute_layers=18"]
    units = ["student.recompute=full", "student.recompute_layers=4"]
    kept, operations = [], []
    for settings in (["student.recompute=none"], block, selective, ["student.recompute=full"]):
        found = estimate(case("Qwen3-8B", *settings))
        kept.append(found.memory.phases["training"]["activations"])
        operations.append(found.flops.training.counted)
    assert kept == sorted(kept, reverse=True)
    assert operations[0] < min(operations[1:3]) <= max(operations[1:3]) < operations[3]
    stage = Stage(36, first=True, last=True)
    whole, grouped = (memory.activation_bytes(case("Qwen3-8B", *s), stage) for s in (["student.recompute=full"], units))
    layers = memory.kept_by_layer(case("Qwen3-8B")).per_rank(case("Qwen3-8B"))
    assert layers > 27 / 3 * case("Qwen3-8B").sizes.hidden, "three more layers against 27 inputs fewer"
    assert grouped > whole


def test_prompts_and_mixtures_that_do_not_divide_are_reported() -> None:
    assert misfits(case(nodes=3).layout, read_sizes("Qwen3-8B")[0], 32) == [
        "32 prompts of a step (training.prompts_per_step) do not divide by data-parallel ranks=24"
    ]
    mixture = read_sizes("Qwen3-30B-A3B")[0]
    layout = Layout(nodes=1, gpus_per_node=8, tensor=2)
    assert misfits(layout, mixture, 32) == ["experts with parallel.tensor=2 need parallel.sequence=auto"]
    assert misfits(replace(layout, sequence=True, expert=4), mixture, 32) == []
    assert misfits(replace(layout, sequence=True, expert=3), mixture, 32)[0].startswith("8 GPUs do not divide")
    split = replace(layout, sequence=True, expert=4, expert_tensor=2)
    assert misfits(split, mixture, 32) == []
    assert misfits(replace(split, expert_tensor=4), mixture, 32) == [
        "8 GPUs do not divide by pipeline·expert·expert_tensor=16",
        "2 tensor-parallel ranks do not divide by parallel.expert_tensor=4",
    ]
    whole = replace(split, expert=1, expert_tensor=1)
    assert misfits(whole, mixture, 32) == ["parallel.expert_tensor=1 needs parallel.expert above 1"]


def test_parts_of_experts_take_less_memory_and_send_more() -> None:
    """Two ranks have the experts of one, each with half of their columns."""
    whole = case("Qwen3-30B-A3B", "student.adaptation=full", tensor=2, sequence=True, expert=4)
    split = case("Qwen3-30B-A3B", "student.adaptation=full", tensor=2, sequence=True, expert=4, expert_tensor=2)
    of_whole, of_split = (
        count(each.sizes, each.layout, stages(each.sizes, each.layout)[0], None) for each in (whole, split)
    )
    assert 2 * of_split.experts == of_whole.experts
    assert report.shape(split) == "TP2·EP4·ETP2·SP·DP4 distributed"
    assert of_split.dense == of_whole.dense
    assert (whole.layout.expert_replicas, split.layout.expert_replicas) == (2, 1)
    assert (whole.layout.sharing_replicas, split.layout.sharing_replicas) == (2, 4)
    assert (whole.generated_rows, split.generated_rows) == (2 * whole.rows, 4 * whole.rows)
    assert replace(whole.layout, expert=2).sharing_replicas == replace(whole.layout, expert=1).sharing_replicas == 1
    assert compute.layer_weights(whole) == compute.layer_weights(split), "as many visits of half of the columns"
    assert traffic.expert_forward(split, 100) == pytest.approx(traffic.expert_forward(whole, 100) * (0.75 + 1) / 0.75)


def test_the_nearest_layouts_fit_differ_and_are_ordered_by_distance() -> None:
    requested = case("Qwen3-8B", "student.adaptation=full")
    (reason,) = problems(requested)
    assert "GiB per GPU of 73.2 GiB" in reason
    layouts = nearest(requested)
    assert len(layouts) == 4
    assert len({str(changes) for changes, _ in layouts}) == 4
    distances = [_distance(requested, changes) for changes, _ in layouts]
    assert distances == sorted(distances)
    for changes, result in layouts:
        assert changes
        assert result.fits
        assert problems(requested.replace(changes)) == []
        assert result.memory == estimate(requested.replace(changes)).memory


def test_the_fastest_is_no_slower_than_the_nearest() -> None:
    requested = case("Qwen3-8B", "student.adaptation=full")
    best = fastest(requested)
    assert best is not None
    assert best[1].fits
    assert all(best[1].seconds.total <= result.seconds.total for _, result in nearest(requested, limit=50))
    small = PlanConfig(gpus_per_node=1)
    assert fastest(case("DeepSeek-R1-Distill-Llama-70B", plan=small)) is None
    assert nearest(case("DeepSeek-R1-Distill-Llama-70B", plan=small)) == []


@pytest.mark.parametrize("model", ["Qwen3-4B", "Qwen3-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"pipeline": 4}, {"tensor": 2, "sequence": True}, {"tensor": 4}])
def test_shares_of_the_ranks_add_up_to_the_model(model: str, layout: dict[str, Any]) -> None:
    one, many = case(model), case(model, **layout)
    (only_stage,) = stages(one.sizes, one.layout)
    alone = count(one.sizes, one.layout, only_stage, None)
    parts = [count(many.sizes, many.layout, stage, None) for stage in stages(many.sizes, many.layout)]
    sizes, pipeline, tensor = many.sizes, many.layout.pipeline, many.layout.tensor
    # A middle stage is a first one without the embedding; a tied matrix is on the first and the last.
    total = sum(part.model for part in parts) + max(0, pipeline - 2) * (parts[0].model - parts[0].vocabulary)
    copies = (tensor - 1) * (sizes.layers * (2 * sizes.hidden + 2 * sizes.head_dim + sizes.hidden * sizes.experts))
    copies += (tensor - 1) * sizes.hidden + (parts[0].vocabulary * tensor if sizes.tied and pipeline > 1 else 0)
    padding = parts[0].vocabulary * tensor - alone.vocabulary
    assert total * tensor == alone.model + copies + padding * (1 if sizes.tied and pipeline == 1 else 2)


@pytest.mark.parametrize("layout", [{"tensor": 4}, {"pipeline": 4}, {"context": 4}, {"tensor": 2, "context": 2}])
def test_operations_are_divided_over_ranks(layout: dict[str, Any]) -> None:
    """Four times as many ranks for the same rows: a quarter of the layers' operations each."""
    one, four = case(plan=PlanConfig(gpus_per_node=1)), case(plan=PlanConfig(gpus_per_node=4), **layout)
    assert one.rows == four.rows == 32
    for phase in ("frozen", "training"):
        alone, part = (getattr(compute.step(c), phase) for c in (one, four))
        assert part.linear == pytest.approx(alone.linear / 4, rel=2e-3)
        assert part.attention == pytest.approx(alone.attention / 4)
    assert compute.step(four).rollout.linear == pytest.approx(compute.step(one).rollout.linear / 4)


def test_bytes_are_sent_for_each_dimension_of_the_layout() -> None:
    zero = traffic.step(case(), from_host=0.0)
    assert (zero.frozen.tensor, zero.frozen.context, zero.frozen.pipeline, zero.frozen.expert) == (0, 0, 0, 0)
    assert zero.training.data > 0
    split = traffic.step(case("Qwen3-30B-A3B", tensor=2, sequence=True, context=2, pipeline=2, expert=2), from_host=0.0)
    assert min(split.frozen.tensor, split.frozen.context, split.frozen.pipeline, split.frozen.expert) > 0
    replicated, distributed = (
        traffic.step(case("Qwen3-8B", f"optimizer.distributed={on}"), from_host=0.0) for on in ("false", "true")
    )
    # All-reduce in fp32 against reduce-scatter in fp32 and all-gather in bf16.
    assert distributed.training.data == pytest.approx(replicated.training.data * 6 / 8)
    assert distributed.weight_gather == pytest.approx(replicated.training.data * 2 / 8)


def test_a_copy_on_the_host_leaves_its_output_matrix_and_comes_in_once() -> None:
    device, host = (
        estimate(case("Qwen3-8B", "student.adaptation=full", f"student.frozen_copy={place}", tensor=4))
        for place in ("device", "host")
    )
    matrix = 2 * 152064 * 4096 / 4
    assert host.memory.standing["frozen copy"] == matrix
    assert host.memory.host == device.memory.standing["frozen copy"] - matrix == host.traffic.from_host
    assert host.memory.peak("frozen") == pytest.approx(device.memory.peak("frozen"))
    assert host.memory.peak("training") == pytest.approx(device.memory.peak("training") - host.memory.host)
    assert host.seconds.frozen.total > device.seconds.frozen.total


def test_several_updates_and_states_on_the_host() -> None:
    one, four = (estimate(case("Qwen3-8B", f"training.updates_per_step={u}")) for u in (1, 4))
    assert four.traffic.training.data == 4 * one.traffic.training.data
    assert four.memory.peak("training") < one.memory.peak("training")
    away = estimate(case("Qwen3-8B", "training.cache_on_host=true"))
    states = one.memory.phases["training"]["frozen states"]
    assert states == away.memory.host > 0
    assert one.memory.peak("training") - away.memory.peak("training") == pytest.approx(states)
    assert away.traffic.from_host == 0


def test_a_server_takes_its_share_of_the_gpu_for_as_long_as_it_is_awake() -> None:
    server = ["rollout.engine=vllm", "rollout.vllm.python=python", "rollout.vllm.memory_share=0.3"]
    sleeps, awake, ahead, elsewhere = (
        estimate(case("Qwen3-8B", *server, *words))
        for words in (
            [],
            ["rollout.vllm.sleep=false"],
            ["rollout.overlap=true"],
            ["rollout.overlap=true", "rollout.vllm.launcher=[srun]"],
        )
    )
    own = estimate(case("Qwen3-8B"))
    share = 0.3 * own.case.plan.hardware.memory_gib * 2**30
    standing = sum(own.memory.standing.values())
    assert sleeps.memory.peak("rollout") == pytest.approx(standing + share)
    assert elsewhere.memory.peak("rollout") == standing
    for phase in ("frozen", "training"):
        assert sleeps.memory.peak(phase) == elsewhere.memory.peak(phase) == own.memory.peak(phase)
        assert awake.memory.peak(phase) == ahead.memory.peak(phase) == pytest.approx(own.memory.peak(phase) + share)
    for shared in (sleeps, ahead):  # on shared GPUs the two compete
        assert shared.seconds.total == pytest.approx(own.seconds.total)
    assert elsewhere.seconds.total == max(
        own.seconds.rollout.total, own.seconds.frozen.total + own.seconds.training.total
    )


def test_an_exact_cache_counts_in_addition_to_the_weights() -> None:
    words = [
        "rollout.engine=vllm",
        "rollout.vllm.python=python",
        "rollout.vllm.cache_bytes=1000000",
        "rollout.vllm.tensor=2",
    ]
    result = estimate(case("Qwen3-8B", *words, tensor=2))
    assert result.memory.phases["rollout"]["vLLM"] == total_parameters(result.case.sizes) * 2 / 2 + 1_000_000


def test_pipeline_stages_keep_several_micro_batches_and_wait() -> None:
    flat, staged = case("Qwen3-32B", tensor=4), case("Qwen3-32B", tensor=4, pipeline=2)
    first, last = stages(staged.sizes, staged.layout)
    assert staged.microbatches > 2
    # Half of the layers each, twice the micro-batches on the first.
    layers = memory.activation_bytes(staged, first) - memory.activation_bytes(staged, last)
    assert layers == pytest.approx(staged.microbatch_tokens * 2 * 32 * staged.sizes.hidden)
    assert estimate(staged).seconds.training.bubble > 0 == estimate(flat).seconds.training.bubble


def test_settings_of_the_plan_and_of_the_run_are_separated() -> None:
    plan, rest = split_settings(["nodes=1,2,4", "training.steps=3", "hardware.memory_gib=141", "gpus_per_node=4"])
    assert (plan.nodes, plan.gpus_per_node, plan.hardware.memory_gib) == ([1, 2, 4], 4, 141)
    assert rest == ["training.steps=3"]


def test_local_layers_of_a_run_are_planned_as_plain_layers() -> None:
    plain = PlanConfig()
    plain.workload.layers = "plain"
    keep = "student.recompute=none"
    planned = estimate(case("Qwen3-8B", keep, plan=plain)).memory
    assert estimate(case("Qwen3-8B", keep, "student.layers=local")).memory == planned
    assert estimate(case("Qwen3-8B", keep)).memory.peak("training") < planned.peak("training")
