"""A flipped bit or a truncation, in any file of a checkpoint: found, said, and the newest good one taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hunyuan_pretrain.checkpoint import CheckpointError, folders, listing, save_load
from hunyuan_pretrain.diagnostics.parity import trace_steps
from hunyuan_pretrain.train.run import Run
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields

Damage = Callable[[Path], None]


def flip(part: float) -> Damage:
    """Flip a bit of the byte at this part of the file."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[min(int(part * len(content)), len(content) - 1)] ^= 4
        file.write_bytes(content)

    return damage


def cut(part: float) -> Damage:
    return lambda file: os.truncate(file, min(int(part * file.stat().st_size), file.stat().st_size - 1))


def lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


DAMAGE: dict[str, Damage] = {
    **{f"a bit flipped at {part:.0%}": flip(part) for part in (0.0, 0.3, 0.5, 0.9, 1.0)},
    **{f"cut at {part:.0%}": cut(part) for part in (0.0, 0.01, 0.5, 1.0)},
    "longer by a byte": lengthen,
}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with checkpoints after steps 1 and 2."""
    run = on_this_rank(experiment_fields(corpus, tmp_path_factory.mktemp("run"), model__num_layers=2))
    for step in (1, 2):
        trace_steps(run, range(step - 1, step))
        save_load.save(run.run_dir, step, run.chunks, run.optimizer, None)
    return run


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """A copy of the run directory."""
    return Path(shutil.copytree(run.run_dir, tmp_path / "run"))


def kinds(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints/step_0000002").iterdir() if path.name != folders.MARKER)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_to_any_file_is_found_and_said_and_the_older_checkpoint_taken(run, copy, damage):
    """The index, each rank's tensors, and what is common to all: one after another."""
    newest = copy / "checkpoints/step_0000002"
    names = kinds(copy)
    assert {".metadata", "__0_0.distcp"} <= set(names)
    for name in names:
        good = (newest / name).read_bytes()
        damage(newest / name)
        words = f"{name} is missing or damaged: its size or sha256 is not the one in complete.json"
        (entry,) = [entry for entry in listing.entries(copy) if entry.step == 2]
        assert listing.verify(entry, lambda done, total: None) == words
        with pytest.raises(CheckpointError, match=name):
            save_load.load(newest, run.chunks, run.optimizer)
        resumed = save_load.load_newest(copy, run.chunks, run.optimizer)
        assert resumed is not None
        aside = newest.with_name("step_0000002.damaged")
        assert (resumed.folder.name, resumed.notes) == (
            "step_0000001",
            [f"WARNING: {newest} is not used: {words}; it is now {aside.name}"],
        )
        aside.rename(newest)
        (newest / name).write_bytes(good)
    resumed = save_load.load_newest(copy, run.chunks, run.optimizer)
    assert resumed is not None
    assert (resumed.folder, resumed.notes) == (newest, [])


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_to_the_marker_is_found_and_said(run, copy, damage):
    newest = copy / "checkpoints/step_0000002"
    damage(newest / folders.MARKER)
    resumed = save_load.load_newest(copy, run.chunks, run.optimizer)
    assert resumed is not None
    assert resumed.folder.name == "step_0000001"
    assert "complete.json" in resumed.notes[0]


def test_no_flipped_bit_changes_what_a_marker_says(copy):
    """Any bit of any byte: the marker is refused, or says what was written."""
    marker = copy / "checkpoints/step_0000002" / folders.MARKER
    written = folders.read_marker(marker.parent)
    content = marker.read_bytes()
    refused = 0
    for at in range(len(content)):
        marker.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            found = folders.read_marker(marker.parent)
        except CheckpointError:
            refused += 1
            continue
        assert all(found[key] == value for key, value in written.items() if key != folders.SELF), at
    assert refused > len(content) // 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_file_is_verified_by_one_rank_and_by_its_writer_in_a_world_of_the_same_size(ranks):
    names = [f"__{rank}_{number}.distcp" for rank in range(8) for number in range(2)] + [".metadata", "common.pt"]
    shares = [folders.share_to_verify(names, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    if ranks == 8:
        assert all({f"__{rank}_0.distcp", f"__{rank}_1.distcp"} <= set(shares[rank]) for rank in range(8))
