"""Tokenized folders: Megatron's format, and what is refused."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan_pretrain.data import indexed
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.indexed import Origin, ShardWriter, TokenizedDataset, shard_files, token_dtype
from hunyuan_pretrain.data.packed_dataset import PackedDataset

DOCUMENTS = [[1, 2, 3], [4], list(range(500)), [7, 8]]


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 128166])
def test_files_are_byte_identical_to_those_of_megatrons_builder(
    tmp_path: Path, tokenized: Callable[..., Path], vocab_size: int
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    ours = tokenized("ours", DOCUMENTS, vocab_size=vocab_size)
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=DType.optimal_dtype(vocab_size))
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    assert (ours / "shard_00000.bin").read_bytes() == (tmp_path / "megatron.bin").read_bytes()
    assert (ours / "shard_00000.idx").read_bytes() == (tmp_path / "megatron.idx").read_bytes()


def test_megatron_reads_what_we_write_and_so_do_we(tokenized: Callable[..., Path]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder = tokenized("ours", DOCUMENTS)
    megatron, ours = IndexedDataset(str(folder / "shard_00000")), TokenizedDataset(folder)
    assert len(megatron) == ours.num_documents == len(DOCUMENTS)
    for number, ids in enumerate(DOCUMENTS):
        assert megatron[number].tolist() == ours.document(number).tolist() == ids
    assert [ours.shards[0].start(number) for number in (3, 0)] == [504, 0]
    ours.verify()


def test_documents_are_numbered_across_shards_and_record_their_origin(tokenized: Callable[..., Path]) -> None:
    dataset = TokenizedDataset(tokenized("ours", DOCUMENTS, documents_per_shard=3))
    assert [shard.num_documents for shard in dataset.shards] == [3, 1]
    assert [dataset.document(number).tolist() for number in range(4)] == DOCUMENTS
    assert dataset.lengths.tolist() == [3, 1, 500, 2]
    assert dataset.origin(3) == Origin("corpus.jsonl", 3)
    with pytest.raises(IndexError):
        dataset.document(4)
    with pytest.raises(IndexError):
        dataset.document(-1)


@pytest.mark.parametrize("vocab_size", [1000, 128166])
def test_the_bytes_do_not_depend_on_the_dtype_of_the_ids(tmp_path: Path, vocab_size: int) -> None:
    """Engines give signed or unsigned 32-bit ids, and a slice of them need not be contiguous."""
    ids, digests = np.arange(600, dtype=np.int64)[::2], []
    for number, tokens in enumerate(
        (ids, ids.astype(np.int32), ids.astype(np.uint32), np.repeat(ids.astype(np.uint32), 2)[::2])
    ):
        writer = ShardWriter(tmp_path, f"shard_{number}", vocab_size)
        writer.add(tokens, np.array([len(ids)]), np.array([[0, 0]]))
        digests.append(writer.finish()["sha256"][f"shard_{number}.bin"])
        assert (tmp_path / f"shard_{number}.bin").read_bytes() == ids.astype(token_dtype(vocab_size)).tobytes()
    assert len(set(digests)) == 1


def test_a_document_in_parts_is_rolled_back_when_it_fails(tmp_path: Path) -> None:
    def parts(fail: bool) -> Iterator[np.ndarray]:
        yield np.array([7, 8])
        if fail:
            raise ValueError("bad text")
        yield np.array([9])

    for folder, failures in ((tmp_path / "a", (False, True, False)), (tmp_path / "b", (False, False))):
        folder.mkdir()
        writer = ShardWriter(folder, "shard_00000", 1000)
        for fail in failures:
            with pytest.raises(ValueError, match="bad text") if fail else nullcontext():
                assert writer.add_in_parts(parts(fail), (0, 5)) == 3
        entry = writer.finish()
        assert (entry["documents"], entry["tokens"]) == (2, 6)
    for name in shard_files("shard_00000"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_shard_without_documents_is_read(tokenized: Callable[..., Path], tmp_path: Path) -> None:
    folder = tokenized("t", [[1, 2]])
    entry = ShardWriter(folder, "shard_00001", 1000).finish()
    manifest = json.loads((folder / "manifest.json").read_text())
    change_manifest(folder, shards=[*manifest["shards"], entry])
    dataset = TokenizedDataset(folder)
    assert (dataset.num_documents, len(dataset.shards)) == (1, 2)
    dataset.verify()


def handles() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts handles as Linux lists them")
def test_a_process_keeps_few_shards_mapped(
    packed: Callable[..., Path], numbered_documents: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a packed folder maps none of its shards, reading it no more than the bound, and reading all lengths
    neither."""
    monkeypatch.setattr(indexed, "_mapped", lru_cache(maxsize=3)(indexed._mapped.__wrapped__))
    documents = numbered_documents(30)
    folder = packed("p", documents, 64, documents_per_shard=1)
    indexed._mapped.cache_clear()
    before = handles()
    dataset = PackedDataset(folder)
    of_arrays = handles()
    assert of_arrays - before == 6
    tokens = [set(dataset[number].tokens.tolist()) for number in range(len(dataset))]
    assert set().union(*tokens) - {999} == {token for document in documents for token in document}
    assert of_arrays < handles() <= of_arrays + 2 * 3
    assert len(dataset.index.sources[0].lengths) == 30
    assert handles() <= of_arrays + 2 * 3
    assert TokenizedDataset(f"{folder}_tokens").document(7).tolist() == documents[7]
    assert handles() <= of_arrays + 2 * 3


def test_a_shard_is_checked_when_it_is_used_if_not_at_opening(tokenized: Callable[..., Path]) -> None:
    folder = tokenized("t", DOCUMENTS, documents_per_shard=3)
    (folder / "shard_00001.bin").write_bytes(b"")
    dataset = TokenizedDataset(folder, check_shards=False)
    assert dataset.document(0).tolist() == DOCUMENTS[0]
    for use in (lambda: dataset.document(3), lambda: dataset.lengths, dataset.shards[1].check):
        with pytest.raises(DataFormatError, match=r"shard_00001\.bin: cut short, 0 bytes where 4 are expected"):
            use()


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_truncated_bin_is_refused(tokenized: Callable[..., Path]) -> None:
    folder = tokenized("t", DOCUMENTS)
    content = (folder / "shard_00000.bin").read_bytes()
    (folder / "shard_00000.bin").write_bytes(content[:-2])
    with pytest.raises(DataFormatError, match=r"shard_00000\.bin: cut short, 1,010 bytes where 1,012 are expected"):
        TokenizedDataset(folder)


def test_an_idx_of_another_corpus_is_refused(tokenized: Callable[..., Path]) -> None:
    folder, other = tokenized("t", DOCUMENTS), tokenized("other", [[1, 2, 3, 4], [5], list(range(500)), [7, 8]])
    (folder / "shard_00000.idx").write_bytes((other / "shard_00000.idx").read_bytes())
    with pytest.raises(DataFormatError, match=r"shard_00000\.bin: cut short"):
        TokenizedDataset(folder)
    (folder / "shard_00000.bin").write_bytes((other / "shard_00000.bin").read_bytes())
    with pytest.raises(
        DataFormatError,
        match=r"shard_00000\.idx: describes 507 tokens, the manifest 506; the two do not belong together",
    ):
        TokenizedDataset(folder)


def test_an_idx_of_the_same_shape_is_found_by_its_digest(tokenized: Callable[..., Path]) -> None:
    folder, other = tokenized("t", [[1, 2], [3]]), tokenized("other", [[1], [2, 3]])
    (folder / "shard_00000.idx").write_bytes((other / "shard_00000.idx").read_bytes())
    with pytest.raises(DataFormatError, match=r"shard_00000\.idx: SHA-256 .* the manifest says"):
        TokenizedDataset(folder).verify()


def test_an_invalid_idx_is_refused(tokenized: Callable[..., Path]) -> None:
    folder = tokenized("t", DOCUMENTS)
    size = (folder / "shard_00000.idx").stat().st_size
    (folder / "shard_00000.idx").write_bytes(b"x" * size)
    with pytest.raises(DataFormatError, match="not an index of version 1 with uint16 or int32 ids"):
        TokenizedDataset(folder)
    (folder / "shard_00000.idx").write_bytes(b"")
    with pytest.raises(DataFormatError, match=r"shard_00000\.idx: cut short, 0 bytes"):
        TokenizedDataset(folder)


def test_ids_of_the_wrong_dtype_for_the_vocabulary_are_refused(tokenized: Callable[..., Path]) -> None:
    folder = tokenized("t", DOCUMENTS)
    change_manifest(folder, vocab_size=128166)
    with pytest.raises(DataFormatError, match="uint16 ids, expected int32 for a vocabulary of 128166"):
        TokenizedDataset(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shard_00000.bin").unlink(), r"shard_00000\.bin: missing; write the folder again"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            r"manifest\.json: missing; give a folder written by `hunyuan-data tokenize`",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: not valid JSON"),
        (lambda folder: change_manifest(folder, format="hunyuan-packed"), "hunyuan-packed, expected hunyuan-tokenized"),
        (lambda folder: change_manifest(folder, version=1), "version 1, this program reads version 2"),
        (lambda folder: change_manifest(folder, tokens="many"), r"tokens is 'many', expected a value of type int"),
        (lambda folder: change_manifest(folder, documents=0), "holds no document"),
        (
            lambda folder: change_manifest(folder, documents=-1),
            r"documents is -1, expected a number from 0 to 2\^63 - 1",
        ),
        (
            lambda folder: change_manifest(folder, pad_id=1000),
            "pad_id is 1000, but the vocabulary has the ids 0 to 999",
        ),
        (
            lambda folder: change_manifest(folder, shards=[7]),
            r"manifest\.json: a JSON object with name is expected, found int",
        ),
        (
            lambda folder: change_manifest(folder, tokenizer_digest="\ud800"),
            r"manifest\.json: not valid JSON .*surrogates not allowed",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text("[" * 9999),
            r"manifest\.json: not valid JSON .*recursion",
        ),
        (
            lambda folder: change_manifest(folder, documents=5),
            "its shards hold 4 documents and 506 tokens, its manifest says 5 and 506",
        ),
        (lambda folder: change_manifest(folder, shards=[{"name": "shard_00000"}]), "documents is missing"),
    ],
)
def test_a_damaged_folder_is_refused(
    tokenized: Callable[..., Path], damage: Callable[[Path], object], message: str
) -> None:
    folder = tokenized("t", DOCUMENTS)
    damage(folder)
    with pytest.raises(DataFormatError, match=message):
        TokenizedDataset(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"nowhere: no such folder; write it with `hunyuan-data tokenize`"):
        TokenizedDataset(tmp_path / "nowhere")
