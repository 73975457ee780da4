"""A checkpoint from somewhere else runs nothing: whatever pickle is planted in it, it is refused with one message."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.checkpoint import CheckpointError, folders, save_load
from hunyuan_pretrain.checkpoint.inert_pickle import Inert, UnsafePickleError, name_of, read_pickle
from hunyuan_pretrain.checkpoint.stored import Section, read_index, tensor_record
from hunyuan_pretrain.config.history import RESOLVED
from hunyuan_pretrain.config.load import dump_resolved
from hunyuan_pretrain.diagnostics.parity import trace_steps
from hunyuan_pretrain.train import setup
from hunyuan_pretrain.train.run import Run
from tests.helpers.hostile import PLACES, Command, Expression, change_index, replace_record, saved, sign
from tests.helpers.one_rank import on_this_rank
from tests.helpers.runs import experiment_fields


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with one checkpoint, after one step."""
    run = on_this_rank(experiment_fields(corpus, tmp_path_factory.mktemp("run"), model__num_layers=2))
    trace_steps(run, range(1))
    save_load.save(run.run_dir, 1, run.chunks, run.optimizer, None)
    (run.run_dir / RESOLVED).write_text(dump_resolved(run.experiment))
    return run


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """A copy of its checkpoint in a copy of the run directory."""
    shutil.copytree(run.run_dir, tmp_path / "run")
    return tmp_path / "run/checkpoints/step_0000001"


def resume(run: Run, folder: Path) -> Any:
    return save_load.load_newest(folder.parents[1], run.chunks, run.optimizer)


def branch(run: Run, folder: Path) -> Any:
    return save_load.load(folder, run.chunks, run.optimizer)


def weights_only(run: Run, folder: Path) -> Any:
    return save_load.load(folder, run.chunks, None)


READERS: dict[str, Callable[[Run, Path], Any]] = {
    "resume": resume,
    "resume_from": branch,
    "init_from": weights_only,
}
NOT_READ = {("init_from", "an object"), ("init_from", "a moment")}
"""It takes the weights alone, and does not look at what is beside them."""


@pytest.mark.parametrize("harm", [Command, Expression])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_a_planted_pickle_is_refused_and_does_not_run(run, folder, tmp_path, reader, place, harm):
    trace = tmp_path / "it-ran"
    PLACES[place](folder, harm(f"touch {trace}"))
    if (reader, place) in NOT_READ:
        READERS[reader](run, folder)
    else:
        with pytest.raises(CheckpointError) as error:
            READERS[reader](run, folder)
        name = {Command: r"posix\.system", Expression: r"(builtins|__builtin__)\.eval"}[harm]
        assert re.search(
            rf"refused: it names {name}, which no checkpoint needs; nothing of it has run", str(error.value)
        )
        assert str(error.value).startswith(f"{folder}: ")
        assert "\n" not in str(error.value)
    assert not trace.exists()
    assert folder.exists(), "its digests match: it is not set aside as damaged"


def test_the_export_command_refuses_a_planted_pickle_with_one_message_and_status_2(folder, corpus, tmp_path):
    trace, out = tmp_path / "it-ran", tmp_path / "exported"
    shutil.copytree(corpus / "tokenizer", folder.parents[1] / "tokenizer", dirs_exist_ok=True)
    PLACES["a weight"](folder, Command(f"touch {trace}"))
    command = [sys.executable, "-m", "hunyuan_pretrain", "export", str(folder.parents[1]), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if str(folder) in line]
    assert re.search(r"\.distcp at byte [\d,]+: refused: it names posix\.system", line)
    assert "Traceback" not in done.stderr
    assert not trace.exists()
    assert not out.exists()


def test_the_planted_pickles_would_run_if_python_read_them(folder, tmp_path):
    """What the tests above rely on."""
    for number, harm in enumerate((Command, Expression)):
        trace = tmp_path / f"it-ran-{number}"
        PLACES["the whole index"](folder, harm(f"touch {trace}"))
        pickle.loads((folder / ".metadata").read_bytes())
        assert trace.exists()
        trace.unlink()
        torch.load(io.BytesIO(saved(harm(f"touch {trace}"))), weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("file", ["../../outside", "/etc/hostname", "__9_9.distcp"])
def test_an_index_that_points_outside_the_verified_files_is_refused(run, folder, file):
    def point(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).relative_path = file

    change_index(folder, point)
    with pytest.raises(CheckpointError, match=r"it refers to bytes .*, which is not in complete.json"):
        branch(run, folder)


def test_an_index_with_too_few_values_of_a_tensor_is_refused(run, folder):
    """Memory that nothing fills would hold anything."""

    def drop(metadata: Any) -> None:
        metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks.clear()

    change_index(folder, drop)
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight: the checkpoint holds 0 of [\d,]+ elements"):
        branch(run, folder)


def test_a_record_of_another_shape_than_the_index_says_is_refused(run, folder):
    replace_record(folder, "embedding.word_embeddings", saved(torch.zeros(3)))
    with pytest.raises(CheckpointError, match=r"float32 \(3,\), not float32 \(\d+, \d+\)"):
        branch(run, folder)


def test_a_tensor_that_claims_more_than_its_values_is_refused(run, folder):
    """torch would refuse too; here nobody reads beyond the record."""
    content = saved(torch.zeros(8, 4))
    assert content.count(b"K\x08K\x04\x86") == 1
    replace_record(folder, "embedding.word_embeddings", content.replace(b"K\x08K\x04\x86", b"K\x08K\xff\x86"))
    with pytest.raises(CheckpointError, match=r"a tensor larger than its values|Bad CRC-32"):
        branch(run, folder)


def test_a_compressed_record_is_refused(run, folder):
    """It could unpack to any size."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([0] * 100_000))
    replace_record(folder, "embedding.word_embeddings", content.getvalue())
    with pytest.raises(CheckpointError, match="compressed"):
        branch(run, folder)


def test_an_object_of_python_2s_pickles_with_a_dotted_name_is_refused():
    for content in (b"cos\nsystem\n.", b"\x80\x04\x8c\x05torch\x8c\x10Size.__new__.xyz\x93."):
        with pytest.raises(UnsafePickleError, match="which no checkpoint needs"):
            read_pickle(content, "here", {"torch.Size"})


def test_a_listed_name_stands_for_itself_and_nothing_of_torch_runs_or_changes():
    """Even a listed class is not touched: here a pickle calls one, and sets an attribute of another."""
    content = b"(ctorch\nSize\n(I1\ntRctorch\nSize\n}S'x'\nI1\nsbt."
    with pytest.raises(CheckpointError, match="not a pickle of a checkpoint"):
        read_pickle(content, "here", {"torch.Size"})  # a state for a class, which has none
    made = read_pickle(b"ctorch\nSize\n(I1\ntR.", "here", {"torch.Size"})
    assert isinstance(made, Inert)
    assert (name_of(made), made.values) == ("torch.Size", (1,))
    assert not hasattr(torch.Size, "x")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"N.", b"\x80\x04]\x94.", b"\xff" * 40, pickle.dumps({"a": 1})])
def test_bytes_that_are_no_index_are_refused_with_one_message(content):
    with pytest.raises(CheckpointError, match=r"^\.metadata: not (a pickle|the index) of a checkpoint"):
        read_index(content, {})


def test_every_damaged_index_is_an_index_or_refused(folder):
    """Any byte replaced: nothing else than CheckpointError, whatever the pickle then means."""
    content = (folder / ".metadata").read_bytes()
    sizes = {path.name: path.stat().st_size for path in folders.data_files(folder)}
    refused = 0
    for at in range(0, len(content), 29):
        for value in (content[at] ^ 1, content[at] ^ 0x80):
            try:
                read_index(content[:at] + bytes([value]) + content[at + 1 :], sizes)
            except CheckpointError:
                refused += 1
    assert refused > 100


def test_every_truncated_record_is_refused(tmp_path):
    content = saved(torch.arange(6.0).view(2, 3))
    file = tmp_path / "record"
    for length in range(0, len(content), 17):
        file.write_bytes(content[:length])
        with file.open("rb") as opened, pytest.raises(CheckpointError):
            tensor_record(opened.fileno(), Section("record", 0, length))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(24, dtype=torch.bfloat16).view(4, 6).t(),
        torch.arange(24.0)[3:9].view(2, 3),
        torch.tensor(7.0),
        torch.empty(0, 3),
        torch.arange(6, dtype=torch.uint8),
    ],
    ids=["plain", "transposed", "part of a storage", "scalar", "empty", "bytes"],
)
def test_a_record_describes_any_tensor_that_torch_saves(tmp_path, tensor):
    content = b"before" + saved(tensor) + b"behind"
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as opened:
        record = tensor_record(opened.fileno(), Section("file", 6, len(content) - 12))
    values = torch.frombuffer(
        bytearray(content[record.values.start : record.values.start + record.values.length] or b"\0" * 8),
        dtype=tensor.dtype,
    )
    assert f"torch.{record.dtype}" == str(tensor.dtype)
    assert record.is_contiguous == tensor.is_contiguous()
    assert torch.equal(values.as_strided(record.sizes, record.strides, record.first), tensor)


def test_a_stored_transposed_tensor_loads(run, folder):
    """As every writer of megatron-core may store one: its values are not in the order of its elements."""
    weight = dict(run.chunks[0].named_parameters())["embedding.word_embeddings.weight"]
    expected = torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)
    replace_record(folder, "embedding.word_embeddings", saved(expected.t().contiguous().t()))
    weights_only(run, folder)
    assert torch.equal(weight, expected)
    branch(run, run.run_dir / "checkpoints/step_0000001")


def test_the_values_of_a_record_are_found_behind_a_header_of_any_length(tmp_path):
    """torch aligns values by the length of a field of the header; another writer may do otherwise."""
    content = saved(torch.arange(3.0))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    again = io.BytesIO()
    with zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    (tmp_path / "file").write_bytes(again.getvalue())
    with (tmp_path / "file").open("rb") as opened:
        record = tensor_record(opened.fileno(), Section("file", 0, len(again.getvalue())))
    values = again.getvalue()[record.values.start :][: record.values.length]
    assert struct.unpack("<3f", values) == (0.0, 1.0, 2.0)


def test_a_checkpoint_signed_again_still_loads(run, folder):
    """What the tests above change is what is refused, not that it was changed."""
    change_index(folder, lambda metadata: None)
    sign(folder)
    assert branch(run, folder) == 1
    assert setup.save_load.find_checkpoints(folder.parents[1]) == [folder]
