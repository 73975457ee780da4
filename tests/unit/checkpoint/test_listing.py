"""`hunyuan-pretrain checkpoints`: what it prints, changes and refuses."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.checkpoint import folders, listing, retention
from hunyuan_pretrain.cli import program
from hunyuan_pretrain.config.load import load_experiment
from hunyuan_pretrain.runtime import lock
from tests.helpers.checkpoint_folders import write_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command; (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hunyuan-pretrain", "checkpoints", *map(str, arguments)])
        code = 0
        try:
            program.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three complete checkpoints, one set aside, one truncated and one unfinished."""
    run_dir = tmp_path / "run"
    for step in (100, 200, 300):
        write_checkpoint(run_dir, step, position={"tokens": step * 4096})
    write_checkpoint(run_dir, 400)
    folders.set_aside(folders.checkpoint_folder(run_dir, 400))
    short = write_checkpoint(run_dir, 500) / "__1_0.distcp"
    os.truncate(short, 3)
    (run_dir / "checkpoints/step_0000600.partial").mkdir()
    (run_dir / "checkpoints/mine").mkdir()
    lines = [json.dumps({"step": step, "loss": 7.5 - step / 100}) for step in range(1, 301)]
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 300, "validation_loss": 9}', '{"step": 3']))
    retention.keep(run_dir, folders.checkpoint_folder(run_dir, 100), "first")
    return run_dir


def rows(out: str) -> dict[str, str]:
    return {line.split()[0]: line for line in out.splitlines() if line and line.split()[0].isdigit()}


def test_the_list_shows_every_checkpoint_and_what_is_wrong_with_it(command, run_dir):
    code, out, err = command(run_dir)
    assert (code, err) == (0, "")
    assert "3 complete, 2 damaged, 1 partial" in out.replace("\n", " ")
    found = rows(out)
    assert list(found) == ["100", "200", "300", "400", "500", "600"]
    assert "100 bytes" in found["200"]
    assert "dp=2 on 2" in found["200"]
    assert "bfloat16" in found["200"]
    assert "819,200" in found["200"]
    assert "5.5000" in found["200"]
    assert "kept as first" in found["100"]
    assert "damaged: set aside by a run that could not use it" in found["400"]
    assert "damaged: __1_0.distcp is missing or damaged" in found["500"]
    assert "partial: an unfinished save" in found["600"]


def test_the_list_as_json(command, run_dir):
    code, out, _ = command(run_dir, "list", "200", "--json")
    (entry,) = json.loads(out)["checkpoints"]
    assert code == 0
    assert entry.pop("saved_at") == pytest.approx(time.time(), abs=60)
    assert entry == {
        "folder": str(run_dir / "checkpoints/step_0000200"),
        "step": 200,
        "state": "complete",
        "fault": None,
        "size_bytes": 100,
        "layout": "dp=2",
        "world_size": 2,
        "dtype": "bfloat16",
        "tokens": 819200,
        "loss": 5.5,
        "name": None,
    }


def test_a_thousand_checkpoints_are_listed_in_seconds(tmp_path):
    """Without reading them, and without torch. The limit is generous: machines differ, and others use this one."""
    for step in range(1, 1001):
        write_checkpoint(tmp_path, step, files=8)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 2.5}}\n' for step in range(1, 50_001)))
    began = time.process_time()
    entries = listing.entries(tmp_path)
    assert time.process_time() - began < 10
    assert len(entries) == 1000
    assert all((entry.state, entry.loss) == ("complete", 2.5) for entry in entries)


def test_the_command_does_not_import_torch(run_dir):
    text = (
        "import sys; sys.argv = ['hunyuan-pretrain', 'checkpoints', sys.argv[1], 'list'];"
        "from hunyuan_pretrain.cli import program\n"
        "try: program.main()\n"
        "finally: assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, str(run_dir)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 complete" in done.stdout


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such step": (["verify", "150", "nothing"], "no checkpoint 150, nothing; there are: 100, 200, 300, 500"),
    "remove without a step": (["remove"], "remove needs a step"),
    "keep without a name": (["keep", "200"], "keep needs --name"),
    "a name for another action": (["list", "--name", "x"], "--name goes with keep, not with list"),
    "force for another action": (["keep", "200", "--name", "x", "--force"], "--force goes with remove, not with keep"),
    "keep two": (["keep", "200", "300", "--name", "x"], "keep takes one step, found 2"),
    "keep a damaged one": (["keep", "500", "--name", "x"], "keep takes a complete one"),
    "a name that is taken": (["keep", "200", "--name", "first"], "'first' is the name of "),
    "release what has no name": (["release", "200"], "step_0000200 has no name"),
    "branch without a configuration": (["branch", "200"], "it has no resolved.yaml"),
    "an unknown action": (["delete", "200"], "'delete' is not one of"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message_status_2_and_changes_nothing(command, run_dir, arguments, words):
    before = sorted(run_dir.rglob("*"))
    code, out, err = command(run_dir, *arguments)
    assert (code, out) == (2, "")
    assert words in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize("content", ["absent", "empty"])
def test_a_folder_that_is_no_run_is_refused(command, tmp_path, content):
    if content == "empty":
        (tmp_path / "run").mkdir()
    code, out, err = command(tmp_path / "run")
    assert (code, out) == (2, "")
    assert {"absent": "no such folder", "empty": "not a run directory: it has no folder checkpoints/"}[content] in err


def test_steps_and_names_and_words_choose_what_is_removed(command, run_dir):
    code, out, err = command(run_dir, "remove", "200", "damaged", "partial")
    assert (code, err) == (0, "")
    assert [Path(line.split()[-1]).name for line in out.splitlines()] == [
        "step_0000200",
        "step_0000400.damaged",
        "step_0000500",
        "step_0000600.partial",
    ]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["mine", "step_0000100", "step_0000300"]


def refused(command: Any, run_dir: Path, *arguments: str) -> str:
    before = sorted(run_dir.rglob("*"))
    code, out, err = command(run_dir, "remove", *arguments)
    assert (code, out) == (2, "")
    assert "nothing is removed" in err
    assert sorted(run_dir.rglob("*")) == before
    return err


def test_the_newest_good_checkpoint_goes_only_by_force_and_a_named_one_not_at_all(command, run_dir):
    err = refused(command, run_dir, "100", "300")
    assert "step_0000100 is kept as first: release it first" in err
    words = "step_0000300 is the newest good one: without it the run would resume from step 200; --force removes it"
    assert words in err
    assert command(run_dir, "remove", "200", "300", "--force")[0] == 0
    assert "kept as first" in refused(command, run_dir, "first", "--force")
    assert command(run_dir, "release", "first")[0] == 0
    assert "the run would start from the beginning" in refused(command, run_dir, "100")
    assert command(run_dir, "remove", "100", "--force")[0] == 0


def test_what_a_running_job_may_need_is_not_removed(command, run_dir):
    held = lock.RunLock.take(run_dir)
    try:
        assert "trains in this run: stop it first" in refused(command, run_dir, "300", "--force")
        assert "may be writing an unfinished save: stop it first" in refused(command, run_dir, "partial")
        assert command(run_dir, "remove", "200", "500")[0] == 0
    finally:
        held.release()
    assert command(run_dir, "remove", "300", "partial", "--force")[0] == 0


def test_the_lock_of_a_dead_process_holds_nothing(command, run_dir):
    (run_dir / "lock.json").write_text(json.dumps({**lock._me(), "pid": 2**22 + 1, "process_start": 1, "token": "x"}))
    assert lock.holder_of(run_dir) is None
    assert command(run_dir, "remove", "partial")[0] == 0


def test_keep_and_release(command, run_dir):
    code, out, _ = command(run_dir, "keep", "200", "--name", "second")
    assert code == 0
    assert out.startswith(f"{run_dir}/checkpoints/step_0000200 is kept as second, until")
    assert "kept as second" in command(run_dir, "list", "second")[1]
    assert command(run_dir, "release", "second", "100")[0] == 0
    assert [entry.name for entry in listing.entries(run_dir)] == [None] * 6


def test_the_branch_command_is_one_that_train_takes(command, run_dir, tmp_path):
    (run_dir / "resolved.yaml").write_text(f"base: {ROOT / 'configs/dev/demo_cpu.yaml'}\n")
    code, out, _ = command(run_dir, "branch", "200")
    assert (code, shlex.split(out)) == (
        0,
        ["hunyuan-pretrain", "train", str(run_dir / "resolved.yaml"), "--from-step", "200"],
    )
    code, out, _ = command(run_dir, "branch", "200", "--into", tmp_path / "new one", "--json")
    program_name, action, config, *overrides = shlex.split(json.loads(out)["command"])
    assert (code, program_name, action) == (0, "hunyuan-pretrain", "train")
    experiment = load_experiment(Path(config), overrides)
    assert experiment.run_dir == str(tmp_path / "new one")
    assert experiment.checkpoint.resume_from == str(run_dir / "checkpoints/step_0000200")
    write_checkpoint(tmp_path / "old", 1)
    code, out, err = command(run_dir, "branch", "200", "--into", tmp_path / "old")
    assert (code, out) == (2, "")
    assert "has checkpoints of its own; choose a new run directory" in err


@pytest.mark.parametrize(
    ("now", "text"), [(30, "30 s"), (119, "119 s"), (150, "2 min"), (7200, "2 h"), (86_400 * 3, "3 days")]
)
def test_ages(now, text):
    assert listing.age_text(0, now) == text


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_what_cannot_be_read_now_or_is_of_a_newer_program_is_not_removed_as_damaged(
    command, run_dir, monkeypatch, code
):
    marker, stat = run_dir / "checkpoints/step_0000300/complete.json", os.stat
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format_version": 99}))
    bad = str(run_dir / "checkpoints/step_0000200/__0_0.distcp")

    def refuse(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path) == bad:
            raise OSError(code, os.strerror(code), bad)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    status, out, _ = command(run_dir)
    assert status == 0
    assert "1 complete, 2 damaged, 1 newer, 1 partial, 1 unreadable" in out.replace("\n", " ")
    assert f"unreadable: __0_0.distcp cannot be read now: {os.strerror(code)} ({errno.errorcode[code]})" in out
    assert "newer: complete.json: written by a newer program" in out
    assert command(run_dir, "verify", "200")[:2] == (
        1, f"step_0000200: __0_0.distcp cannot be read now: {os.strerror(code)} ({errno.errorcode[code]})\n"
    )  # fmt: skip
    status, _, err = command(run_dir, "remove", "300")
    assert (status, "is the newest good one" in err) == (2, True)
    assert command(run_dir, "remove", "damaged")[0] == 0
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step*")) == [
        *(f"step_0000{step}" for step in (100, 200, 300)), "step_0000600.partial",
    ]  # fmt: skip
