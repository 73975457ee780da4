"""Imports what pytest, a training run, its comparisons and its export import, for `ranks.fork_ranks`."""

import pytest

from hunyuan_pretrain.train import export_run, loop, parity, parity_run, probes, shadow
from tests.helpers import layouts

__all__ = ["export_run", "layouts", "loop", "parity", "parity_run", "probes", "pytest", "shadow"]
