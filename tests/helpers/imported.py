"""Import everything that pytest, a training run, its comparisons and its export import, for `ranks.fork_ranks`."""

import gc

import pytest

from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.install()

# torch's compiler, which deterministic algorithms and torch.optim load on first use
from torch import _inductor  # noqa: E402

from hunyuan_pretrain.checkpoint import export_run  # noqa: E402
from hunyuan_pretrain.diagnostics import parity, parity_run, shadow  # noqa: E402
from hunyuan_pretrain.train import loop, probes  # noqa: E402
from tests.helpers import layouts  # noqa: E402

__all__ = ["_inductor", "export_run", "layouts", "loop", "parity", "parity_run", "probes", "pytest", "shadow"]

# what is imported stays: the forks need not search it for cycles, a quarter of a second each time
gc.collect()
gc.freeze()
