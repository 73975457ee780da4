"""The ranks of a pipeline are compared with the plan one by one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

pytestmark = pytest.mark.slow


def train(fields: dict[str, Any]) -> str:
    """What this rank prints on stderr; the last pipeline rank has a weight that the plan does not know."""
    import torch

    from hunyuan_pretrain.runtime.stop import StopRequest
    from hunyuan_pretrain.train import loop, setup

    run = setup.prepare(Experiment.model_validate(fields))
    if run.groups.pp.rank() == 1:
        run.chunks[0].extra = torch.nn.Parameter(torch.zeros(3))
    loop._save = lambda *_, **__: None  # type: ignore[assignment]  # the fork ends with this function
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        loop._train(run, StopRequest())
    setup.leave(run)
    return printed.getvalue()


def test_a_later_pipeline_rank_prints_its_own_differences(corpus: Path, tmp_path: Path) -> None:
    """Pipeline ranks 0 and 1 of two ranks each; of the second, rank 2 stands for both."""
    parallel = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    fields = experiment_fields(corpus, tmp_path / "run", parallel=parallel)
    fields["runtime"] |= {"probes": False}
    printed = ["".join(line for line in text.splitlines() if "plan" in line) for text in fork_ranks(4, train, fields)]
    assert printed[:2] == ["", ""]
    assert printed[2].startswith("rank 2: warning: not as planned: parameters of this rank ")
    assert printed[3] == ""
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count(" as planned: parameters of this rank ") == 1
    assert "(planned " not in log
