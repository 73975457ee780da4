"""A planted pickle that only one of two ranks would read stops both, with the same message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

PLANTED = ("generators/shard_1_2", "optimizer.exp_avg.decoder.final_layernorm.weight")
"""Of rank 1; and of the one of the two ranks that reads this moment for both."""


def ranks(corpus: Path, folder: Path) -> dict[str, Any]:
    """What each kind of reading ends with on this rank."""
    import shutil

    import torch
    import torch.distributed as dist

    from hunyuan_pretrain.checkpoint import CheckpointError, save_load
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.train import setup
    from tests.helpers.hostile import Command, replace_record, saved

    torch.set_num_threads(1)
    fields = experiment_fields(corpus, folder / "run", model__num_layers=2, runtime__probes=False)
    run = setup.prepare(Experiment.model_validate(fields))
    trace_steps(run, range(1))
    for step in (1, 2):
        save_load.save(run.run_dir, step, run.chunks, run.optimizer, None)
    found = {}
    for number, name in enumerate(PLANTED):
        copy = folder / str(number)
        if dist.get_rank() == 0:
            shutil.copytree(run.run_dir / "checkpoints", copy / "checkpoints")
            harm = Command(f"touch {folder / 'it-ran'}")
            replace_record(copy / "checkpoints/step_0000002", name, saved([harm]))
        dist.barrier()
        try:
            found[name] = save_load.load_newest(copy, run.chunks, run.optimizer)
        except CheckpointError as error:
            found[name] = str(error)
    resumed = save_load.load_newest(run.run_dir, run.chunks, run.optimizer)
    found["as it was"] = resumed and resumed.folder.name
    setup.leave(run)
    return found


@pytest.fixture(scope="module")
def found(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("hostile")
    return fork_ranks(2, ranks, corpus, folder), folder


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pickle_stops_both_ranks_with_one_message(found, name):
    (first, second), folder = found
    assert first[name] == second[name]
    assert "step_0000002: __" in first[name]
    assert "refused: it names posix.system, which no checkpoint needs; nothing of it has run" in first[name]
    assert not (folder / "it-ran").exists()


def test_the_same_checkpoint_without_it_is_read(found):
    (first, second), _ = found
    assert first["as it was"] == second["as it was"] == "step_0000002"
