"""The identity of a resumed run: its position in tokens, its history, and what may change."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import (
    SEQUENCE_LENGTH,
    experiment_fields,
    kill_when,
    metrics,
    run_forked,
    start,
    write_experiment,
)

pytestmark = pytest.mark.slow
STEPS, BATCH = 20, 8


def fields_of(
    corpus: Path, run_dir: Path, batch: int = BATCH, sequences: int = (STEPS - 1) * BATCH, **changes: Any
) -> dict[str, Any]:
    """Fields of a run of 20 steps of 8 sequences, saved after 10 and at the end; `batch` and `sequences` are those of
    the second stage, from step 2 on."""
    quick = {"device": "cpu", "cpu_threads_per_rank": 1, "probes": False}
    fields = experiment_fields(
        corpus, run_dir, STEPS, model__num_layers=2, checkpoint={"save_every_steps": 10}, runtime=quick
    )
    fields["stages"][0]["micro_batch_sequences"] = fields["stages"][1]["micro_batch_sequences"] = 4
    fields["stages"][1] |= {"tokens": sequences * SEQUENCE_LENGTH, "global_batch_sequences": batch}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        (fields[section] if key else fields)[key or section] = value
    return fields


def train_here(fields: dict[str, Any], accepted: tuple[str, ...] = ()) -> str:
    """Train in this process, which can be reused; returns the log, or the text of the refusal."""
    from hunyuan_pretrain.checkpoint import CheckpointError
    from hunyuan_pretrain.config.errors import ConfigError
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.parallel.groups import leave_layout
    from hunyuan_pretrain.runtime.stop import listen
    from hunyuan_pretrain.train import loop, setup

    printed = io.StringIO()
    try:
        run = setup.prepare(Experiment.model_validate(fields), accepted=accepted)
    except (CheckpointError, ConfigError) as error:
        leave_layout()
        return str(error)
    try:
        run.log.console.file = printed
        loop._train(run, listen())
    finally:
        setup.leave(run)
    return printed.getvalue()


def documents(run_dir: Path, step: int) -> list[tuple[str, int]]:
    """(packed folder, sequence) of each position of a step, from `hunyuan-data where`."""
    from rich.console import Console

    from data_tools.where import where

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        where(str(run_dir), step, Console(file=io.StringIO()), as_json=True)
    return [(entry["packed"], entry["sequence"]) for entry in map(json.loads, printed.getvalue().splitlines())]


def rates(run_dir: Path) -> list[float]:
    return [record["learning_rate"] for record in metrics(run_dir)]


def stories(corpus: Path, base: Path) -> dict[str, Any]:
    """Everything that needs training, in sequence in one process."""
    from hunyuan_pretrain.checkpoint.export_run import in_force

    told: dict[str, Any] = {}
    straight = base / "straight"
    train_here(fields_of(corpus, straight))

    def at_step_10(name: str) -> Path:
        """A copy of the run as it was stopped after step 10."""
        shutil.copytree(straight, base / name)
        shutil.rmtree(base / name / "checkpoints/step_0000020")
        return base / name

    def resumed(
        name: str, start: Callable[[str], Path] = at_step_10, accepted: tuple[str, ...] = (), **changes: Any
    ) -> None:
        told[name] = train_here(fields_of(corpus, start(name), **changes), accepted)

    resumed("unchanged")
    resumed("twice", batch=16, model__moe_aux_loss_coeff=0.05, model__moe_expert_capacity_factor=2.0)
    resumed("half", batch=4)
    resumed("seed", seed=8)
    resumed("world", model__hidden_size=64, seed=9, sequences=8)
    shutil.copytree(straight, base / "longer")
    told["again"] = train_here(fields_of(corpus, base / "longer"))
    told["longer"] = train_here(fields_of(corpus, base / "longer", sequences=2 * (STEPS - 1) * BATCH))
    told["shorter"] = train_here(fields_of(corpus, base / "longer", sequences=80))

    resumed("from before histories", lambda name: without_history(at_step_10(name), 10), batch=16)
    without_history(base / "unchanged", 20)
    shorter = experiment_fields(corpus, base / "unchanged", 10)
    (base / "unchanged/resolved.yaml").write_text(yaml.safe_dump(shorter), encoding="utf-8")
    told["written over"] = refusal_of(in_force, base / "unchanged/checkpoints/step_0000020")
    told |= repacked(corpus, base)

    branch = {"save_every_steps": 4, "resume_from": 10}
    shutil.copytree(straight, base / "branch")
    told["branch"] = train_here(fields_of(corpus, base / "branch", sequences=80, checkpoint=branch))
    told["branch again"] = train_here(fields_of(corpus, base / "branch", sequences=80, checkpoint=branch))
    told["branch anew"] = train_here(
        fields_of(corpus, base / "branch", sequences=80, checkpoint=branch, optimizer__lr=5e-3)
    )
    told["no such step"] = train_here(fields_of(corpus, base / "branch", checkpoint={"resume_from": 7}))
    of_other = {"resume_from": str(straight / "checkpoints/step_0000010")}
    told["of another run"] = train_here(fields_of(corpus, base / "of_other", sequences=80, checkpoint=of_other))
    told["mixed"] = train_here(
        fields_of(corpus, base / "longer", sequences=2 * (STEPS - 1) * BATCH, checkpoint=of_other)
    )
    weights = {"init_from": str(straight)}
    told["weights"] = train_here(
        fields_of(corpus, base / "weights", sequences=8, checkpoint=weights, model__moe_z_loss_coeff=0.1)
    )
    experiment, stage = in_force(base / "branch/abandoned/001/checkpoints/step_0000020")
    told["in force at what was left"] = (experiment.seed, stage.name)
    told["export"] = export_here(base / "branch", base / "exported")
    return told


def repacked(corpus: Path, base: Path) -> dict[str, Any]:
    """A run of 2 steps, the second of a stage in epochs, whose data grows and is packed again before it resumes."""
    from data_tools.packed_output import pack
    from hunyuan_pretrain.config.load import load_experiment
    from hunyuan_pretrain.data.errors import DataFormatError

    packed, run_dir, told = base / "packed", base / "repacked", {}

    def go(accepted: tuple[str, ...] = ()) -> str:
        fields = fields_of(corpus, run_dir)
        fields["stages"][1] |= {"tokens": None, "epochs": 0.02}
        fields["stages"] = [stage | {"data": [{"path": str(packed)}]} for stage in fields["stages"]]
        experiment = load_experiment(write_experiment(base / "in_epochs.yaml", fields))
        return train_here(experiment.model_dump(mode="json"), accepted)

    def sequences_after_packing(*names: str) -> int:
        shutil.rmtree(packed, ignore_errors=True)
        pack([str(corpus / name) for name in names], SEQUENCE_LENGTH, str(packed), seed=1)
        return int(json.loads((packed / "manifest.json").read_text())["sequences"])

    sizes = [sequences_after_packing("tokenized_heldout")]
    told["in epochs"] = go()
    sizes.append(sequences_after_packing("tokenized_heldout", "tokenized"))
    told |= {"repacked": go(), "repacked, accepted": go(("stages.0.data.digest",)), "sequences of both": sizes}
    told["where in what is gone"] = refusal_of(documents, run_dir, 1, kind=DataFormatError)
    told["where in what is there"] = documents(run_dir, 3)
    return told


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The configuration of each segment."""
    return [one["experiment"] for one in json.loads((run_dir / "segments.json").read_text())["segments"]]


def without_history(run_dir: Path, step: int) -> Path:
    """A copy of the run as if segments and positions had not been recorded."""
    marker = run_dir / f"checkpoints/step_{step:07d}/complete.json"
    content = json.loads(marker.read_text(encoding="utf-8"))
    for name in ("history", "position", "marker_sha256"):
        content.pop(name, None)
    marker.write_text(json.dumps(content), encoding="utf-8")
    (run_dir / "segments.json").unlink()
    return run_dir


def refusal_of(action: Callable[..., Any], *arguments: Any, kind: type[Exception] = ValueError) -> str:
    try:
        action(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError("not refused")


def export_here(run_dir: Path, output: Path) -> dict[str, Any]:
    """The origin that the export of a run's newest checkpoint states. Ends this process's job."""
    from hunyuan_pretrain.checkpoint.export_run import export_run

    found: dict[str, Any] = export_run(run_dir, output)["source"]
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="module")
def told(corpus: Path, base: Path) -> dict[str, Any]:
    return fork_ranks(1, stories, corpus, base, timeout_s=900)[0]


def test_an_unchanged_resumed_run_reads_exactly_what_it_would_have_read(told: dict[str, Any], base: Path) -> None:
    names = ("step", "loss", "grad_norm", "learning_rate")
    mine, other = (
        [[record[name] for name in names] for record in metrics(base / run)] for run in ("unchanged", "straight")
    )
    assert mine == other
    line = next(line for line in told["unchanged"].splitlines() if line.startswith("resumes from"))
    assert line.endswith("step_0000010: step 10 of 20, 5,120 tokens, stage decay, saved by 1 rank (dp=1)")
    assert "steps 11 to 20" in told["unchanged"]


@pytest.mark.parametrize(("name", "batch", "steps"), [("twice", 16, 15), ("half", 4, 30)])
def test_a_new_batch_size_trains_every_sequence_once(
    told: dict[str, Any], base: Path, name: str, batch: int, steps: int
) -> None:
    assert f"changed, and recorded: stages.1.global_batch_sequences: 8 -> {batch}" in told[name]
    assert [record["step"] for record in metrics(base / name)] == list(range(1, steps + 1))
    taken = [place for step in range(1, steps + 1) for place in documents(base / name, step)]
    assert taken == [place for step in range(1, STEPS + 1) for place in documents(base / "straight", step)]
    per_token = {tokens: rate for tokens, rate in zip(range(8, 161, 8), rates(base / "straight"), strict=True)}
    counts = [*range(8, 81, 8), *range(80 + batch, 161, batch)]
    for tokens, rate in zip(counts, rates(base / name), strict=True):
        if tokens in per_token:
            assert rate == pytest.approx(per_token[tokens], rel=1e-9), "the learning rate is a function of the tokens"


def test_a_new_seed_is_refused_until_it_is_accepted(told: dict[str, Any], base: Path) -> None:
    assert "step_0000010: the run cannot continue with this configuration" in told["seed"]
    assert "seed: 7 in the checkpoint, 8 in the config" in told["seed"]
    assert told["seed"].endswith("continue anyway with --accept-changes seed")
    assert recorded(base / "seed")[-1]["seed"] == 7, "nothing was written"


def test_losses_and_routing_may_change(told: dict[str, Any], base: Path) -> None:
    assert "changed, and recorded: model.moe_aux_loss_coeff: 0.01 -> 0.05" in told["twice"]
    assert told["twice"].count("done: 15 steps") == 1
    segments = json.loads((base / "twice/segments.json").read_text())["segments"]
    assert [segment["first_step"] for segment in segments] == [0, 10]
    assert segments[1]["position"] == {
        "step": 10,
        "stage": "decay",
        "tokens_of_stage": 4608,
        "next_sequence_of_stage": 72,
        "tokens": 5120,
    }
    marker = json.loads((base / "twice/checkpoints/step_0000015/complete.json").read_text())
    assert marker["history"] == segments, "a copied checkpoint also has the history"


def test_one_message_lists_everything_that_is_refused(told: dict[str, Any]) -> None:
    for text in (
        "a checkpoint of another model:\n  model.hidden_size: 32",
        "seed: 7 in the checkpoint",
        "stages.1.tokens=512",
    ):
        assert text in told["world"]


def test_a_finished_run_has_nothing_to_do(told: dict[str, Any]) -> None:
    assert told["again"].splitlines()[-1].startswith("nothing to do: the run is finished (20 steps)")
    assert "steps 21 to 20" not in told["again"]


def test_a_run_with_doubled_tokens_continues_at_the_current_rate(told: dict[str, Any], base: Path) -> None:
    assert "steps 21 to 39" in told["longer"]
    assert rates(base / "longer")[19:] == pytest.approx([1e-3] * 20)


def test_a_run_shorter_than_what_is_trained_is_refused_and_exports_still_work(told: dict[str, Any], base: Path) -> None:
    assert "stages.1.tokens=5120: 19,456 tokens of stage decay are trained after step 39" in told["shorter"]
    assert told["export"]["step"] == 11
    assert "use at least 19456, or branch from an earlier checkpoint with --from-step" in told["shorter"]


def test_a_branch_moves_later_steps_to_a_run_directory_of_their_own(told: dict[str, Any], base: Path) -> None:
    run_dir = base / "branch"
    assert "branches off after step 10, leaving step_0000020" in told["branch"]
    assert "done: 11 steps" in told["branch"], "shorter than what was trained: the branch may be"
    left = run_dir / "abandoned/001"
    assert [record["step"] for record in metrics(left)] == list(range(1, STEPS + 1))
    assert [path.name for path in (left / "checkpoints").iterdir()] == ["step_0000020"]
    assert documents(left, 20) == documents(base / "straight", 20)
    assert told["in force at what was left"] == (7, "decay")
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 12))


def test_the_same_command_continues_its_branch_and_a_changed_one_branches_again(
    told: dict[str, Any], base: Path
) -> None:
    assert "nothing to do: the run is finished (11 steps)" in told["branch again"]
    assert "branches off after step 10, leaving step_0000011" in told["branch anew"]
    assert [record["step"] for record in metrics(base / "branch/abandoned/002")] == list(range(1, 12))
    assert rates(base / "branch")[10] == pytest.approx(rates(base / "branch/abandoned/002")[10] / 2)
    segments = json.loads((base / "branch/segments.json").read_text())["segments"]
    assert [(segment["first_step"], segment["resume_from"]) for segment in segments] == [(0, None), (10, "10")]
    assert segments[1]["changes"][0].startswith("branches off after step 10")


def test_a_checkpoint_to_branch_from_must_exist_and_belong_to_the_run(told: dict[str, Any], base: Path) -> None:
    assert "step_0000007: not a complete checkpoint" in told["no such step"]
    assert "longer has its own checkpoints, such as step_0000039 (choose another run_dir" in told["mixed"]
    assert "steps 11 to 11" in told["of another run"]
    assert documents(base / "of_other", 3) == documents(base / "straight", 3), (
        "it has the history of the run it comes from"
    )


def test_a_run_can_start_from_the_weights_of_another(told: dict[str, Any], base: Path) -> None:
    assert (
        f"starts from the weights of {base}/straight/checkpoints/step_0000020, after step 20 of its run"
        in told["weights"]
    )
    assert "changed, and recorded: model.moe_z_loss_coeff: 0 -> 0.1" in told["weights"]
    assert "steps 1 to 2" in told["weights"]


def test_a_run_without_a_recorded_history_resumes_with_a_new_batch_size(told: dict[str, Any], base: Path) -> None:
    assert "steps 11 to 15" in told["from before histories"]
    for step in (3, 11, 15):
        assert documents(base / "from before histories", step) == documents(base / "twice", step)


def test_a_checkpoint_beyond_the_end_of_its_configuration_is_explained(told: dict[str, Any]) -> None:
    assert (
        "it was taken after 20 steps, but the configuration beside it, resolved.yaml, ends after 10"
        in told["written over"]
    )
    assert "put the run's own configuration back" in told["written over"]


def test_repacked_data_is_refused_until_it_is_accepted(told: dict[str, Any], base: Path) -> None:
    assert f"stages.0.data.digest: {base}/packed " in told["repacked"]
    assert told["repacked"].endswith("--accept-changes stages.0.data.digest")
    assert "accepted by hand: stages.0.data.digest" in told["repacked, accepted"]
    assert f"{base}/packed: packed again since the run read it" in told["where in what is gone"]
    assert len(told["where in what is there"]) == BATCH


def test_epochs_of_data_that_has_grown_are_more_tokens(told: dict[str, Any], base: Path) -> None:
    before, after = (math.ceil(size / 50) for size in told["sequences of both"])  # 0.02 epochs
    tokens = f"stages.1.tokens: {before * SEQUENCE_LENGTH} -> {after * SEQUENCE_LENGTH}"
    assert f"changed, and recorded: {tokens} (the length of the stage; its learning rate" in told["repacked, accepted"]
    assert f"steps 3 to {1 + math.ceil(after / BATCH)}" in told["repacked, accepted"]
    assert f"{base}/packed: {told['sequences of both'][0]} sequences, of which 16 are read" in told["in epochs"]
    history = [one["stages"][1]["tokens"] // SEQUENCE_LENGTH for one in recorded(base / "repacked")]
    assert history == [before, after]


def test_where_uses_the_segment_that_was_in_force(told: dict[str, Any], base: Path) -> None:
    assert told["twice"]
    assert len(documents(base / "twice", 3)) == 8
    assert len(documents(base / "twice", 11)) == 16


def test_two_runs_on_one_run_dir_do_not_mix_and_the_lock_of_a_killed_run_does_not_block(
    corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = write_experiment(tmp_path / "x.yaml", fields_of(corpus, run_dir, checkpoint={"save_every_steps": 2}))
    first = start("train", config)

    def second_is_refused() -> bool:
        if not metrics(run_dir):
            return False
        first.send_signal(signal.SIGSTOP)  # so that the first holds the lock however long the second takes to start
        code, out, err = run_forked("train", config)
        assert code == 2, out + err
        assert f"{run_dir}: 1 problem\n  run_dir: process {first.pid} on " in err
        assert "hunyuan_pretrain/" not in err, "no traceback"
        return True

    kill_when(first, second_is_refused)
    done = len(metrics(run_dir))
    assert (run_dir / "lock.json").exists()
    code, out, err = run_forked("train", config)
    assert code == 0, out + err
    assert f"the lock of process {first.pid} on " in out
    assert "was left over (the process is gone): taken over" in out
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert done < STEPS
    assert not (run_dir / "lock.json").exists()
