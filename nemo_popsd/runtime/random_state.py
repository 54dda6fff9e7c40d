"""Saving and restoring the state of every random generator of this process as tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

_TRACKER = "megatron/"


def capture_random_state() -> dict[str, Tensor]:
    """Return the state of the generators of Python, NumPy, torch (CPU and own device) and Megatron's tracker."""
    _, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python/gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy/keys": torch.from_numpy(np.asarray(keys, dtype=np.int64).copy()),
        "numpy/rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, value in get_cuda_rng_tracker().get_states().items():
        state[_TRACKER + name] = value.cpu()
    return state


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the state of all generators at the end of the context."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Restore a state that `capture_random_state` returned on the same rank of the same layout."""
    gauss = state["python/gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = state["numpy/rest"].tolist()
    keys = state["numpy/keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker = get_cuda_rng_tracker()
    saved = {name.removeprefix(_TRACKER): v for name, v in state.items() if name.startswith(_TRACKER)}
    tracker.set_states({**tracker.get_states(), **saved})
