"""Seeds, determinism, and the state of random generators.

Training itself draws nothing from a generator: weights, data order and recycle routing are functions of the
experiment's seed. The generators are still seeded and checkpointed, so that code added later resumes correctly too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, rank: int) -> None:
    """Seed this rank's Python, numpy and torch generators."""
    random.seed(seed * 100_003 + rank)
    np.random.seed((seed * 100_003 + rank) % 2**32)
    torch.manual_seed((seed * 100_003 + rank) % 2**64)


def use_deterministic_algorithms(enabled: bool) -> None:
    """If `enabled`, make torch refuse nondeterministic operations and disable TF32, whatever the environment says."""
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        # containers enable TF32 by an environment variable: the same run would give other results there
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    # new memory is always written before it is read; filling it with NaN first, torch's default in this mode, costs a
    # pass over it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by torch at run time


@contextmanager
def fp32_matmuls() -> Iterator[None]:
    """Inside, matmuls of fp32 tensors on a GPU are not rounded to TF32, whatever the environment says: for references
    that others are compared with."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def generator_state() -> dict[str, Any]:
    """State of this rank's generators for a checkpoint, made of tensors, strings and numbers."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # a tuple; a dict otherwise
    assert isinstance(keys, np.ndarray)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "python": (version, list(internal), gauss),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_generator_state(state: dict[str, Any]) -> None:
    """Restore a state returned by `generator_state`."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
