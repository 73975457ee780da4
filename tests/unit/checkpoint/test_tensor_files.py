"""Shards written and read one tensor at a time are those of the safetensors library."""

from __future__ import annotations

import json
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hunyuan_pretrain.checkpoint import CheckpointError, tensor_files
from hunyuan_pretrain.checkpoint.tensor_files import INDEX, SINGLE, ShardWriter, StoredTensors, TensorSpec

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def tensors() -> dict[str, torch.Tensor]:
    """One of each dtype, odd sizes first, so that a file in this order would misalign the wide ones."""
    generator = torch.Generator().manual_seed(0)
    found = {
        str(dtype): (torch.randn(3, 5, generator=generator) * 4).to(dtype)
        for dtype in sorted(DTYPES, key=lambda d: d.itemsize)
    }
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "名": torch.arange(7)}


def specs(given: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}


def written(folder: Path, given: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> ShardWriter:
    writer = ShardWriter(folder, specs(given), max_shard_bytes)
    writer.create()
    for name in reversed(given):
        writer.write(name, given[name])
    writer.finish()
    return writer


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 130])
def test_the_library_reads_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    given = tensors()
    written(tmp_path, given, max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) == (max_shard_bytes == 130)
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    assert {name: (t.dtype, t.shape, bits(t)) for name, t in found.items()} == {
        name: (t.dtype, t.shape, bits(t)) for name, t in given.items()
    }
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"].keys() == given.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in given.values())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 130])
def test_what_was_written_is_read(tmp_path: Path, max_shard_bytes: int) -> None:
    given = tensors()
    written(tmp_path, given, max_shard_bytes)
    stored = StoredTensors(tmp_path)
    assert set(stored) == set(given)
    assert all(
        bits(stored[name]) == bits(tensor) and stored[name].shape == tensor.shape for name, tensor in given.items()
    )
    assert {name: stored.spec(name) for name in stored} == specs(given)


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    given = tensors()
    save_file(given, tmp_path / SINGLE)
    stored = StoredTensors(tmp_path)
    assert all(bits(stored[name]) == bits(tensor) for name, tensor in given.items())


def test_two_writers_share_the_files(tmp_path: Path) -> None:
    given = tensors()
    first, second = (ShardWriter(tmp_path, specs(given), 130) for _ in range(2))
    first.create()
    names = list(given)
    for name in names[::2]:
        second.write(name, given[name])
    with pytest.raises(CheckpointError, match=f"{len(names)} tensors were never written"):
        first.finish()
    for name in names[1::2]:
        first.write(name, given[name])
    first.finish(set(names[::2]))
    assert all(bits(StoredTensors(tmp_path)[name]) == bits(given[name]) for name in names)


def test_a_tensor_is_cast_and_has_to_fit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": TensorSpec(torch.bfloat16, (2, 3))})
    writer.create()
    with pytest.raises(CheckpointError, match=r"a: shape \(3, 2\), but the folder has \(2, 3\)"):
        writer.write("a", torch.zeros(3, 2))
    with pytest.raises(CheckpointError, match=r"b: .*no such tensor"):
        writer.write("b", torch.zeros(2, 3))
    strided = torch.arange(6.0).view(3, 2).t()
    writer.write("a", strided)
    assert torch.equal(StoredTensors(tmp_path)["a"], strided.bfloat16())


def test_a_disk_without_room_is_refused_before_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(tensor_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="only 1e-09 GB are free"):
        ShardWriter(tmp_path, {"a": TensorSpec(torch.float32, (9,))}).create()
    assert not list(tmp_path.iterdir())


# --- damaged files ----------------------------------------------------------------------------------------------------


def header(path: Path, content: object) -> None:
    text = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "damaged header"),
        ({"a": 1}, "damaged header"),
        ({"a": A | {"dtype": "F4"}}, "damaged header: KeyError.*F4"),
        ({"a": A | {"shape": [3]}}, "its shape needs 12"),
        ({"a": A | {"shape": [-2], "data_offsets": [8, 0]}}, "damaged header"),
        ({"a": A | {"shape": ["2"]}}, "damaged header"),
        ({"a": A | {"data_offsets": [-8, 0]}}, "damaged header"),
        ({"a": A | {"data_offsets": [8, 16]}}, "has [0-9]+ bytes, its header describes"),
        ({}, "has [0-9]+ bytes, its header describes"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, content: object, message: str) -> None:
    header(tmp_path / SINGLE, content)
    with pytest.raises(CheckpointError, match=message):
        StoredTensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, kept: int) -> None:
    written(tmp_path, tensors(), 130)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=path.name):
        StoredTensors(tmp_path)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    written(tmp_path, {"a": torch.zeros(1000)})
    stored = StoredTensors(tmp_path)
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(500)
    with pytest.raises(CheckpointError, match="ends in the middle of a"):
        stored["a"]


def test_an_index_has_to_fit_its_shards(tmp_path: Path) -> None:
    written(tmp_path, tensors(), 130)
    index = json.loads((tmp_path / INDEX).read_text())
    names = list(index["weight_map"])

    def refusal(**changes: object) -> str:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | changes}))
        with pytest.raises(CheckpointError) as raised:
            StoredTensors(tmp_path)
        return str(raised.value)

    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][names[0]])
    assert f"disagree about {names[0]}" in refusal(**{names[0]: other})
    assert "disagree about more" in refusal(more=other)
    assert "is missing" in refusal(**{names[0]: "model-9.safetensors"})
    assert "no file of this folder" in refusal(**{names[0]: "../model.safetensors"})
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        StoredTensors(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        StoredTensors(tmp_path)
