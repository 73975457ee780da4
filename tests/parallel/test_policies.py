"""Bad steps, skipped and rolled back. A decision leaves nothing of the bad step behind, and a resumed run and a replay
with the ledger end with the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bad_steps import Job, Outcome, train_jobs
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields, metrics

pytestmark = pytest.mark.slow
NAN = float("nan")
BATCH = 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp dp": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "overlap_grad_reduce": True},
    "pp ep": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2, "overlap_grad_reduce": True},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "delayed": {"dtype": "bf16", "fp8_recipe": "delayed", "fp8_amax_history_len": 4},
    "tensorwise": {"dtype": "bf16", "fp8_recipe": "tensorwise"},
}
CASES = [
    ("one rank", "fp32"),
    ("one rank", "delayed"),
    ("one rank", "tensorwise"),
    ("tp dp", "delayed"),
    ("pp ep", "bf16"),
]


def fields(corpus: Path, run_dir: Path, layout: str, precision: str, steps: int, **resilience: Any) -> dict[str, Any]:
    """Stage warmup is step 1, stage decay the rest."""
    layers = 4 if layout == "pp ep" else 2
    found = experiment_fields(corpus, run_dir, steps, model__num_layers=layers, parallel=dict(LAYOUTS.get(layout, {})))
    found["model"] |= {"hidden_size": 64, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64}
    found["precision"] = dict(PRECISIONS[precision])
    found["checkpoint"] = {"save_every_steps": 2}
    found["optimizer"]["ema_decay"] = 0.5
    found["runtime"] |= {"probes": False, "verify_data": "sizes"}
    found["resilience"] = resilience
    return found


def place(step: int) -> int:
    """Position in stage decay of the first sequence of a step, counted from 1, that no roll-back has moved."""
    return (step - 2) * BATCH


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "decisions.jsonl").read_text().splitlines()]


def again(job: Job, run_dir: Path, *, with_checkpoint: int | None = None, **changes: Any) -> Job:
    """The same run in another folder, from the ledger of the first, with nothing wrong this time."""
    first = Path(job.fields["run_dir"])
    copies = [(first / "decisions.jsonl", run_dir / "decisions.jsonl")]
    if with_checkpoint is not None:
        name = f"checkpoints/step_{with_checkpoint:07d}"
        copies.append((first / name, run_dir / name))
    return replace(job, fields=job.fields | {"run_dir": str(run_dir)}, poison=(), copies=tuple(copies), **changes)


def bad_rank(layout: str) -> int:
    return {"one rank": 0, "tp dp": 1, "pp ep": 3}[layout]


@pytest.fixture(scope="module")
def outcomes(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Outcome]]]:
    """Name of a run -> its folder, and the outcomes of its ranks."""
    folder = tmp_path_factory.mktemp("policies")
    work: dict[int, dict[str, Job]] = {1: {}, 4: {}}
    for layout, precision in CASES:
        jobs, name, rank = work[1 if layout == "one rank" else 4], f"{layout} {precision}", bad_rank(layout)

        def job(
            kind: str, steps: int, poison: Any, layout: str = layout, precision: str = precision, **more: Any
        ) -> Job:
            run_dir = folder / f"{layout} {precision} {kind}".replace(" ", "_")
            return Job(fields(corpus, run_dir, layout, precision, steps, **more), poison)

        skip = job("skip", 6, ((place(4), rank, NAN),), on_nonfinite="skip")
        jobs[f"{name} skip"] = skip
        jobs[f"{name} skip resumed"] = again(skip, Path(f"{skip.fields['run_dir']}_resumed"), with_checkpoint=2)
        back = job(
            "back", 6, ((place(5), rank, NAN),), on_nonfinite="rollback", rollback_steps=2, rollback_margin_steps=1
        )
        jobs[f"{name} back"] = replace(back, dies_at="_leave_behind") if layout == "pp ep" else back
        if layout == "pp ep":
            jobs[f"{name} back completed"] = replace(back, poison=())
        jobs[f"{name} back replayed"] = again(back, Path(f"{back.fields['run_dir']}_replayed"))
    for layout in ("one rank", "tp dp"):
        run_dir = folder / f"{layout}_spike".replace(" ", "_")
        spikes = {f"spike_{name}_sigmas": 6.0 for name in ("loss", "grad_norm", "update_norm")}
        found = fields(corpus, run_dir, layout, "fp32", 5, on_spike="skip", spike_window_steps=4, **spikes)
        found["optimizer"]["adam_eps"] = 1e-3  # the first update would be the sign of noise
        work[1 if layout == "one rank" else 4][f"{layout} spike"] = Job(found, ((place(5), 0, 8.0),))
    for name, resilience, poisoned in (
        ("stop", {}, 3),
        ("no checkpoint", {"on_nonfinite": "rollback", "rollback_steps": 2, "rollback_margin_steps": 0}, 3),
        ("too many", {"on_nonfinite": "rollback", "rollback_steps": 1, "max_rollbacks": 1}, 0),
    ):
        found = fields(corpus, folder / name.replace(" ", "_"), "one rank", "fp32", 5, **resilience)
        bad = [place(poisoned)] if poisoned else range(place(4), place(4) + 2000, 8)
        work[1][name] = Job(found, tuple((first, 0, NAN) for first in bad))
    twice = fields(corpus, folder / "twice", "one rank", "fp32", 6, on_nonfinite="rollback", rollback_steps=2)
    twice["resilience"]["rollback_margin_steps"] = 1
    work[1]["twice"] = Job(twice, tuple((place(step), 0, NAN) for step in (5, 8)))
    first = folder / "one_rank_fp32_back"
    found = fields(corpus, folder / "branch", "one rank", "fp32", 6, on_nonfinite="skip")
    found["checkpoint"]["resume_from"] = 2
    work[1]["branch"] = Job(found, copies=((first, folder / "branch"),))
    work[1]["straight"] = Job(fields(corpus, folder / "straight", "one rank", "fp32", 6))
    return _train_all(work)


def _train_all(work: dict[int, dict[str, Job]]) -> dict[str, tuple[Path, list[Outcome]]]:
    found = {}
    for world_size, jobs in work.items():
        ranks = fork_ranks(world_size, train_jobs, list(jobs.values()))
        for name, job, *of_ranks in zip(jobs, jobs.values(), *ranks, strict=True):
            found[name] = Path(job.fields["run_dir"]), of_ranks
    return found


@pytest.mark.parametrize(("layout", "precision"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_skipped_step_changes_nothing_and_the_run_goes_on(outcomes, layout, precision):
    run_dir, ranks = outcomes[f"{layout} {precision} skip"]
    for rank in ranks:
        assert rank.error == ""
        assert rank.kinds == [(step, "skip" if step == 4 else "update") for step in range(1, 7)]
        assert rank.states[3] == rank.states[2], "weights, moments, averages, counts and scales as before the step"
        assert len(set(rank.states)) == 5
    (line,) = ledger(run_dir)
    assert (line["kind"], line["cause"], line["step"]) == ("skip", "nonfinite", 4)
    assert (line["stage"], line["data"], line["tokens"]) == ("decay", [["decay", 16, 24]], 3 * 8 * 64)
    assert line["values"]["grad_norm"] == "NaN"
    found = {record["step"]: record for record in metrics(run_dir)}
    assert [step for step, record in found.items() if record.get("skipped")] == [4]
    assert found[5]["loss"] is not None


@pytest.mark.parametrize(("layout", "precision"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_run_that_resumes_before_its_decision_takes_it_again(outcomes, layout, precision):
    """With nothing wrong this time: the ledger decides."""
    _, resumed = outcomes[f"{layout} {precision} skip resumed"]
    _, straight = outcomes[f"{layout} {precision} skip"]
    for mine, theirs in zip(resumed, straight, strict=True):
        assert mine.kinds == theirs.kinds[2:]
        assert mine.states == theirs.states[2:]


@pytest.mark.parametrize(("layout", "precision"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_roll_back_continues_from_the_checkpoint_without_the_data(outcomes, layout, precision):
    name = f"{layout} {precision} back"
    run_dir, ranks = outcomes[name]
    if layout == "pp ep":  # killed once the decision is written
        assert all(rank.error == "killed here" for rank in ranks)
        assert not (run_dir / "abandoned" / "002").exists()
        _, rest = outcomes[f"{name} completed"]
        kinds = [mine.kinds + more.kinds for mine, more in zip(ranks, rest, strict=True)]
        ranks = rest
    else:
        kinds = [rank.kinds for rank in ranks]
    steps = [(1, "update"), (2, "update"), (3, "update"), (4, "update"), (5, "rollback")]
    assert kinds == [steps + [(step, "update") for step in (3, 4, 5, 6)]] * len(ranks)
    assert all(rank.error == "" for rank in ranks)
    (line,) = ledger(run_dir)
    assert (line["kind"], line["step"], line["to_step"], line["number"]) == ("rollback", 5, 2, 1)
    assert line["data"] == [["decay", place(3), place(7)]], "from step 3 to one step after the bad one"
    assert [record["step"] for record in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert (run_dir / "abandoned/001/checkpoints/step_0000004").is_dir()
    assert [record["step"] for record in metrics(run_dir / "abandoned/001")] == ([1, 2, 3, 4, 5])
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert saved == ["step_0000002", "step_0000004", "step_0000006"]


@pytest.mark.parametrize(("layout", "precision"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_replay_from_the_start_takes_the_same_decisions(outcomes, layout, precision):
    """It reads no bad data, goes back nowhere, and ends with the same bits."""
    name = f"{layout} {precision} back"
    _, ranks = outcomes[f"{name} completed" if layout == "pp ep" else name]
    _, replayed = outcomes[f"{name} replayed"]
    for mine, theirs in zip(replayed, ranks, strict=True):
        assert mine.kinds == [(step, "update") for step in range(1, 7)]
        assert mine.states[2:] == theirs.states[-4:]


def test_a_spike_is_skipped_whatever_the_layout(outcomes):
    """Of the loss and of the gradient. The norms of updates are those of one rank."""
    (alone_dir, (alone,)), (shared_dir, shared) = outcomes["one rank spike"], outcomes["tp dp spike"]
    for rank in (alone, *shared):
        assert rank.kinds == [(step, "skip" if step == 5 else "update") for step in range(1, 6)]
    for run_dir in (alone_dir, shared_dir):
        (line,) = ledger(run_dir)
        assert (line["kind"], line["cause"], line["step"]) == ("skip", "spike", 5)
        assert line["thresholds"].keys() == line["values"].keys() == {"loss", "grad_norm", "update_norm"}
        assert line["values"]["loss"] > line["thresholds"]["loss"]
    for mine, theirs in zip(metrics(shared_dir), metrics(alone_dir), strict=True):
        if mine["step"] < 5:
            assert mine["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-4)


def test_the_default_stops_and_the_ledger_says_why(outcomes):
    run_dir, (rank,) = outcomes["stop"]
    assert rank.error.startswith("step 3: loss nan, gradient norm nan; the newest checkpoint is ")
    assert rank.kinds[:3] == [(1, "update"), (2, "update"), (3, "update")]
    (line,) = ledger(run_dir)
    assert (line["kind"], line["cause"], line["step"], line["data"]) == ("stop", "nonfinite", 3, [["decay", 8, 16]])


def test_without_an_old_enough_checkpoint_a_roll_back_stops(outcomes):
    run_dir, (rank,) = outcomes["no checkpoint"]
    assert rank.error == (
        "step 3: loss nan, gradient norm nan; there is no checkpoint after step 1 or before to roll back to "
        "(checkpoint.save_every_steps, resilience.rollback_steps)"
    )
    assert rank.states[-1] == rank.states[-2], "nothing was updated"
    assert [line["kind"] for line in ledger(run_dir)] == ["stop"]


def test_one_roll_back_too_many_stops(outcomes):
    run_dir, (rank,) = outcomes["too many"]
    assert [kind for _, kind in rank.kinds] == ["update"] * 3 + ["rollback", "rollback"]
    assert "resilience.max_rollbacks=1 is reached" in rank.error
    assert [line["kind"] for line in ledger(run_dir)] == ["rollback", "stop"]


def test_a_second_roll_back_leaves_out_what_the_first_did(outcomes):
    """Both go back to step 2, and the data after the first window is bad too."""
    run_dir, (rank,) = outcomes["twice"]
    assert rank.error == ""
    assert [kind for _, kind in rank.kinds] == ["update"] * 4 + ["rollback", "update", "rollback"] + ["update"] * 4
    first, second = ledger(run_dir)
    assert first["data"] == [["decay", place(3), place(7)]]
    assert second["data"] == [["decay", place(7), place(10)], ["decay", place(3), place(7)]]
    assert [line["to_step"] for line in (first, second)] == [2, 2]


def test_a_branch_of_the_user_forgets_what_was_decided_after_its_checkpoint(outcomes):
    """The data that the roll-back left out is read, as in a run in which nothing was decided."""
    run_dir, (branch,) = outcomes["branch"]
    _, (straight,) = outcomes["straight"]
    assert [line["kind"] for line in ledger(run_dir)] == ["rollback", "branch"]
    assert branch.states == straight.states[2:]
