"""Which checkpoints are removed after a save, and what a kill in between leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hunyuan_pretrain.checkpoint import CheckpointError, folders, retention
from tests.helpers.checkpoint_folders import write_checkpoint
from tests.helpers.kills import killed_at


def steps(run_dir: Path) -> list[int]:
    return [folders.step_of(folder) or 0 for folder in folders.find_checkpoints(run_dir)]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (None, None, [10, 20, 30, 40, 50, 60]),
        (2, None, [50, 60]),
        (2, 30, [30, 50, 60]),
        (1, 20, [20, 40, 60]),
        (9, 30, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path, keep_last, keep_every, left):
    for step in range(10, 70, 10):
        write_checkpoint(tmp_path, step)
    retention.remove_old(tmp_path, 60, keep_last, keep_every)
    assert steps(tmp_path) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_a_named_checkpoint_is_kept_until_it_is_released(tmp_path):
    made = {step: write_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)}
    retention.keep(tmp_path, made[1], "before-anneal")
    assert retention.name_of(made[1]) == "before-anneal"
    retention.remove_old(tmp_path, 4, 1)
    assert steps(tmp_path) == [1, 4]
    retention.release(made[1])
    assert retention.name_of(made[1]) is None
    retention.remove_old(tmp_path, 4, 1)
    assert steps(tmp_path) == [4]


def test_a_named_checkpoint_does_not_count_as_one_of_the_newest_twice(tmp_path):
    """It is one of the newest keep_last while it is among them, and beside them afterwards."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    retention.keep(tmp_path, folders.checkpoint_folder(tmp_path, 3), "best")
    retention.remove_old(tmp_path, 3, 2)
    assert steps(tmp_path) == [2, 3]
    for step in (4, 5):
        write_checkpoint(tmp_path, step)
        retention.remove_old(tmp_path, step, 2)
    assert steps(tmp_path) == [3, 4, 5]


def test_a_name_file_that_cannot_be_read_still_keeps_its_checkpoint(tmp_path):
    made = [write_checkpoint(tmp_path, step) for step in (1, 2)]
    (made[0] / "name.json").write_text('{"name": "bef')
    retention.remove_old(tmp_path, 2, 1)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "name", ["", "4000", "a b", "../x", "x" * 65, "\u00e9"], ids=["empty", "digits", "space", "path", "long", "accent"]
)
def test_a_name_that_is_none_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path, 1)
    with pytest.raises(CheckpointError, match="is not a name for a checkpoint: 1 to 64 letters"):
        retention.keep(tmp_path, folder, name)
    assert retention.name_of(folder) is None


def test_a_name_is_given_once(tmp_path):
    first, second = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    retention.keep(tmp_path, first, "best")
    with pytest.raises(CheckpointError, match=r"'best' is the name of .*step_0000001; choose another, or release"):
        retention.keep(tmp_path, second, "best")
    retention.keep(tmp_path, first, "better")
    assert retention.name_of(first) == "better"


def test_a_name_is_no_file_of_the_checkpoint_and_stays_with_its_step(tmp_path):
    """A resumed run that saves the step again keeps it under its name; a copied folder has the name too."""
    folder = write_checkpoint(tmp_path, 1)
    retention.keep(tmp_path, folder, "best")
    assert folders.fault_of(folder) is None
    assert "name.json" not in {path.name for path in folders.data_files(folder)}
    again = folder.with_name("step_0000001.partial")
    shutil.copytree(folder, again)
    (again / "name.json").unlink()
    folders.put_in_place(again, folder)
    assert retention.name_of(folder) == "best"
    assert json.loads((folder / "name.json").read_text())["named_at"].endswith("Z")


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path):
    """At every rename and removal of a file: what has a checkpoint's name is whole, and the next start removes the
    rest."""
    killed = 0
    while True:
        run_dir = tmp_path / str(killed)
        for step in (1, 2, 3):
            write_checkpoint(run_dir, step)
        if not killed_at(killed + 1, lambda run_dir=run_dir: retention.remove_old(run_dir, 3, 1)):
            break
        killed += 1
        named = folders.named_checkpoints(run_dir)
        assert [folders.fault_of(folder) for folder in named] == [None] * len(named)
        assert named[-1].name == "step_0000003"
        folders.remove_partials(run_dir)
        retention.remove_old(run_dir, 3, 1)
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_0000003"]
    assert killed == 8, "two renames, and six files"


@pytest.mark.parametrize(
    ("suffix", "is_named", "is_replaced", "comes_back"),
    [
        (".old.partial", False, False, True),
        (".old.partial", False, True, False),
        (".removed.partial", True, False, True),
        (".removed.partial", False, False, False),
        (".partial", False, False, False),
    ],
)
def test_a_whole_checkpoint_between_two_renames_comes_back(tmp_path, suffix, is_named, is_replaced, comes_back):
    folder = write_checkpoint(tmp_path, 1)
    if is_named:
        retention.keep(tmp_path, folder, "best")
    folder.rename(folder.with_name(folder.name + suffix))
    if is_replaced:
        write_checkpoint(tmp_path, 1)
    (line,) = folders.remove_partials(tmp_path)
    assert (f"{folder} is back" in line) == comes_back
    assert folder.exists() == (comes_back or is_replaced)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] * folder.exists()


def test_an_earlier_checkpoint_stays_if_the_new_one_cannot_get_its_name(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 1)
    again = Path(shutil.copytree(folder, folder.with_name("step_0000001.partial")))
    rename = Path.rename

    def refused(path, target):
        if path == again:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no"):
        folders.put_in_place(again, folder)
    assert folders.fault_of(folder) is None


def test_a_kill_while_a_name_is_given_leaves_the_old_name_or_the_new_one(tmp_path):
    killed = 0
    while True:
        folder = write_checkpoint(tmp_path / str(killed), 1)
        retention.keep(tmp_path / str(killed), folder, "old")
        if not killed_at(killed + 1, lambda folder=folder: retention.keep(folder.parents[1], folder, "new")):
            break
        killed += 1
        assert retention.name_of(folder) in ("old", "new")
        assert folders.fault_of(folder) is None
    assert killed == 3, "flushes of file and folder, and the rename between them"
    assert retention.name_of(folder) == "new"


def test_a_name_that_is_given_while_a_checkpoint_is_removed_is_not_lost(tmp_path, monkeypatch):
    """Before it is renamed, it is kept; afterwards, giving the name fails."""
    folder, _ = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    rename = Path.rename

    def named_before(path: Path, target: Path) -> Path:
        if path == folder:
            retention.keep(tmp_path, folder, "just-now")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", named_before)
        retention.remove_old(tmp_path, 2, 1)
    assert steps(tmp_path) == [1, 2]
    assert retention.name_of(folder) == "just-now"
    retention.release(folder)

    def named_after(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path == folder:
            with pytest.raises(CheckpointError, match="it has just been removed, so it cannot be kept"):
                retention.keep(tmp_path, folder, "too-late")
        return moved

    monkeypatch.setattr(Path, "rename", named_after)
    retention.remove_old(tmp_path, 2, 1)
    assert steps(tmp_path) == [2]
