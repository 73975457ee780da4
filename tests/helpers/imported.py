"""Import everything that pytest, a training run, its comparisons and its export import, for `ranks.fork_ranks`."""

import pytest

from hunyuan_pretrain.checkpoint import export_run
from hunyuan_pretrain.diagnostics import parity, parity_run, shadow
from hunyuan_pretrain.train import loop, probes
from tests.helpers import layouts

__all__ = ["export_run", "layouts", "loop", "parity", "parity_run", "probes", "pytest", "shadow"]
