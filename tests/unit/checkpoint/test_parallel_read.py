"""Reading any rectangle of a stored tensor into any memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.checkpoint import CheckpointError, parallel_read
from hunyuan_pretrain.checkpoint.parallel_read import Region, read_tensors
from hunyuan_pretrain.checkpoint.stored import Chunk, Index, Section, StoredTensor
from tests.helpers.hostile import saved

SHAPE = (7, 5, 3)
WHOLE = torch.arange(105, dtype=torch.float32).view(SHAPE)


def stored(folder: Path, cuts: tuple[int, int], dtype: torch.dtype = torch.float32) -> Index:
    """WHOLE in four chunks, cut along its first two dims, in two files."""
    chunks, contents = [], [b"", b""]
    for row in (slice(0, cuts[0]), slice(cuts[0], SHAPE[0])):
        for column in (slice(0, cuts[1]), slice(cuts[1], SHAPE[1])):
            part = WHOLE[row, column].to(dtype).clone()
            file = len(chunks) % 2
            content = saved(part)
            section = Section(f"__{file}_0.distcp", len(contents[file]), len(content))
            contents[file] += content
            chunks.append(Chunk((row.start, column.start, 0), tuple(part.shape), section))
    for file, content in enumerate(contents):
        (folder / f"__{file}_0.distcp").write_bytes(content)
    return Index({"w": StoredTensor(str(dtype).removeprefix("torch."), SHAPE, chunks)}, {})


def written(folder: Path) -> dict[str, dict[str, Any]]:
    """What complete.json says of the files."""
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }


def window(draw: Any) -> tuple[slice, ...]:
    starts = [draw(st.integers(0, size - 1)) for size in SHAPE]
    return tuple(slice(start, draw(st.integers(start + 1, size))) for start, size in zip(starts, SHAPE, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_rectangle_is_read_from_any_chunks(tmp_path_factory, data):
    """Also into memory of another dtype, into a part of a larger tensor, and while any of the files are verified."""
    folder = tmp_path_factory.mktemp("read")
    cuts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    index = stored(folder, cuts)
    where = window(data.draw)
    expected = WHOLE[where]
    memory = torch.full(
        (*expected.shape[:2], 5), -1.0, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    )
    is_strided = data.draw(st.booleans())
    target = memory[..., : expected.shape[2]] if is_strided else torch.full(expected.shape, -1.0, dtype=memory.dtype)
    again = torch.empty(SHAPE)
    regions = [
        Region("w", target, SHAPE, tuple(one.start for one in where)),
        Region("w", again, SHAPE, (0, 0, 0)),
    ]
    verify = {name: file for name, file in written(folder).items() if data.draw(st.booleans())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_read, "BLOCK_BYTES", data.draw(st.sampled_from([1, 64, 1 << 20])))
        patch.setattr(parallel_read, "PIECE_BYTES", data.draw(st.sampled_from([7, 512, 1 << 20])))
        read_tensors(folder, index, regions, verify)
    assert torch.equal(again, WHOLE), "bytes that two regions want are in both"
    assert torch.equal(target, expected.to(memory.dtype))
    if is_strided:
        assert (memory[..., expected.shape[2] :] == -1).all(), "what is beside the target is untouched"


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Bytes read so far."""
    count, read = [0], os.preadv

    def counted(descriptor: int, buffers: list[Any], start: int) -> int:
        done = read(descriptor, buffers, start)
        count[0] += done
        return done

    monkeypatch.setattr(os, "preadv", counted)
    return count


def test_a_file_is_verified_while_it_is_read_and_its_values_are_read_once(tmp_path, count):
    rows = 50_000
    content = saved(torch.arange(rows * 3.0).view(rows, 3))
    (tmp_path / "__0_0.distcp").write_bytes(content)
    chunk = Chunk((0, 0), (rows, 3), Section("__0_0.distcp", 0, len(content)))
    target = torch.zeros(rows, 3)
    region, index = (
        Region("w", target, (rows, 3), (0, 0)),
        Index({"w": StoredTensor("float32", (rows, 3), [chunk])}, {}),
    )
    read_tensors(tmp_path, index, [region], written(tmp_path))
    assert torch.equal(target.view(-1), torch.arange(rows * 3.0))
    assert len(content) <= count[0] < len(content) + 20_000, "beside the file only the description of the record"


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer"])
def test_any_damage_to_a_file_is_found_while_it_is_read(tmp_path, damage, wanted):
    """At any place, also where no tensor lies, and where nothing of the file is wanted."""
    index = stored(tmp_path, (4, 4))
    verify, file = written(tmp_path), tmp_path / "__1_0.distcp"
    content = file.read_bytes()
    for at in range(0, len(content), 37):
        if damage == "flipped":
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        else:
            file.write_bytes(content[:at] if damage == "cut" else content + content[: at + 1])
        with pytest.raises(CheckpointError, match=r"__1_0.distcp"):
            read_tensors(tmp_path, index, [Region("w", torch.empty(SHAPE), SHAPE, (0, 0, 0))] * wanted, verify)


def test_only_the_rows_of_a_rectangle_are_read(tmp_path, count):
    index = stored(tmp_path, (4, 4))
    read_tensors(tmp_path, index, [Region("w", torch.empty(1, 4, 3), SHAPE, (2, 0, 0))])
    described = count[0]
    count[0] = 0
    read_tensors(tmp_path, index, [Region("w", torch.empty(3, 4, 3), SHAPE, (1, 0, 0))])
    assert count[0] - described == 2 * 4 * 3 * 4, "two more rows of 48 bytes"


def test_whole_rows_are_read_into_their_place_without_a_copy(tmp_path, monkeypatch):
    index = stored(tmp_path, (4, 4))
    monkeypatch.setattr(torch, "empty", None)
    target = torch.zeros(3, 4, 3)
    read_tensors(tmp_path, index, [Region("w", target, SHAPE, (1, 0, 0))])
    assert torch.equal(target, WHOLE[1:4, :4])


def test_a_dimension_of_length_1_may_have_any_stride(tmp_path):
    """As the scales of one expert among several: such a tensor is contiguous, and cannot be viewed as bytes."""
    index = stored(tmp_path, (4, 4))
    target = torch.zeros(9)[::3][1:2].view(1, 1, 1)
    assert target.is_contiguous()
    assert target.stride(-1) != 1
    read_tensors(tmp_path, index, [Region("w", target, SHAPE, (2, 1, 2))])
    assert target.item() == WHOLE[2, 1, 2]
    content = saved(torch.tensor([5.0]))
    (tmp_path / "s").write_bytes(content)
    scalar = Index({"s": StoredTensor("float32", (1,), [Chunk((0,), (1,), Section("s", 0, len(content)))])}, {})
    target = torch.zeros(9)[::3][1:2]
    read_tensors(tmp_path, scalar, [Region("s", target, (1,), (0,))])
    assert target.item() == 5.0


@pytest.mark.parametrize(
    ("region", "words"),
    [
        (Region("v", torch.empty(SHAPE), SHAPE, (0, 0, 0)), "v is not in the checkpoint"),
        (
            Region("w", torch.empty(7, 5, 4), (7, 5, 4), (0, 0, 0)),
            r"w has shape \(7, 5, 3\) in the checkpoint, \(7, 5, 4\) here",
        ),
        (Region("w", torch.empty(7, 5, 3), SHAPE, (3, 0, 0)), "w: the checkpoint holds 60 of 105 elements"),
    ],
)
def test_what_the_checkpoint_does_not_hold_is_refused(tmp_path, region, words):
    index = stored(tmp_path, (4, 4))
    with pytest.raises(CheckpointError, match=words):
        read_tensors(tmp_path, index, [region])


def test_a_file_that_ends_too_early_is_refused(tmp_path):
    index = stored(tmp_path, (4, 4))
    os.truncate(tmp_path / "__1_0.distcp", 200)
    with pytest.raises(CheckpointError, match=r"__1_0.distcp"):
        read_tensors(tmp_path, index, [Region("w", torch.empty(SHAPE), SHAPE, (0, 0, 0))])
