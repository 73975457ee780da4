"""Seeds, determinism, and the state of random generators.

Training itself draws nothing from a generator: weights, data order and recycle routing are keyed by the experiment's
seed. The generators are seeded and checkpointed all the same, so that anything added later resumes too.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators of this rank."""
    random.seed(seed * 100_003 + rank)
    np.random.seed((seed * 100_003 + rank) % 2**32)
    torch.manual_seed((seed * 100_003 + rank) % 2**64)


def use_deterministic_algorithms(enabled: bool) -> None:
    """Make torch refuse operations whose result changes from run to run, and multiply fp32 as fp32, whatever the
    environment says."""
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        # containers turn TF32 on by a variable: the same run would be another one there
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    # new memory is written before it is read here; filling it with NaN first, torch's default in this mode, costs a
    # pass
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by torch at run time


def generator_state() -> dict[str, Any]:
    """State of this rank's generators as tensors, strings and numbers, for a checkpoint."""
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
    """Restore what `generator_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
