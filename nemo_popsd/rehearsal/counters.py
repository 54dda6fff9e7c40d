"""Counts live bytes, floating-point operations, and collectives with their bytes, by phase of a step."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nemo_popsd.observability.stopwatch import Stopwatch


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _added_product(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * int(a[0] * a[1] * b[1])


def flop_counter() -> FlopCounterMode:
    """Torch's flop counter, extended by the CPU's attention kernel and in-place added products, which it omits.

    A multiply-add counts as two operations, and attention as the full square.
    """
    aten = torch.ops.aten
    kernels = {
        aten.addmm_: _added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


class Flops(TorchDispatchMode):
    """Counts operations in the context by torch's formulas.

    Torch's own counter tracks modules, which would keep tensors without storage alive.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._formulas = flop_counter().flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were allocated in the context and still exist, and their peak.

    Attributes:
        live: current bytes.
        peak: maximum bytes since the start, or since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._release, key)
        return result

    def freed(self, tensor: torch.Tensor) -> None:
        """Counts the memory of `tensor` as freed although the tensor still exists."""
        key = tensor.untyped_storage()._cdata
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@dataclass(frozen=True)
class Collective:
    """One kind of collective on one process group."""

    name: str
    """torch's name, such as ``allreduce_``."""
    group: str
    """Megatron's description of the process group, such as ``TENSOR_MODEL_PARALLEL_GROUP``."""
    ranks: int
    """Size of the group."""


class Collectives(TorchDispatchMode):
    """Counts collectives and sends in the context.

    Attributes:
        calls: number of calls.
        bytes: bytes of reduced or sent tensors, or of the full result of a gather.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Collective] = Counter()
        self.bytes: Counter[Collective] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            kind = func._schema.name.removeprefix("c10d::")
            what = Collective(kind, group.group_desc or "undefined", group.size())
            self.calls[what] += 1
            self.bytes[what] += max((_bytes(argument) for argument in args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(argument) if isinstance(t, torch.Tensor))


@dataclass
class Cost:
    """Measured cost of a phase or of a span of the work."""

    peak: int = 0
    """Peak of live bytes: all of them for a phase, the added ones for a span."""
    left: int = 0
    """Bytes at the end of a span that did not exist at its beginning."""
    flops: int = 0
    """Number of operations."""
    calls: Counter[Collective] = field(default_factory=Counter)
    """Number of calls by collective."""
    bytes: Counter[Collective] = field(default_factory=Counter)
    """Bytes by collective."""


@dataclass(frozen=True)
class Span:
    """State of a meter at the beginning of a span."""

    live: int
    """Bytes alive."""
    peak: int
    """Peak of live bytes so far."""
    flops: int
    """Operations so far."""
    calls: Counter[Collective]
    """Collectives so far."""
    bytes: Counter[Collective]
    """Bytes of collectives so far."""


class Meter:
    """Measures cost by phase; the parts of a step call `phase` through `MeteredStopwatch`."""

    def __init__(self) -> None:
        self.live = LiveBytes()
        self._flops = Flops()
        self._collectives = Collectives()
        self.phases: defaultdict[str, Cost] = defaultdict(Cost)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Context in which everything is counted."""
        with self.live, self._collectives, self._flops:
            yield

    def begin(self) -> Span:
        """Begins a span; spans nest."""
        live, sent = self.live, self._collectives
        span = Span(live.live, live.peak, self._flops.total, sent.calls.copy(), sent.bytes.copy())
        live.peak = live.live
        return span

    def end(self, span: Span) -> Cost:
        """Cost since `span` began."""
        live, sent = self.live, self._collectives
        cost = Cost(
            peak=live.peak - span.live,
            left=live.live - span.live,
            flops=self._flops.total - span.flops,
            calls=sent.calls - span.calls,
            bytes=sent.bytes - span.bytes,
        )
        live.peak = max(live.peak, span.peak)
        return cost

    def repeat(self, cost: Cost) -> None:
        """Adds the cost of a span once more, without the bytes left at its end."""
        self.live.peak = max(self.live.peak, self.live.live + cost.peak)
        self._flops.total += cost.flops
        self._collectives.calls += cost.calls
        self._collectives.bytes += cost.bytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose cost is added to the phase `name`."""
        span = self.begin()
        yield
        cost, total = self.end(span), self.phases[name]
        total.peak = max(total.peak, span.live + cost.peak)
        total.flops += cost.flops
        total.calls += cost.calls
        total.bytes += cost.bytes


class MeteredStopwatch(Stopwatch):
    """The stopwatch of a step, which also measures its phases."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times and measures the phase `name`."""
        with super().phase(name), self._meter.phase(name):
            yield
