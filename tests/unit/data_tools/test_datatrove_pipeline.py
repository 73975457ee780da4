"""Tokenizing with datatrove tasks gives the bytes of the plain command, whoever runs the tasks and whatever happens to
them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_tools import cli
from data_tools.tokenization import tokenize
from data_tools.tokenized_shard import Allowance
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import begun_folder, unfinished_folder
from tests.helpers.kills import killed_at

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'hunyuan-pretrain[cluster]'")

from data_tools.datatrove_pipeline import JoinShards, PlanTokenizing, TokenizeShards, begin, tokenize_on

SHARDS: dict[str, Any] = {"shard_bytes": 400}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tasks_of_the_local_executor_write_the_same_bytes(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    for name in ("plain", "tasks"):
        settings = {"holdout_every": 5, "holdout_output": str(tmp_path / f"{name}_held"), **SHARDS}
        if name == "plain":
            manifests = tokenize(corpus, tokenizer_folder, str(tmp_path / name), **settings)
        else:
            # completion markers of other tasks, which must not be believed
            completions = tmp_path / "logs" / "tokenize" / "completions"
            completions.mkdir(parents=True)
            (completions / "00001").touch()
            found = tokenize_on(
                "local",
                corpus,
                tokenizer_folder,
                str(tmp_path / name),
                tasks=2,
                workers=2,
                logs=str(tmp_path / "logs"),
                **settings,
            )
            assert found == manifests
    assert len(manifests[0]["shards"]) > 3
    assert contents(tmp_path / "plain") == contents(tmp_path / "tasks")
    assert contents(tmp_path / "plain_held") == contents(tmp_path / "tasks_held")
    done = [
        json.loads((tmp_path / f"logs/tokenize/stats/0000{rank}.json").read_text())[0]["stats"] for rank in range(2)
    ]
    assert sum(task["documents"]["total"] for task in done) == 44
    assert all(task["documents"]["total"] > 0 for task in done)
    assert {path.name for path in tmp_path.iterdir()} == {
        "corpus",
        "logs",
        "plain",
        "plain_held",
        "tasks",
        "tasks_held",
    }


def test_killed_at_every_write_and_run_again_the_tasks_give_the_same_bytes(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    def job(folder: Path, world_size: int) -> None:
        begin(
            corpus,
            tokenizer_folder,
            str(folder / "train"),
            holdout_every=5,
            holdout_output=str(folder / "held"),
            shard_bytes=2500,
        )
        for rank in reversed(range(world_size)):
            TokenizeShards(str(folder / "train"))(None, rank, world_size)
        JoinShards(str(folder / "train"))()

    tokenize(
        corpus,
        tokenizer_folder,
        str(tmp_path / "train"),
        holdout_every=5,
        holdout_output=str(tmp_path / "held"),
        shard_bytes=2500,
    )
    kills = 0
    while killed_at(kills + 1, partial(job, tmp_path / f"killed_{kills}", 3)):
        folder = tmp_path / f"killed_{kills}"
        if not (folder / "train").exists():
            job(folder, 2)
        for part in ("train", "held"):
            assert contents(folder / part) | hidden(folder / part) == contents(tmp_path / part) | hidden(
                folder / part
            ), kills
        assert sorted(path.name for path in folder.iterdir()) == ["held", "train"]
        kills += 1
    assert kills > 20


def hidden(folder: Path) -> dict[str, bytes]:
    """What a process that dies after naming the folder may leave in it; no reader looks there."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in (".job", ".lock")}


def test_a_late_task_works_for_the_current_job(tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> None:
    out = str(tmp_path / "out")
    begin(corpus, tokenizer_folder, out, **SHARDS)
    first, late = TokenizeShards(out), TokenizeShards(out)
    first(None, 0, 2)
    Path(corpus[0]).write_text("".join('{"text": "all is new"}\n' for _ in range(50)))
    with pytest.raises(DataFormatError, match="left unfinished by a run with other inputs or options"):
        begin(corpus, tokenizer_folder, out, **SHARDS)
    left = begin(corpus, tokenizer_folder, out, overwrite=True, **SHARDS)
    late(None, 1, 2)
    with pytest.raises(
        DataFormatError, match=f"out: {(len(left) + 1) // 2} of {len(left)} shards are not finished; tokenize again"
    ):
        JoinShards(out)()
    assert begin(corpus, tokenizer_folder, out, **SHARDS) == left[::2]
    TokenizeShards(out)()
    JoinShards(out)()
    tokenize(corpus, tokenizer_folder, str(tmp_path / "plain"), **SHARDS)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_tasks_share_the_folder_only_with_tasks(tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(DataFormatError, match="out: not begun, or finished already"):
        TokenizeShards(out)()
    left = begin(corpus, tokenizer_folder, out, **SHARDS)
    with begun_folder(out):  # as another task
        for alone in (
            partial(begin, corpus, tokenizer_folder, out, **SHARDS),
            partial(tokenize, corpus, tokenizer_folder, out, **SHARDS),
        ):
            with pytest.raises(DataFormatError, match="out: another process is writing it; wait for it to end"):
                alone()
        with pytest.raises(DataFormatError, match="out: another process is writing it"):
            JoinShards(out)()
        TokenizeShards(out)()
    assert begin(corpus, tokenizer_folder, out, **SHARDS) == []
    assert len(left) > 3
    with begun_folder(out) as (folder, identity):
        written = {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    TokenizeShards(out)()
    assert written == {path: path.stat().st_mtime_ns for path in written}  # finished shards are not written again
    with (
        unfinished_folder(out, files=["manifest.json"], identity=identity),
        pytest.raises(DataFormatError, match="another process"),
    ):
        TokenizeShards(out)()


def test_a_planned_pipeline_reads_what_its_earlier_steps_wrote(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    """A step receives what the steps before it yield, and starts when they have finished."""
    folder, out = tmp_path / "written", str(tmp_path / "out")

    def write() -> Iterator[str]:
        folder.mkdir()
        for path in corpus:
            yield path
            (shutil.copytree if Path(path).is_dir() else shutil.copy)(path, folder / Path(path).name)

    PlanTokenizing([str(folder)], tokenizer_folder, out, **SHARDS)(write())
    TokenizeShards(out)()
    JoinShards(out)()
    (manifest,) = tokenize([str(folder)], tokenizer_folder, str(tmp_path / "plain"), **SHARDS)
    assert manifest["documents"] == 44
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    with pytest.raises(TypeError, match="shard_byte"):
        PlanTokenizing([str(folder)], tokenizer_folder, out, shard_byte=1)


@pytest.fixture
def ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'hunyuan-pretrain[cluster]'")
    monkeypatch.setenv("HOME", str(tmp_path))  # ray keeps a token there
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, address="local")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_tasks_on_ray_write_the_same_bytes_and_continue_after_an_error(
    tmp_path: Path, corpus: list[str], tokenizer_folder: str
) -> None:
    (Path(corpus[1]) / "bad.txt").write_bytes(b"\x00")
    out, logs = tmp_path / "out", tmp_path / "logs"
    options = {"mem_per_cpu_gb": 0.25}
    with pytest.raises(
        DataFormatError, match=rf"out: not finished; {logs}/\*/logs say why, and the same command resumes"
    ):
        tokenize_on("ray", corpus, tokenizer_folder, str(out), tasks=2, logs=str(logs), options=options, **SHARDS)
    assert not out.exists()
    assert "bad.txt: a binary file" in "".join(path.read_text() for path in logs.glob("tokenize/logs/*.log"))
    settings = {"max_rejects": Allowance(1), **SHARDS}
    found = tokenize_on("ray", corpus, tokenizer_folder, str(out), tasks=2, logs=str(logs), options=options, **settings)
    assert found == tokenize(corpus, tokenizer_folder, str(tmp_path / "plain"), **settings)
    assert contents(out) == contents(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "2"], "--tasks: has no effect without --executor"),
        (["--executor", "slurm"], "partition: required for Slurm; give partition=...; time: required"),
        (
            ["--executor", "local", "--executor-option", "tme=1"],
            "tme: not an option of datatrove's local executor; its options are local_rank",
        ),
        (["--executor", "local", "--executor-option", "time"], "must be NAME=VALUE"),
    ],
)
def test_mistakes_in_the_options_are_one_message(
    tmp_path: Path,
    corpus: list[str],
    tokenizer_folder: str,
    options: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [
        "hunyuan-data",
        "tokenize",
        *corpus,
        "--tokenizer",
        tokenizer_folder,
        "--output",
        str(tmp_path / "out"),
        *options,
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_executor_options_are_read_as_the_executor_declares_them() -> None:
    from data_tools.executors import parse_options

    given = [
        "time=04:00:00",
        "partition=1e3",
        "cpus_per_task=2",
        "requeue=false",
        'sbatch_args={"mem": "8G"}',
        "mail_user=null",
    ]
    assert parse_options("slurm", given) == {
        "time": "04:00:00",
        "partition": "1e3",
        "cpus_per_task": 2,
        "requeue": False,
        "sbatch_args": {"mem": "8G"},
        "mail_user": "null",
    }
    for option, message in (
        ("cpus_per_task=two", "cpus_per_task=two: must be a whole number"),
        ("cpus_per_task=1.5", "must be a whole number"),
        ("requeue=yes", "requeue=yes: must be true or false"),
        ("sbatch_args=mem", "a JSON object, such as"),
        ("partition", "must be NAME=VALUE, such as partition=cpu"),
        ("=cpu", "must be NAME=VALUE"),
    ):
        with pytest.raises(DataFormatError, match=message):
            parse_options("slurm", [option])
    with pytest.raises(DataFormatError, match="time is given twice; give it once"):
        parse_options("slurm", ["time=1", "time=2"])
