"""`doctor CONFIG` says no where `train` says no, in the same words, and yes where it trains."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.checkpoint import save_load
from hunyuan_pretrain.checkpoint.folders import step_of
from hunyuan_pretrain.config.decisions import LEDGER, Decision, append_decision
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.train.preflight import refusals
from tests.helpers.runs import experiment_fields, run_forked, write_experiment


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with x.yaml beside it."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_experiment(folder / "x.yaml", experiment_fields(corpus, folder / "run", steps=2))
    code, _, err = run_forked("train", config)
    assert code == 0, err
    return folder


def no_tokenizer(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    fields["tokenizer"] = str(folder / "none")


def a_file_as_tokenizer(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    fields["tokenizer"] = str(corpus / "tokenizer/hy.tiktoken")


def no_data_of_the_last_stage(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    fields["stages"][-1]["data"] = [{"path": str(folder / "none")}]


def no_validation_data(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    fields["evaluation"] = {"data": str(folder / "none")}


def no_data_of_a_validation_set(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    fields["evaluation"] = {"sets": [{"name": "code", "path": str(folder / "none")}]}


def a_pack_of_another_length(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    for stage in fields["stages"]:
        stage["sequence_length"] = 32


def a_vocabulary_beyond_the_embedding(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    fields["model"]["padded_vocab_size"] = 256


def another_tokenizer(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
    ranks = folder / "tokenizer/hy.tiktoken"
    ranks.write_bytes(b"".join(ranks.read_bytes().splitlines(keepends=True)[:-1]))
    fields["tokenizer"] = str(folder / "tokenizer")


def a_file_as_run_dir(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    (folder / "file").touch()
    fields["run_dir"] = str(folder / "file")


def nothing_to_begin_with(fields: dict[str, Any], folder: Path, corpus: Path) -> None:
    fields["checkpoint"] = {"init_from": str(folder / "none")}


CASES: list[tuple[Callable[[dict[str, Any], Path, Path], None], str]] = [
    (no_tokenizer, "none: no such file"),
    (a_file_as_tokenizer, "is a file; a tokenizer is a folder with hy.tiktoken"),
    (no_data_of_the_last_stage, "none"),
    (no_validation_data, "none"),
    (no_data_of_a_validation_set, "none"),
    (a_pack_of_another_length, "packed to sequences of 64 tokens, but stages[0] (warmup) has sequence_length=32"),
    (a_vocabulary_beyond_the_embedding, "256"),
    (another_tokenizer, "tokenize"),
    (a_file_as_run_dir, "file"),
    (nothing_to_begin_with, "neither a checkpoint nor a run directory"),
]


@pytest.mark.parametrize(("mistake", "words"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_doctor_finds_what_training_would_refuse(
    mistake: Callable[..., None], words: str, corpus: Path, tmp_path: Path
) -> None:
    fields = experiment_fields(corpus, tmp_path / "run")
    mistake(fields, tmp_path, corpus)
    (said,) = refusals(load_experiment(write_experiment(tmp_path / "x.yaml", fields)))
    assert words in said
    assert not (tmp_path / "run").exists()


def test_doctor_says_yes_where_training_resumes(trained: Path, corpus: Path) -> None:
    before = sorted((trained / "run").rglob("*"))
    assert refusals(load_experiment(trained / "x.yaml")) == []
    fields = experiment_fields(corpus, trained / "second", steps=2, checkpoint__init_from=str(trained / "run"))
    assert refusals(load_experiment(write_experiment(trained / "second.yaml", fields))) == []
    assert sorted((trained / "run").rglob("*")) == before


def test_doctor_says_no_where_a_run_cannot_resume(trained: Path) -> None:
    (said,) = refusals(load_experiment(trained / "x.yaml", ["seed=8"]))
    assert "seed" in said
    (said,) = refusals(load_experiment(trained / "x.yaml", ["checkpoint.resume=false"]))
    assert "checkpoint.resume=false, but" in said


def test_doctor_says_no_if_no_checkpoint_is_intact_or_a_branch_is_of_another_run(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    config = write_experiment(tmp_path / "x.yaml", experiment_fields(corpus, tmp_path / "run", steps=2))
    (said,) = refusals(load_experiment(config, [f"checkpoint.resume_from={trained}/run/checkpoints/step_0000002"]))
    assert "has its own checkpoints, such as step_0000002" in said
    for file in (tmp_path / "run/checkpoints").glob("*/*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    (said,) = refusals(load_experiment(config))
    assert "no usable checkpoint (repair or remove them; with none left the run starts from the beginning)" in said
    assert "step_0000002: __0_0.distcp is missing or damaged" in said
    code, _, err = run_forked("export", tmp_path / "run", tmp_path / "out")
    assert (code, "step_0000002: __0_0.distcp is missing or damaged" in err) == (2, True)


def test_doctor_says_no_to_weights_of_another_model_and_to_folders_without_a_checkpoint(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    fields = experiment_fields(
        corpus, tmp_path / "run", model__num_layers=2, checkpoint__init_from=str(trained / "run")
    )
    config = write_experiment(tmp_path / "x.yaml", fields)
    said = refusals(load_experiment(config))
    assert run_forked("train", config)[::2] == (2, "".join(f"{text}\n" for text in said))
    assert said[0].splitlines()[1] == "  model.num_layers: 4 in the checkpoint, 2 in the config"
    for path, words in (
        (trained / "run", "a run directory; name one of its checkpoints: complete ones there: step_0000002"),
        (config, "not a complete checkpoint (no complete.json)"),
    ):
        (said,) = refusals(
            load_experiment(trained / "x.yaml", [f"run_dir={tmp_path}", f"checkpoint.resume_from={path}"])
        )
        assert said.startswith(f"{path}: {words}")


def test_doctor_says_no_to_a_full_disk(corpus: Path, tmp_path: Path) -> None:
    experiment = load_experiment(write_experiment(tmp_path / "x.yaml", experiment_fields(corpus, tmp_path / "run")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # what is written beyond it fails, as on a full disk
    try:
        said = refusals(experiment)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert said == [f"{tmp_path}: File too large"]


def test_doctor_says_yes_to_a_run_with_relative_paths(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    assert refusals(load_experiment(Path("x.yaml"), ["run_dir=run"])) == []


def test_doctor_and_train_report_the_same(corpus: Path, tmp_path: Path) -> None:
    fields = experiment_fields(corpus, tmp_path / "run")
    no_data_of_the_last_stage(fields, tmp_path, corpus)
    config = write_experiment(tmp_path / "x.yaml", fields)
    code, _, err = run_forked("doctor", config)
    assert code == 1
    assert run_forked("train", config)[::2] == (2, err.removeprefix("cannot run: "))


def test_doctor_starts_where_a_roll_back_that_was_killed_goes_on(trained: Path) -> None:
    """A checkpoint that the ledger has left behind is not looked at, also while it lies there."""
    run_dir = trained / "run"
    (newest,) = save_load.find_checkpoints(run_dir)
    step = step_of(newest)
    ledger = run_dir / LEDGER
    decision = Decision(time="t", kind="rollback", cause="spike", step=step + 1, to_step=step - 1, number=1)
    try:
        append_decision(run_dir, decision)
        assert refusals(load_experiment(trained / "x.yaml", ["seed=8"])) == [], "without a checkpoint it starts again"
        ledger.unlink()
        append_decision(run_dir, decision.model_copy(update={"to_step": step}))
        (said,) = refusals(load_experiment(trained / "x.yaml", ["seed=8"]))
        assert "seed" in said
    finally:
        ledger.unlink(missing_ok=True)
