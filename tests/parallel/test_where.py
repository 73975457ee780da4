"""`hunyuan-data where RUN --step k` names exactly what the loader delivered: across restarts, another batch size,
skipped data, a roll-back and the branch that it left, a skipped step, and another number of data-parallel ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.bad_steps import Job, Outcome, train_jobs
from tests.helpers.ranks import fork_ranks
from tests.parallel.test_policies import NAN, fields

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Outcome]]]:
    """The folder of a run, and the outcomes of the ranks of its four starts."""
    run_dir = tmp_path_factory.mktemp("where") / "run"

    def job(batch: int, skipped: list[Any], poison: Any, stops_after: int | None, **resilience: Any) -> Job:
        found = fields(corpus, run_dir, "one rank", "fp32", 8, **resilience)
        found["stages"][1] |= {"tokens": 52 * 64, "skip_data_steps": skipped}
        for stage in found["stages"]:
            stage["global_batch_sequences"] = batch
        return Job(found, poison, stops_after=stops_after)

    back = {"on_nonfinite": "rollback", "rollback_steps": 2, "rollback_margin_steps": 1}
    poison = ((32, 0, NAN),)
    alone = [
        job(8, [], (), 3),
        job(4, [[6, 6]], poison, 6, **back),
        job(4, [[6, 6]], poison, 8, **back),
    ]
    shared = [job(8, [], ((64, 1, NAN),), None, on_nonfinite="skip")]
    outcomes = list(zip(*fork_ranks(1, train_jobs, alone), strict=True))
    outcomes += list(zip(*fork_ranks(2, train_jobs, shared), strict=True))
    return run_dir, [list(of_ranks) for of_ranks in outcomes]


def delivered(outcomes: list[list[Outcome]]) -> list[tuple[int, dict[int, list[int]]]]:
    """(step, position in the global batch -> tokens) in the order of training, over all ranks."""
    found = []
    for of_ranks in outcomes:
        for shares in zip(*(outcome.delivered for outcome in of_ranks), strict=True):
            found.append((shares[0][0], {place: tokens for _, share in shares for place, tokens in share.items()}))
    return found


def named(run_dir: Path, step: int, capsys: pytest.CaptureFixture[str]) -> dict[int, list[int]]:
    """Position in the global batch -> tokens of the sequence that `where` names."""
    from data_tools.where import where
    from hunyuan_pretrain.data.packed_dataset import PackedDataset

    capsys.readouterr()
    where(str(run_dir), step, Console(), as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["place"]: PackedDataset(line["packed"])[line["sequence"]].tokens.tolist() for line in lines}


def test_every_step_of_the_run(chain, capsys):
    run_dir, outcomes = chain
    kinds = [outcomes[number][0].kinds for number in range(4)]
    assert [step for step, _ in kinds[1]] == [4, 5, 6]
    assert kinds[2] == [(7, "rollback"), (5, "update"), (6, "update"), (7, "update"), (8, "update")]
    assert kinds[3] == [(9, "update"), (10, "skip")]
    last = dict(delivered(outcomes))
    assert sorted(last) == list(range(1, 11))
    for step, tokens in last.items():
        assert named(run_dir, step, capsys) == tokens, f"step {step}"


def test_every_step_of_the_branch_that_was_left(chain, capsys):
    run_dir, outcomes = chain
    before = dict(delivered(outcomes[:2]) + delivered(outcomes[2:3])[:1])
    assert sorted(before) == [1, 2, 3, 4, 5, 6, 7]
    for step, tokens in before.items():
        assert named(run_dir / "abandoned/001", step, capsys) == tokens, f"step {step}"


def test_what_was_left_out_is_never_read_again(chain):
    """Positions of the stage's data: 24 to 36 before the roll-back, 4 more as a margin."""
    from hunyuan_pretrain.config.history import read_history, schedule_of
    from hunyuan_pretrain.train.policies import data_of

    schedule = schedule_of(read_history(chain[0]))
    assert [data_of(schedule, step - 1)[1:] for step in range(2, 11)] == [
        (0, 8), (8, 16), (16, 20), (40, 44), (44, 48), (48, 52), (52, 56), (56, 64), (64, 72),
    ]  # fmt: skip
