"""Steps that are computed twice: training is as without, and a rank whose hardware changes a bit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bad_steps import Job, Outcome, train_jobs
from tests.helpers.ranks import fork_ranks
from tests.parallel.test_policies import LAYOUTS, fields

pytestmark = pytest.mark.slow
STEPS, BAD_RANK = 3, 2
CASES = {
    "dp": ({"overlap_grad_reduce": True, "overlap_param_gather": True}, "delayed"),
    "pp ep": (LAYOUTS["pp ep"], "bf16"),
    "tp dp": (LAYOUTS["tp dp"] | {"overlap_grad_reduce": False}, "fp32"),
}


@pytest.fixture(scope="module")
def outcomes(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Outcome]]]:
    folder, jobs = tmp_path_factory.mktemp("rerun"), {}
    for name, (parallel, precision) in CASES.items():
        for kind, every in (("once", None), ("twice", 1), ("flipped", 2)):
            if kind == "flipped" and name == "pp ep":
                continue
            run_dir = folder / f"{name} {kind}".replace(" ", "_")
            changes: dict[str, Any] = {"rerun_every": every}
            found = fields(corpus, run_dir, name, precision, STEPS, **changes) | {"parallel": dict(parallel)}
            found["checkpoint"] = {}
            found["stages"] = [{**stage, "micro_batch_sequences": 1} for stage in found["stages"]]
            jobs[f"{name} {kind}"] = Job(found, flips=(2, BAD_RANK) if kind == "flipped" else None)
    ranks = fork_ranks(4, train_jobs, list(jobs.values()))
    return {
        name: (Path(job.fields["run_dir"]), list(of_ranks))
        for name, job, *of_ranks in zip(jobs, jobs.values(), *ranks, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_training_is_bitwise_as_without(outcomes, name):
    """Also with reductions that overlap the backward pass, and with delayed scales, of which a step has one update."""
    for twice, once in zip(outcomes[f"{name} twice"][1], outcomes[f"{name} once"][1], strict=True):
        assert twice.error == ""
        assert twice.states == once.states
        assert len(once.states) == STEPS


@pytest.mark.parametrize("name", ["dp", "tp dp"])
def test_the_rank_with_a_flipped_bit_is_named_and_nothing_is_updated(outcomes, name):
    run_dir, ranks = outcomes[f"{name} flipped"]
    for rank in ranks:
        assert rank.error.startswith("step 2: computed twice from the same weights and data with different results on ")
        assert f"on rank {BAD_RANK} (" in rank.error
        assert "; nothing was updated" in rank.error
        assert rank.kinds == [(1, "update")]
    (line,) = [json.loads(line) for line in (run_dir / "decisions.jsonl").read_text().splitlines()]
    assert (line["kind"], line["cause"], line["step"]) == ("stop", "rerun", 2)
    assert [rank for rank, _, _ in line["ranks"]] == [BAD_RANK]
