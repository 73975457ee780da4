"""A save on a GPU: the copy goes to pinned memory, and holds the state of its step. `make test-gpu` runs this."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def run(corpus: Any, tmp_path: Path) -> Iterator[Any]:
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.train import setup
    from tests.helpers.runs import experiment_fields

    fields = experiment_fields(
        corpus,
        tmp_path / "run",
        model__num_layers=2,
        model__hidden_size=64,
        model__ffn_hidden_size=128,
        model__moe_ffn_hidden_size=128,
        precision={"dtype": "bf16"},
    )
    fields["runtime"] |= {"probes": False, "device": "cuda"}
    run = setup.prepare(Experiment.model_validate(fields))
    yield run
    setup.leave(run)


def test_training_goes_on_while_the_copy_in_pinned_memory_is_written(run: Any, tmp_path: Path) -> None:
    from hunyuan_pretrain.checkpoint.saving import Saver
    from hunyuan_pretrain.train.step import launch_step

    for step in range(2):
        launch_step(run, run.schedule.stage(step), step).result()
    found = []
    saver = Saver(run.chunks, run.optimizer)
    for name in ("waited", "beside training"):
        saver.begin(tmp_path / name, 2, None)
        assert saver.note is None
        assert saver._memory._block is not None
        assert torch.frombuffer(saver._memory._block, dtype=torch.uint8).is_pinned()
        if name == "beside training":
            launch_step(run, run.schedule.stage(2), 2).result()
        saved = saver.finish()
        assert saved is not None
        found.append({path.name: path.read_bytes() for path in saved.folder.glob("*.distcp")})
    assert found[0] == found[1]
