"""`hunyuan-pretrain ladder`: runs of several sizes are trained, skipped, resumed and fitted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.runs import (
    experiment_fields,
    kill_all,
    make_corpus,
    metrics,
    run,
    run_forked,
    start,
    write_experiment,
)

SIZES = {16: 4, 24: 6, 32: 8, 48: 12, 64: 16}
"""Hidden size -> head width: five sizes."""
CELLS = [(16, 3), (16, 12), (24, 6), (32, 3), (48, 6), (64, 3), (64, 12)]
"""(hidden size, steps)"""


def write_rung(folder: Path, corpus: Path, hidden: int, steps: int) -> Path:
    name = f"h{hidden}_s{steps}"
    fields = experiment_fields(corpus, folder / "runs" / name, steps, name=name)
    fields["model"] |= {"hidden_size": hidden, "kv_channels": SIZES[hidden], "ffn_hidden_size": 2 * hidden}
    fields["model"] |= {"moe_ffn_hidden_size": 2 * hidden, "num_layers": 2}
    fields["evaluation"] = {"data": str(corpus / "heldout"), "max_sequences": 8}
    fields["checkpoint"] = {"save_every_steps": 2}
    return write_experiment(folder / f"{name}.yaml", fields)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of seven experiments, all but the last trained."""
    folder = tmp_path_factory.mktemp("ladder")
    corpus = make_corpus(folder / "corpus")
    configs = [write_rung(folder, corpus, *cell) for cell in CELLS]
    for config in configs[:-1]:
        status, _, err = run_forked("train", config)
        assert status == 0, err
    return folder


def test_a_ladder_trains_what_is_left_and_fits_the_laws(ladder: Path) -> None:
    before = {path: path.read_bytes() for path in (ladder / "runs").glob("*/metrics.jsonl")}
    status, script, err = run_forked("ladder", "run", ladder, "--dry-run")
    assert (status, err) == (0, "")
    lines = script.splitlines()
    assert len(lines) == len(CELLS) + 1  # a comment for each, a command for the one that is left
    assert sum("; finished" in line for line in lines) == len(CELLS) - 1
    assert f"launch/train.sh {ladder / 'h64_s12.yaml'}" in lines
    assert len(before) == len(CELLS) - 1  # nothing was run

    target = ladder / "h64_s12.yaml"
    status, out, err = run("ladder", "run", ladder, "--target", target, "--compute", "1e12")
    assert status == 0, err
    assert out.count(": finished") == len(CELLS) - 1
    assert {path: path.read_bytes() for path in before} == before
    assert metrics(ladder / "runs" / "h64_s12")[-1]["step"] == 12
    found = json.loads((ladder / "runs" / "ladder.json").read_text())
    assert found["loss"] == "validation_loss"
    assert len(found["runs"]) == len(CELLS)
    measured = {Path(one["name"]).name: one["loss"] for one in found["runs"]}
    assert measured["h64_s12"] == metrics(ladder / "runs" / "h64_s12")[-1]["validation_loss"]
    (predicted,) = found["targets"]
    assert predicted["loss"]["low"] <= predicted["loss"]["value"] <= predicted["loss"]["high"]
    assert predicted["loss"]["value"] == pytest.approx(measured["h64_s12"], rel=0.05)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert name in out
        assert found["law"][name]["low"] <= found["law"][name]["value"] <= found["law"][name]["high"]
    first, second = found["optimum"]
    assert (first["flops"], second["flops"]) == (1e12, predicted["flops"])
    assert ("ladder.png" in out) == (ladder / "runs" / "ladder.png").exists()
    assert ("no plot: plots need matplotlib" in out) != (ladder / "runs" / "ladder.png").exists()


def test_runs_that_cannot_be_fitted_are_refused_in_one_message(ladder: Path, tmp_path: Path) -> None:
    finished = [ladder / "runs" / name for name in ("h16_s3", "h16_s12", "h24_s6")]
    status, out, err = run_forked("ladder", "fit", *finished, "--output", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.startswith("no fit of loss(N, D) = E + A/N^alpha + B/D^beta: 3 runs, at least 6 are needed")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished[1], unfinished)
    shutil.rmtree(unfinished / "checkpoints" / "step_0000012")
    status, out, err = run_forked("ladder", "fit", *finished, unfinished, tmp_path / "none", finished[0])
    assert (status, out) == (2, "")
    assert err.splitlines()[0] == "ladder: 3 problems"
    assert "unfinished: is not finished: 10 of 12 steps" in err
    assert "none: is no run directory" in err
    assert "the same run as" in err
    assert not (tmp_path / "out").exists()


def test_two_experiments_with_one_run_directory_are_refused(ladder: Path, tmp_path: Path) -> None:
    shutil.copy(ladder / "h16_s3.yaml", tmp_path / "copy.yaml")
    status, _, err = run_forked("ladder", "run", ladder, tmp_path, "--dry-run")
    assert status == 2
    assert f"{ladder / 'h16_s3.yaml'} has the same, and would be mixed with it" in err


def test_a_finished_run_of_other_settings_is_refused(ladder: Path) -> None:
    status, _, err = run_forked("ladder", "run", ladder / "h16_s3.yaml", "optimizer.lr=0.02", "--dry-run")
    assert status == 2
    assert "holds a finished run of other settings: lr 0.01 instead of 0.02 (give the experiment its own)" in err


def test_a_ladder_that_is_told_to_stop_saves_and_says_how_to_go_on(ladder: Path, tmp_path: Path) -> None:
    config = write_rung(tmp_path, ladder / "corpus", 16, 5000)
    process = start("ladder", "run", config)
    run_dir = tmp_path / "runs" / "h16_s5000"
    deadline = time.monotonic() + 120
    try:
        while not metrics(run_dir):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        kill_all(process)
    assert process.returncode == 75, (out, err)
    assert "ended with status 75; the same command continues here" in err
    assert list((run_dir / "checkpoints").glob("step_*"))
