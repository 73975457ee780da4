"""The process groups created at a start, counted in a simulated world."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest

from tests.helpers.ranks import fork_ranks

WORLD = 64
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "everything": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 4,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 4,
    },
}


def backends_of_groups(layout: dict[str, Any], has_gpu: bool) -> Counter[str | None]:
    """Backend -> number of groups that rank 5 of the world creates for this layout, its own or not."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from hunyuan_pretrain.config.schema import ParallelConfig
    from hunyuan_pretrain.parallel.groups import build_groups, destroy_groups

    found: Counter[str | None] = Counter()
    make = dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        found[kwargs.get("backend")] += 1
        return make(*args, **kwargs)

    dist.init_process_group("fake", rank=5, world_size=WORLD, store=FakeStore())
    try:
        with patch.object(dist, "new_group", counted), patch.object(torch.cuda, "is_available", lambda: has_gpu):
            build_groups(ParallelConfig(**layout), 60)
    finally:
        destroy_groups()
    return found


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_start_creates_groups_of_its_own_backend_only(layout, has_gpu):
    (found,) = fork_ranks(1, backends_of_groups, layout, has_gpu)
    assert set(found) == {None}, "every group has the backend of the job"
    # every rank takes part in creating each group: core 0.16 has up to 12 for each rank of the world, 0.19 up to 15
    assert 0 < found[None] < 15 * WORLD
