"""What a start communicates and opens, counted in jobs that only data parallelism enlarges: nothing grows with the
number of ranks. Rank 0 of each job runs the start of a training run, up to its first step, in a fake world."""

from __future__ import annotations

import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import SEQUENCE_LENGTH, experiment_fields

WORLDS = (16, 2048)
KINDS = ("all_reduce", "broadcast")


class Counted(NamedTuple):
    """Of one rank's start."""

    calls: dict[str, int]
    """Kind and caller of a collective -> elements, of all calls together."""
    objects: dict[str, int]
    """Calls that pickle."""
    of_core: list[int]
    """Bytes of each object that megatron-core gathers from every rank."""
    data: dict[str, int]
    """File of the data or the tokenizer -> times that it is opened."""
    code: int
    """Source files of this project that are opened."""
    programs: int
    """Other programs started."""


@contextmanager
def opened_files(*folders: str) -> Iterator[tuple[list[Counter[str]], Counter[str]]]:
    """(files opened below each folder, programs started) meanwhile."""
    files, programs, is_on = [Counter[str]() for _ in folders], Counter[str](), [True]

    def heard(event: str, arguments: tuple[Any, ...]) -> None:  # a hook cannot be taken out
        if is_on[0] and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.path.abspath(os.fspath(arguments[0]))
            for folder, found in zip(folders, files, strict=True):
                if path.startswith(folder) and "__pycache__" not in path:
                    found[os.path.relpath(path, folder)] += 1
        if is_on[0] and event == "subprocess.Popen":
            programs[str(arguments[0])] += 1

    sys.addaudithook(heard)
    try:
        yield files, programs
    finally:
        is_on[0] = False


def start(
    rank: int, world_size: int, fields: dict[str, Any], corpus: str, told: list[Any] | None = None
) -> tuple[Counted, list[Any]]:
    """Start a run as a rank of so many, eight on a node. `told`: the objects that rank 0 broadcasts, which this returns
    of rank 0 itself."""
    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()

    import torch.distributed as dist

    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.parallel.fake_world import Recorder, as_rank
    from hunyuan_pretrain.train import setup

    experiment, of_core, broadcast = Experiment.model_validate(fields), list[int](), list[Any]()
    real, coming = dist.broadcast_object_list, iter(told or [])

    def broadcast_objects(objects: list[Any], src: int) -> None:
        assert src == 0
        if rank > 0:
            objects[:] = [pickle.loads(next(coming))]
        broadcast.append(pickle.dumps(objects[0]))
        real([objects[0]], src=rank)

    def gather_for_core(found: list[Any], mine: Any) -> None:
        """megatron-core's own: the kinds of parameter groups of every rank."""
        assert sys._getframe(1).f_globals["__name__"] == "megatron.core.optimizer", "all_gather_object"
        of_core.append(len(pickle.dumps(mine)))
        found[:] = [mine] * len(found)

    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "8"}
    with (
        patch.dict(os.environ, environment),
        as_rank(rank, world_size, experiment.parallel, 60) as (groups, _),
        patch.object(setup, "build_groups", lambda *arguments: groups),
        patch.object(dist, "broadcast_object_list", broadcast_objects),
        patch.object(dist, "gather_object", lambda *arguments: pytest.fail("it grows with the ranks")),
        patch.object(dist, "all_gather_object", gather_for_core),
        Recorder(groups, lambda: "") as recorder,
        opened_files(corpus, str(Path(setup.__file__).parents[1])) as ((data, code), programs),
    ):
        run = setup.prepare(experiment)
        setup.leave(run, lambda: None)
    calls: dict[str, int] = {}
    for record in recorder.calls:
        where = f"{record.kind} {record.place.rpartition(' ')[2].rstrip(')')}"
        calls[where] = calls.get(where, 0) + sum(record.sizes)
    objects = {"broadcast_object_list": len(broadcast)}
    return Counted(calls, objects, of_core, dict(data), len(code), sum(programs.values())), broadcast


def starts(world_size: int, fields: dict[str, Any], corpus: str) -> list[Counted]:
    """Ranks 0 and 1."""
    first, told = start(0, world_size, fields, corpus)
    return [first, start(1, world_size, fields, corpus, told)[0]]


def fields_for(corpus: Path, run_dir: Path, world_size: int) -> dict[str, Any]:
    return experiment_fields(
        corpus,
        run_dir,
        stages__global_batch_sequences=world_size,
        stages__micro_batch_sequences=1,
        stages__tokens=world_size * SEQUENCE_LENGTH,
        evaluation={"data": str(corpus / "heldout"), "every_steps": 100},
        parallel={"expert_model_parallel_size": 4},
    )


@pytest.fixture(scope="module")
def counts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Counted]]:
    """Ranks 0 and 1 of each world."""
    found = []
    for world_size in WORLDS:
        fields = fields_for(corpus, tmp_path_factory.mktemp("run") / "run", world_size)
        found += fork_ranks(1, starts, world_size, fields, str(corpus))
    return found


def test_nothing_that_a_start_sends_or_opens_grows_with_the_ranks(counts: list[list[Counted]]) -> None:
    for before, after in pairwise(counts):
        for smaller, larger in zip(before, after, strict=True):
            assert smaller._replace(data={}) == larger._replace(data={})
            # the ranks share the files that are verified
            assert all(times <= smaller.data.get(file, 1) for file, times in larger.data.items())
    first, other = counts[-1]
    assert first.calls == other.calls
    sent = {kind: sum(size for name, size in first.calls.items() if name.startswith(kind)) for kind in KINDS}
    assert sum(sent.values()) == sum(first.calls.values()), "no other kind"
    assert sum(sent.values()) < 1000
    assert max(first.of_core) < 1000, "of each rank, on every rank, by megatron-core"
    assert first.code > 100 > 10 > other.code, "the first rank of a node digests the code"
    assert other.programs == 0
    assert max(max(one.data.values()) for one in (first, other)) <= 9


if __name__ == "__main__":  # what docs/guide/several_nodes.md states
    import json
    import tempfile

    from tests.helpers.runs import make_corpus

    with tempfile.TemporaryDirectory() as folder:
        made = make_corpus(Path(folder) / "data")
        fields = fields_for(made, Path(folder) / "run", WORLDS[-1])
        print(json.dumps([one._asdict() for one in fork_ranks(1, starts, WORLDS[-1], fields, str(made))[0]], indent=1))
