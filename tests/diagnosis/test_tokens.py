"""The decomposition, the push and the alternatives against dense formulas, with one shard and with two; memory."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_popsd.diagnosis.push import COMPONENTS, VocabularyPush
from nemo_popsd.diagnosis.tokens import DISTRIBUTIONS, BranchStates, diagnose_tokens
from nemo_popsd.distillation import Target
from nemo_popsd.distillation.decomposition import SIGNAL_PRODUCTS
from nemo_popsd.distillation.statistics import SIGNAL_STATISTICS, TOKEN_STATISTICS
from nemo_popsd.errors import UserError
from nemo_popsd.parallel.vocabulary import VocabShard
from tests.distillation.dense import log_probs, make_problem, relative, target_log_probs
from tests.harness import run_ranks

TARGETS = {
    "purified": Target.purified(temperature=1.3),
    "no cap": Target.purified(beta=2.0, cap=None),
    "opsd": Target.opsd(),
    "live": Target.live_student_pmi(cap=3.0),
    "contrast": Target.contrast(0.5),
}
ALTERNATIVES = 20  # more than a shard of 16 holds
TOKENS = torch.tensor([0, 28, 3, 15, 16, 17, 28])


def diagnosed(problem, target, group=None, *, chunk=3, alternatives=ALTERNATIVES):
    shard = problem.vocab_shard(group)
    push = VocabularyPush(shard, torch.device("cpu"))
    states = BranchStates(problem.student, problem.base, problem.privileged, problem.reference)
    found, largest = diagnose_tokens(
        states,
        TOKENS,
        problem.student_weight,
        problem.teacher_weight,
        target=target,
        shard=shard,
        push=push,
        alternatives=alternatives,
        chunk_tokens=chunk,
    )
    return found, largest, push


def dense_distributions(problem, target):
    student = log_probs(problem.student, problem.student_weight, problem.vocab, target.temperature)
    frozen = [
        log_probs(hidden, problem.teacher_weight, problem.vocab, target.temperature)
        for hidden in (problem.base, problem.privileged, problem.reference)
    ]
    return student, *frozen, target_log_probs(problem, target, student)


def errors(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of each field, push and alternative over all targets."""
    problem = make_problem(3).to(dtype)
    group = dist.group.WORLD if world_size > 1 else None
    worst: dict[str, float] = {}
    for target in TARGETS.values():
        student, base, teacher, reference_only, goal = dense_distributions(problem.to(torch.float64), target)
        total, induced, question = teacher - student, reference_only - student, teacher - reference_only
        deltas = dict(zip(COMPONENTS, (total, induced, question, goal - student), strict=True))
        at = lambda x: x.gather(1, TOKENS[:, None]).squeeze(1)  # noqa: E731
        p, q = student.exp(), goal.exp()
        want = {
            "norm_ratio": induced.norm(dim=-1) / total.norm(dim=-1),
            "cosine_question": cosine_similarity(total, question, dim=-1),
            "cosine_reference": cosine_similarity(total, induced, dim=-1),
            "student_entropy": -(p * student).sum(-1),
            "target_entropy": -(q * goal).sum(-1),
            "forward_kl": (q * (goal - student)).sum(-1),
            "reverse_kl": (p * (student - goal)).sum(-1),
            "log_student": at(student),
            "log_base": at(base),
            "log_privileged": at(teacher),
            "log_reference": at(reference_only),
            "log_target": at(goal),
        }
        found, largest, push = diagnosed(problem.shard(rank, world_size), target, group)
        assert sorted(want) == sorted(found.columns())
        every = push.look_up(torch.arange(problem.vocab))
        want["mass"] = p.sum(0)
        got = {**found.columns(), "mass": every.mass}
        for row, (name, delta) in enumerate(deltas.items()):
            want[name] = (p * (delta - (p * delta).sum(-1, keepdim=True))).sum(0)
            got[name] = every.push[row]
            dense_most = want[name].topk(5)
            promoted, suppressed = (lists[row] for lists in push.extremes(5))
            assert promoted.ids.tolist() == dense_most.indices.tolist()
            assert suppressed.ids.tolist() == (-want[name]).topk(5).indices.tolist()
            torch.testing.assert_close(promoted.push[row], dense_most.values, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(promoted.mass, want["mass"][promoted.ids], rtol=1e-4, atol=1e-6)
        for row, x in enumerate((student, base, teacher, reference_only, goal)):
            dense_best = x.topk(ALTERNATIVES)
            assert torch.equal(largest.ids[row], dense_best.indices), DISTRIBUTIONS[row]
            want[f"{DISTRIBUTIONS[row]} alternatives"] = dense_best.values
            got[f"{DISTRIBUTIONS[row]} alternatives"] = largest.log_probs[row]
        for name, value in want.items():
            assert got[name].dtype in (dtype, torch.float64)
            worst[name] = max(worst.get(name, 0.0), relative(got[name], value))
    return worst


def errors_by_precision(rank: int, world_size: int) -> dict[torch.dtype, dict[str, float]]:
    return {dtype: errors(rank, world_size, dtype) for dtype in (torch.float64, torch.float32)}


def check(found: dict[torch.dtype, dict[str, float]]) -> None:
    assert {name: e for name, e in found[torch.float64].items() if e > 1e-10} == {}
    assert {name: e for name, e in found[torch.float32].items() if e > 3e-5} == {}


def test_all_figures_agree_with_dense_formulas() -> None:
    check(errors_by_precision(0, 1))


@pytest.mark.slow
def test_all_figures_agree_with_dense_formulas_in_shards() -> None:
    for found in run_ranks(errors_by_precision, 2):
        check(found)


def shard_of_padding(rank: int, world_size: int) -> tuple[list[list[int]], list[int]]:
    """Vocabulary 12 of 4 x 8 rows: rank 1 holds half of it, ranks 2 and 3 padding alone."""
    problem = make_problem(4, vocab=12)
    problem = type(problem)(**{**vars(problem), "vocab": 12}).shard(rank, world_size)
    shard = problem.vocab_shard(dist.group.WORLD)
    push = VocabularyPush(shard, torch.device("cpu"))
    states = BranchStates(problem.student, problem.base, problem.privileged, problem.reference)
    _, largest = diagnose_tokens(
        states,
        torch.zeros(7, dtype=torch.long),
        problem.student_weight,
        problem.teacher_weight,
        target=Target.purified(),
        shard=shard,
        push=push,
        alternatives=12,
    )
    promoted, _ = push.extremes(12)
    return largest.ids[0].tolist(), promoted[0].ids.tolist()


@pytest.mark.slow
def test_shards_that_hold_only_padding_are_supported() -> None:
    results = run_ranks(shard_of_padding, 4)
    assert all(result == results[0] for result in results)
    alternatives, promoted = results[0]
    assert all(sorted(row) == list(range(12)) for row in alternatives)
    assert sorted(promoted) == list(range(12))


def test_identities() -> None:
    problem = make_problem(5)
    found, _, push = diagnosed(problem, Target.purified())
    torch.testing.assert_close(push.push.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(push.push[0], push.push[1] + push.push[2])
    torch.testing.assert_close(push.mass.sum(), torch.tensor(7.0, dtype=torch.float64))
    assert push.tokens == 7
    same = type(problem)(**{**vars(problem), "reference": problem.privileged, "student": problem.base})
    same = type(same)(**{**vars(same), "student_weight": same.teacher_weight})
    found, _, push = diagnosed(same, Target.purified())  # no PMI: the target is the base, which is the student
    assert found.statistics["forward_kl"].abs().max() < 1e-14
    torch.testing.assert_close(found.signal["norm_ratio"], torch.ones(7, dtype=torch.float64))
    assert push.push[COMPONENTS.index("target")].abs().max() < 1e-14
    assert found.signal["cosine_question"].isnan().all()  # Δ_it is 0


def test_chunks_change_nothing_and_no_tokens_give_nothing() -> None:
    problem = make_problem(6)
    small, _, a = diagnosed(problem, Target.purified(), chunk=2)
    large, _, b = diagnosed(problem, Target.purified(), chunk=100)
    for name, column in small.columns().items():
        torch.testing.assert_close(column, large.columns()[name])
    torch.testing.assert_close(a.push, b.push)
    none = BranchStates(*(problem.student[:0] for _ in range(4)))
    push = VocabularyPush(problem.vocab_shard(), torch.device("cpu"))
    found, largest = diagnose_tokens(
        none,
        TOKENS[:0],
        problem.student_weight,
        problem.teacher_weight,
        target=Target.purified(),
        shard=problem.vocab_shard(),
        push=push,
        alternatives=2,
    )
    assert all(column.shape == (0,) for column in found.columns().values())
    assert largest is not None
    assert largest.ids.shape == (5, 0, 2)
    assert push.tokens == 0


def test_a_vocabulary_that_does_not_fit_is_refused_by_name() -> None:
    problem = type(make_problem())(**{**vars(make_problem()), "vocab": 40})
    with pytest.raises(UserError, match="vocab_size=40"):
        diagnosed(problem, Target.purified())


class LiveTensors(TorchDispatchMode):
    """The largest tensor that an operation returns, and the most elements alive at one time, both without inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self._known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() // max(tensor.element_size(), 1)
                self.largest = max(self.largest, tensor.numel())
                if key not in self._known:
                    self._known.add(key)
                    self.alive += size
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._freed, key, size)
        return result


def test_no_tensor_has_all_tokens_and_the_full_vocabulary() -> None:
    tokens, vocab, chunk = 320, 2000, 8
    problem = make_problem(7, tokens=tokens, vocab=vocab, padded=2048).to(torch.float32)
    push = VocabularyPush(VocabShard(vocab, 2048), torch.device("cpu"))
    states = BranchStates(problem.student, problem.base, problem.privileged, problem.reference)
    ids = torch.arange(tokens)
    with LiveTensors() as seen:
        diagnose_tokens(
            states,
            ids,
            problem.student_weight,
            problem.teacher_weight,
            target=Target.purified(),
            shard=VocabShard(vocab, 2048),
            push=push,
            alternatives=8,
            chunk_tokens=chunk,
        )
    assert chunk * vocab <= seen.largest <= chunk * 2048
    inputs = sum(x.numel() for x in (*states, problem.student_weight, problem.teacher_weight))
    found = tokens * (SIGNAL_PRODUCTS + len(SIGNAL_STATISTICS) + len(TOKEN_STATISTICS) + 5 + 2 * len(DISTRIBUTIONS) * 8)
    buffers = (seen.peak - inputs - push.push.numel() - found) / (chunk * vocab)
    print(f"peak {buffers:.1f} buffers of one chunk, of {tokens // chunk}")
    assert 5 < buffers < 13
