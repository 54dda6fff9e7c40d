"""Cost of the chunked form: matrix products, memory, collectives, and the work that overlaps with them."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_popsd.distillation import (
    DiagnosedTokens,
    Divergence,
    MainGradient,
    Target,
    fusion,
    loss_from_hidden,
)
from nemo_popsd.distillation.products import share_storage
from nemo_popsd.parallel.vocabulary import mean_output_vector
from tests.distillation.calls import DIVERGENCES, diagnosed, hidden_loss, vectors_of, with_
from tests.distillation.dense import make_problem
from tests.harness import run_ranks

JSD, FORWARD, REVERSE = Divergence(), Divergence("forward_kl"), Divergence("reverse_kl")
CLIPPED = Divergence("forward_kl", clip=0.05)


# --- Products ---------------------------------------------------------------------------------------------------------


_PRODUCTS = ("mm", "addmm_", "addmm", "bmm")


class _Operations(TorchDispatchMode):
    """Counts operations and tracks live memory: the peak number of bytes and the largest single tensor."""

    def __init__(self, on_product=None) -> None:
        super().__init__()
        self._on_product = on_product
        self.count: Counter[str] = Counter()
        self.alive = 0
        self.peak = 0
        self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count[function.overloadpacket.__name__] += 1
        if self._on_product is not None and function.overloadpacket.__name__ in _PRODUCTS and result.ndim == 2:
            self._on_product()
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        size = storage.nbytes()
        self._known.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.alive -= size

    @property
    def products(self) -> int:
        return sum(self.count[name] for name in _PRODUCTS)


@pytest.mark.parametrize(
    ("target", "vectors"),
    [
        (Target.purified(), 2),
        (Target.purified(cap=None), 1),
        (Target.opsd(), 1),
        (Target.live_student_pmi(), 1),
    ],
    ids=["purified", "no cap", "opsd", "live student"],
)
@pytest.mark.parametrize("divergence", [JSD, FORWARD, REVERSE], ids=lambda d: d.kind)
def test_a_chunk_has_only_the_matrix_products_that_it_needs(target, vectors, divergence):
    """One per vector of the token, or one in total for a shared matrix; one more for dh and one more for dW.

    Frozen leaves need no product for dh or dW; statistics and diagnosed tokens need no additional product.
    """
    problem = make_problem(8)

    def products(*, dh: bool, dw: bool, grad: bool = True, **settings) -> int:
        with _Operations() as operations, torch.set_grad_enabled(grad):
            result, hidden, weight = hidden_loss(
                problem, target, divergence, dh=dh, dw=dw, chunk_tokens=7, centre=centre, **settings
            )
            if grad and (dh or dw):
                result.total.backward()
                assert (hidden.grad is not None) == dh
                assert (weight.grad is not None) == dw
            else:
                assert not result.total.requires_grad
        return operations.products

    centre = mean_output_vector(problem.teacher_weight, problem.vocab_shard())
    for shared, forward in ((False, 1 + vectors), (True, 1)):
        assert products(dh=True, dw=True, shared=shared) == forward + 2
        assert products(dh=True, dw=True, shared=shared, diagnosed=diagnosed(problem)) == forward + 2
        assert products(dh=True, dw=False, shared=shared) == forward + 1
        assert products(dh=False, dw=True, shared=shared) == forward + 1
        assert products(dh=False, dw=False, shared=shared) == forward
        assert products(dh=True, dw=True, grad=False, shared=shared) == forward


def test_a_shared_matrix_is_recognised_by_its_memory():
    matrix = torch.zeros(6, 4)
    assert share_storage(matrix, matrix.detach())
    assert share_storage(matrix[:5], matrix.view(6, 4)[:5])
    for other in (matrix.clone(), matrix[:5], matrix[1:], matrix.view(4, 6).t(), matrix.view(torch.int32)):
        assert not share_storage(matrix, other)


def test_lora_on_the_body_costs_no_memory_for_the_matrix():
    problem = make_problem(9, tokens=4, hidden=64, vocab=500, padded=512)
    with _Operations() as operations:
        result, _, _ = hidden_loss(problem, Target.purified(), JSD, dw=False, chunk_tokens=1)
        result.total.backward()
    assert operations.largest < problem.student_weight.untyped_storage().nbytes() + 1
    with _Operations() as operations:
        hidden_loss(with_(problem, student_weight=problem.student_weight), Target.purified(), JSD, dw=False)
    assert operations.count["zeros_like"] == 0


# --- Memory -----------------------------------------------------------------------------------------------------------


class _Peak(NamedTuple):
    peak: int
    largest: int
    kept: int


def memory(tokens: int, vocab: int, hidden: int, divergence, *, chunk=None, plant=None, main=True, **settings) -> _Peak:
    """Bytes allocated by one loss and its backward pass: at the peak, in the largest tensor, and afterwards."""
    problem = make_problem(10, tokens=tokens, hidden=hidden, vocab=vocab, padded=vocab).to(torch.float32)
    pair = vectors_of(problem, Target.purified())
    centre = mean_output_vector(problem.teacher_weight, problem.vocab_shard())
    states = problem.student.requires_grad_()
    weight = problem.student_weight.requires_grad_()
    main_gradient = MainGradient(torch.zeros_like(weight), 1.0) if main else None
    with _Operations() as operations:
        for tensor in (
            *pair,
            states,
            weight,
            problem.teacher_weight,
            problem.token_weights,
            centre,
            main_gradient and main_gradient.buffer,
        ):
            if tensor is not None:
                operations._follow(tensor.untyped_storage())
        before = operations.alive
        operations.largest = operations.peak = 0
        result = loss_from_hidden(
            states,
            weight,
            pair,
            problem.teacher_weight,
            target=Target.purified(),
            divergence=divergence,
            shard=problem.vocab_shard(),
            token_weights=problem.token_weights,
            chunk_tokens=chunk,
            centre=centre,
            main_gradient=main_gradient,
            **settings,
        )
        if plant is not None:
            plant(states, weight)
        result.total.backward()
    return _Peak(operations.peak - before, operations.largest, operations.alive - before)


@pytest.mark.parametrize(
    ("divergence", "diagnosing"),
    [
        (FORWARD, False),
        (REVERSE, True),
        (JSD, False),
        (JSD, True),
        pytest.param(FORWARD, True, marks=pytest.mark.slow),
        pytest.param(REVERSE, False, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.kind if isinstance(value, Divergence) else str(value),
)
def test_no_tensor_has_the_logits_of_all_tokens_and_the_peak_is_one_chunk(monkeypatch, divergence, diagnosing):
    """16 chunks: the peak is three buffers of one chunk, for every divergence, plus a tile of temporaries."""
    tokens, chunk, vocab, hidden = 512, 32, 2000, 8
    monkeypatch.setitem(fusion.TILE_BYTES, ("cpu", False), vocab * 4)
    index = torch.arange(0, 64, 4)
    states = torch.ones(len(index), hidden)
    settings = {"diagnosed": DiagnosedTokens(index, states, states)} if diagnosing else {}
    found = memory(tokens, vocab, hidden, divergence, chunk=chunk, **settings)
    one = chunk * vocab * 4
    buffers = 3.25 if diagnosing else 3  # eight of a chunk's 32 tokens are diagnosed
    tile = 12 * vocab * 4
    small = tokens * (hidden + 8 + 16) * 4 + 6 * chunk * hidden * 4
    print(f"peak {found.peak / one:.2f} buffers of one chunk, {found.peak / (tokens * vocab * 4):.3f} of all logits")
    assert found.largest <= buffers * one
    assert found.largest < tokens * vocab * 4 / 4
    assert found.peak <= buffers * one + small + tile
    assert found.peak > 3 * one  # the buffers are counted
    assert found.kept <= small


def test_a_planted_tensor_of_all_logits_is_detected():
    tokens, vocab = 64, 3000
    found = memory(tokens, vocab, 8, JSD, chunk=4, plant=lambda h, w: (h.detach() @ w.detach().T).sum())
    assert found.largest >= tokens * vocab * 4
    assert memory(tokens, vocab, 8, JSD, chunk=4).largest < tokens * vocab * 4 / 2


@pytest.mark.slow
def test_the_default_chunk_keeps_the_peak_within_the_stated_limit_at_any_number_of_tokens():
    """8,192 tokens in a shard of V entries, with H : V = 2048 : 19000; twice as many tokens add only [N, H]."""
    vocab, hidden = 950, 102
    logits = 8192 * vocab * 4
    peaks = {tokens: memory(tokens, vocab, hidden, FORWARD).peak for tokens in (8192, 16384)}
    print({tokens: f"{peak / logits:.2f} of the logits of 8192 tokens" for tokens, peak in peaks.items()})
    assert peaks[8192] <= 0.8 * logits
    assert memory(8192, vocab, hidden, FORWARD, main=False).peak <= 0.8 * logits
    per_token = (hidden * 2 + 16) * 4  # dh twice while it is scaled, losses and statistics
    assert peaks[16384] - peaks[8192] <= 8192 * per_token


# --- Collectives ------------------------------------------------------------------------------------------------------


def _count_collectives(rank: int, world_size: int):
    group = dist.new_group([0, 1])
    calls: list[tuple] = []
    counted_names = ("all_reduce", "all_gather")
    forbidden_names = ("all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "all_to_all", "barrier")

    def counting(name):
        real = getattr(dist, name)

        def counted(*tensors, group=None, **options):
            calls.append((name, tuple(tensors[-1].shape), group))
            return real(*tensors, group=group, **options)

        return counted

    def forbidden(*args, **kwargs):
        raise AssertionError("only all-reduces and all-gathers are allowed")

    for name in counted_names:
        setattr(dist, name, counting(name))
    for name in forbidden_names:
        setattr(dist, name, forbidden)
    found = {}
    mine = make_problem(12).shard(rank, world_size)
    centre = mean_output_vector(mine.teacher_weight, mine.vocab_shard(group))
    found["mean output vector"] = [shape for _, shape, _ in calls]
    for name, divergence in (("jsd", JSD), ("forward", FORWARD), ("reverse", REVERSE), ("clip", CLIPPED)):
        for dh in (True, False):
            for diagnosing in (False, True):
                for given in (True, False):
                    calls.clear()
                    result, _, _ = hidden_loss(
                        mine,
                        Target.purified(),
                        divergence,
                        group,
                        dh=dh,
                        diagnosed=diagnosed(mine, [1, 4]) if diagnosing else None,
                        centre=centre if given else None,
                    )
                    forward = [(kind, shape) for kind, shape, _ in calls]
                    calls_forward = len(calls)
                    result.total.backward()
                    backward = [(kind, shape) for kind, shape, _ in calls[calls_forward:]]
                    found[name, dh, diagnosing, given] = (forward, backward)
                    assert all(used is group for _, _, used in calls)
    # No tokens: no rank sends, no rank hangs.
    calls.clear()
    result, hidden, _ = hidden_loss(
        make_problem(13, tokens=0).shard(rank, world_size), Target.purified(), JSD, group, centre=centre
    )
    result.total.backward()
    found["no tokens"] = (list(calls), hidden.grad.shape)
    # If the student equals base and target, the loss is exactly 0 with several shards too.
    same = make_problem(14)
    same = with_(same, base=same.student, reference=same.privileged, student_weight=same.teacher_weight)
    exact = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for divergence in DIVERGENCES.values():
            result, hidden, weight = hidden_loss(
                same.to(dtype).shard(rank, world_size), Target.purified(), divergence, group
            )
            result.total.backward()
            exact.append(result.per_token.count_nonzero() + hidden.grad.count_nonzero() + weight.grad.count_nonzero())
    found["exact zeros"] = [int(count) for count in exact]
    return found


def test_the_collectives_are_those_that_the_docstring_states():
    """One per chunk for a KL, two for a JSD or with a clip; one for w̄ if not passed; one for dh in backward."""
    for found in run_ranks(_count_collectives, 2):
        assert found.pop("mean output vector") == [(8,)]
        assert found.pop("no tokens") == ([], (0, 8))
        assert found.pop("exact zeros") == [0] * 3 * len(DIVERGENCES)
        for (name, dh, diagnosing, given), (forward, backward) in found.items():
            case = (name, dh, diagnosing, given)
            if not given:
                assert forward.pop(0) == ("all_reduce", (8,)), case
            wanted = []
            for tokens, sample in ((3, 1), (3, 1), (1, 0)):  # 7 tokens in chunks of 3; tokens 1 and 4 are diagnosed
                wanted.append(("all_gather", (8 * tokens + 14 * sample * diagnosing,)))
                if name in ("jsd", "clip"):
                    wanted.append(("all_reduce", (2, tokens)))
            assert forward == wanted, case
            assert backward == ([("all_reduce", (7, 8))] if dh else []), case


# --- Overlap with collectives -----------------------------------------------------------------------------------------


def _order_of_work(rank: int, world_size: int):
    """Records products, and start and end of each collective, in order."""
    events: list[str] = []

    class Work:
        def __init__(self, work):
            self._work = work

        def wait(self):
            events.append("wait")
            return self._work.wait()

    def noting(name):
        real = getattr(dist, name)

        def started(*tensors, async_op=False, **options):
            if not async_op:
                return real(*tensors, **options)
            events.append(name)
            return Work(real(*tensors, async_op=True, **options))

        return started

    for name in ("all_reduce", "all_gather"):
        setattr(dist, name, noting(name))
    mine = make_problem(17).shard(rank, world_size)
    centre = mean_output_vector(mine.teacher_weight, mine.vocab_shard(dist.group.WORLD))
    found = {}
    for divergence in (FORWARD, JSD):
        for dw in (True, False):
            events.clear()
            with _Operations(on_product=lambda: events.append("product")):
                hidden_loss(mine, Target.purified(), divergence, dist.group.WORLD, dw=dw, shared=True, centre=centre)
            found[divergence.kind, dw] = " ".join(events)
    return found


def test_the_products_of_a_chunk_overlap_with_the_collectives_of_the_next():
    for found in run_ranks(_order_of_work, 2):
        gather, total = "all_gather", "all_reduce"
        for dw in (True, False):
            # 3 chunks: the logits of each, then its collective, which overlaps the previous chunk's gradients (dh, dW).
            products = "product product" if dw else "product"
            overlapped = f"product {gather} {products} wait"
            assert found["forward_kl", dw] == f"product {gather} wait {overlapped} {overlapped} {products}"
        overlapped = f"product {gather} product wait {total} product wait"
        first = f"product {gather} wait {total} wait"
        for dw in (True, False):  # without dW, dh is computed in two halves
            after = "product" if not dw else "product product"  # the last chunk has a single token: nothing to halve
            assert found["jsd", dw] == f"{first} {overlapped} {overlapped} {after}"
