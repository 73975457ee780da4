"""Packing with datatrove tasks gives the bytes of the plain command, whoever packs which group and whatever happens to
them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_tools import cli
from data_tools.packed_output import pack
from data_tools.tokenization import tokenize
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import begun_folder, unfinished_folder
from tests.helpers.kills import killed_at

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'hunyuan-pretrain[cluster]'")

from data_tools.packing_tasks import JoinGroups, PackGroups, begin, pack_on

LENGTH = 32
OPTIONS: dict[str, Any] = {"seed": 3, "group_tokens": 150}


@pytest.fixture
def tokens(tmp_path: Path, corpus: list[str], tokenizer_folder: str) -> list[str]:
    """A tokenized folder of many shards."""
    tokenize(corpus, tokenizer_folder, str(tmp_path / "tokens"), shard_bytes=200)
    return [str(tmp_path / "tokens")]


def contents(folder: Path) -> dict[str, bytes]:
    """Without what a process that dies after naming the folder may leave in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".job", ".lock")}


@pytest.mark.parametrize("tasks", [1, 3])
def test_tasks_of_the_local_executor_write_the_same_bytes(tmp_path: Path, tokens: list[str], tasks: int) -> None:
    manifest = pack(tokens, LENGTH, str(tmp_path / "plain"), **OPTIONS)
    assert len(manifest["groups"]) > 4
    logs = tmp_path / "logs"
    found = pack_on("local", tokens, LENGTH, str(tmp_path / "tasks"), tasks=tasks, workers=2, logs=str(logs), **OPTIONS)
    assert found == manifest
    assert contents(tmp_path / "plain") == contents(tmp_path / "tasks")
    done = [
        json.loads((logs / f"pack/stats/{rank:05}.json").read_text())[0]["stats"]["tokens"] for rank in range(tasks)
    ]
    assert sum(task["total"] for task in done) == manifest["tokens"]
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "logs", "plain", "tasks", "tokens"}


def test_killed_at_every_write_and_run_again_the_tasks_give_the_same_bytes(tmp_path: Path, tokens: list[str]) -> None:
    options = OPTIONS | {"group_tokens": 400}

    def job(out: str, world_size: int) -> None:
        begin(tokens, LENGTH, out, **options)
        for rank in reversed(range(world_size)):
            PackGroups(out)(None, rank, world_size)
        JoinGroups(out)()

    pack(tokens, LENGTH, str(tmp_path / "plain"), **options)
    kills = 0
    while killed_at(kills + 1, partial(job, str(tmp_path / f"k{kills}"), 3)):
        out = tmp_path / f"k{kills}"
        if not out.exists():
            job(str(out), 2)
        assert contents(out) == contents(tmp_path / "plain"), kills
        kills += 1
    assert kills > 20


def test_groups_are_joined_only_when_all_are_finished_and_of_this_job(tmp_path: Path, tokens: list[str]) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(DataFormatError, match="not begun, or finished already"):
        PackGroups(out)()
    left = begin(tokens, LENGTH, out, **OPTIONS)
    PackGroups(out)(None, 0, 2)
    with pytest.raises(DataFormatError, match=f"{len(left) // 2} of {len(left)} groups are not finished; pack again"):
        JoinGroups(out)()
    assert begin(tokens, LENGTH, out, **OPTIONS) == left[1::2]
    with begun_folder(out), pytest.raises(DataFormatError, match="another process is writing it"):
        JoinGroups(out)()
    with pytest.raises(DataFormatError, match="left unfinished by a run with other inputs or options"):
        begin(tokens, LENGTH, out, **OPTIONS | {"group_tokens": 700})
    assert begin(tokens, LENGTH, out, overwrite=True, **OPTIONS | {"group_tokens": 10**9}) == [0]
    PackGroups(out)()
    JoinGroups(out)()
    assert "groups" not in json.loads((tmp_path / "out/manifest.json").read_text())


def test_a_folder_begun_without_a_plan_is_refused(tmp_path: Path, tokens: list[str]) -> None:
    out = str(tmp_path / "out")
    with unfinished_folder(out, files=("manifest.json",), identity="another") as folder:
        with pytest.raises(DataFormatError, match="another process is writing it"):
            PackGroups(out)()
        (folder / "group_00000.json").write_text("{}")
    with pytest.raises(DataFormatError, match="started without --executor"):
        PackGroups(out)()


def test_the_command_packs_with_an_executor_and_refuses_options_without_one(
    tmp_path: Path, tokens: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*options: str) -> int | str | None:
        monkeypatch.setattr("sys.argv", ["hunyuan-data", *command, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code

    command = ["pack", *tokens, "--sequence-length", str(LENGTH), "--group-tokens", "150", "--output"]
    assert not run(str(tmp_path / "plain"))
    with_tasks = ["--executor", "local", "--tasks", "2", "--workers", "1", "--logs", str(tmp_path / "logs")]
    assert not run(str(tmp_path / "tasks"), *with_tasks)
    assert contents(tmp_path / "plain") == contents(tmp_path / "tasks")
    capsys.readouterr()
    for options, message in (
        (["--tasks", "2"], "--tasks: has no effect without --executor; give both or neither"),
        (["--workers", "2"], "--workers: has no effect without --executor; give both or neither"),
        (["--executor", "local", "--executor-option", "colour=red"], "colour: not an option of datatrove's local"),
    ):
        assert run(str(tmp_path / "out"), *options) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("*out*"))
