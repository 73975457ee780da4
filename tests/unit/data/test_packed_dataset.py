"""Packed sequences: which token is predicted from which, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.packed_output import pack
from hunyuan_pretrain.data.epochs import NO_LIMIT
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.packed_dataset import PackedDataset, PackedSequence
from hunyuan_pretrain.data.packed_format import PackedIndex, check_sources

PAD = 999


def test_one_sequence_by_hand(packed: Callable[..., Path]) -> None:
    dataset = PackedDataset(packed("p", [[1, 2, 3], [11, 12]], 8))
    sequence = dataset[0]
    assert len(dataset) == 1
    assert sequence.tokens.tolist() == [1, 2, 3, 11, 12, PAD, PAD, PAD]
    assert sequence.labels.tolist() == [2, 3, PAD, 12, PAD, PAD, PAD, PAD]
    assert sequence.loss_mask.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert sequence.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert sequence.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert [str(a.dtype) for a in (sequence.tokens, sequence.loss_mask, sequence.cu_seqlens)] == [
        "int32",
        "bool",
        "int32",
    ]


def test_a_cut_document_predicts_its_own_next_token_beyond_the_cut(packed: Callable[..., Path]) -> None:
    dataset = PackedDataset(packed("p", [list(range(1, 11))], 4))
    sequences = {int(s.tokens[0]): s for s in (dataset[i] for i in range(len(dataset)))}
    assert sequences[1].labels.tolist() == [2, 3, 4, 5]
    assert sequences[5].labels.tolist() == [6, 7, 8, 9]
    assert sequences[5].positions.tolist() == [0, 1, 2, 3]
    assert sequences[9].tokens.tolist() == [9, 10, PAD, PAD]
    assert sequences[9].loss_mask.tolist() == [1, 0, 0, 0]
    assert sequences[5].cu_seqlens.tolist() == [0, 4]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), sequence_length=st.sampled_from([8, 16, 64]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_never_crosses_documents_and_misses_no_token(
    lengths: list[int], sequence_length: int, tmp_path: Path, packed: Callable[..., Path]
) -> None:
    """Every pair of neighbours within a document is predicted exactly once, and nothing else."""
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    starts = np.cumsum([0, *lengths])
    # Ids are unique in the corpus, so a pair identifies its position.
    documents = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    dataset = PackedDataset(packed("p", documents, sequence_length, vocab_size=70_000))
    pairs = []
    for number in range(len(dataset)):
        sequence = dataset[number]
        counted = sequence.loss_mask == 1
        pairs += list(zip(sequence.tokens[counted].tolist(), sequence.labels[counted].tolist(), strict=True))
        assert (sequence.labels[~counted] == PAD).all()
        assert sequence.cu_seqlens[0] == 0
        assert sequence.cu_seqlens[-1] == sequence_length
        sizes = np.diff(sequence.cu_seqlens)
        assert (sizes > 0).all()
        assert sequence.positions.tolist() == [position for size in sizes for position in range(size)]
    assert sorted(pairs) == [(ids[i], ids[i + 1]) for ids in documents for i in range(len(ids) - 1)]


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_a_materialized_dataset_gives_the_same_sequences_without_its_sources(
    packed: Callable[..., Path], vocab_size: int
) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 900, length).tolist() for length in (1, 2, 3, 5, 8, 13, 21, 40, 16, 15, 17, 33)]
    index = PackedDataset(packed("index", documents, 16, vocab_size=vocab_size, documents_per_shard=5))
    folder = packed("copy", documents, 16, vocab_size=vocab_size, documents_per_shard=5, materialize=True)
    origin = PackedDataset(folder).index.locate(3)[0].origin(3)
    shutil.rmtree(f"{folder}_tokens")
    copy = PackedDataset(folder)
    assert len(copy) == len(index)
    for number in range(len(index)):
        for field in dataclasses.fields(PackedSequence):
            one, other = getattr(index[number], field.name), getattr(copy[number], field.name)
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist(), field.name
    copy.index.verify()
    assert origin.path == "corpus.jsonl"
    with pytest.raises(
        DataFormatError, match="copy_tokens does not exist; move a packed folder together with what it was packed from"
    ):
        copy.index.locate(3)
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])
    with pytest.raises(DataFormatError, match=r"tokens\.bin: cut short"):
        PackedDataset(folder)


def test_several_sources_are_packed_as_one_list_of_documents(tmp_path: Path, tokenized: Callable[..., Path]) -> None:
    tokenized("a", [[1, 2], [3]])
    tokenized("b", [[4, 5, 6, 7, 8], [9]], documents_per_shard=1)
    pack([str(tmp_path / name) for name in "ab"], 4, str(tmp_path / "p"), seed=0)
    dataset = PackedDataset(tmp_path / "p")
    seen = sorted(token for i in range(len(dataset)) for token in dataset[i].tokens.tolist() if token != PAD)
    assert seen == list(range(1, 10))
    dataset.index.verify()


def test_a_dataset_can_be_moved_with_its_sources(tmp_path: Path, packed: Callable[..., Path]) -> None:
    before = PackedDataset(packed("here/p".replace("/", "_"), [[1, 2, 3]], 4))[0].tokens.tolist()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("here_p", "here_p_tokens"):
        shutil.move(tmp_path / name, moved / name)
    assert PackedDataset(moved / "here_p")[0].tokens.tolist() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, r"manifest\.json: names no source; pack again"),
        ({"sequence_length": 2**60}, "in 1 sequences of 1152921504606846976 tokens each, which must be 1 to 16777216"),
        ({"cut_documents": 3}, "of 2 documents 2 packed and 3 cut; pack again"),
        ({"sha256": {}}, r"sequence_offsets\.npy: SHA-256 .*, the manifest says None"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    packed: Callable[..., Path], changes: dict, message: str
) -> None:
    folder = packed("p", [[1, 2], [3]], 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(DataFormatError, match=message):
        PackedDataset(folder).index.verify()


@pytest.mark.parametrize("name", ["piece_document", "piece_start", "piece_length"])
def test_invalid_pieces_are_refused(packed: Callable[..., Path], name: str) -> None:
    folder = packed("p", [[1, 2, 3], [4]], 8)
    array = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", np.zeros_like(array) if name == "piece_length" else np.full_like(array, 60_000))
    with pytest.raises(
        DataFormatError, match=r"sequence 0 cannot be read \(|sequence 0 has no piece, or one without a token"
    ):
        PackedDataset(folder)[0]


def test_sources_of_two_tokenizers_are_refused(tokenized: Callable[..., Path]) -> None:
    a, b = TokenizedDataset(tokenized("a", [[1]])), TokenizedDataset(tokenized("b", [[1]], digest="e" * 64))
    with pytest.raises(DataFormatError, match=r"b: tokenizer eeeeeeeeeeee\.\.\., but .*a has dddddddddddd\.\.\."):
        check_sources([a, b])
    with pytest.raises(DataFormatError, match="a: given twice"):
        check_sources([a, a])


def test_another_tokenizer_is_refused(packed: Callable[..., Path]) -> None:
    folder = packed("p", [[1, 2]], 4)
    assert len(PackedDataset(folder, "d" * 64)) == 1
    with pytest.raises(
        DataFormatError, match=r"p: tokenized with tokenizer dddddddddddd\.\.\., but this run has 123456789012"
    ):
        PackedDataset(folder, "1234567890123")


def drop_pieces(folder: Path) -> None:
    np.save(folder / "piece_start.npy", np.load(folder / "piece_start.npy")[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "piece_start.npy").unlink(), r"piece_start\.npy: missing; write the folder again"),
        (
            lambda folder: (folder / "piece_start.npy").write_bytes(b"\x93NUMPY"),
            r"piece_start\.npy: not readable as a numpy array",
        ),
        (
            lambda folder: (folder / "piece_start.npy").write_bytes(b""),
            r"piece_start\.npy: not readable as a numpy array",
        ),
        (drop_pieces, r"piece_start\.npy: uint16 of shape \(1,\), the manifest describes 2 integers"),
        (
            lambda folder: np.save(folder / "sequence_offsets.npy", np.array([0, 1])),
            r"sequence_offsets\.npy: does not belong",
        ),
        (lambda folder: shutil.rmtree(f"{folder}_tokens"), r"p_tokens does not exist"),
    ],
)
def test_a_damaged_folder_is_refused(
    packed: Callable[..., Path], damage: Callable[[Path], object], message: str
) -> None:
    folder = packed("p", [[1, 2], [3]], 4)
    damage(folder)
    with pytest.raises(DataFormatError, match=message):
        PackedDataset(folder)


def test_sources_tokenized_again_are_refused(packed: Callable[..., Path], tokenized: Callable[..., Path]) -> None:
    folder = packed("p", [[1, 2], [3]], 4)
    shutil.rmtree(f"{folder}_tokens")
    tokenized("p_tokens", [[1, 2], [4]])
    with pytest.raises(
        DataFormatError, match=r"p_tokens: was tokenized again after .*p was packed from it; pack again"
    ):
        PackedDataset(folder)


def test_a_packed_folder_moved_without_its_sources_names_what_is_missing(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed("p", [[1, 2], [3]], 4)
    moved = tmp_path / "elsewhere/q"
    shutil.copytree(folder, moved)
    with pytest.raises(
        DataFormatError,
        match=r"q: packed from the tokenized folder \.\./p_tokens, but .*elsewhere/p_tokens does not exist",
    ):
        PackedDataset(moved)


def test_verify_finds_a_changed_byte(packed: Callable[..., Path]) -> None:
    folder = packed("p", [[1, 2], [3]], 4)
    np.save(folder / "piece_document.npy", np.load(folder / "piece_document.npy")[::-1].copy())
    with pytest.raises(DataFormatError, match=r"piece_document\.npy: SHA-256"):
        PackedDataset(folder).index.verify()


def test_pieces_that_overflow_a_sequence_are_refused(packed: Callable[..., Path]) -> None:
    folder = packed("p", [[1, 2], [3]], 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sequence_length": 2}))
    with pytest.raises(DataFormatError, match="sequence 0 holds 3 tokens, more than 2"):
        PackedDataset(folder)[0]


def test_a_pack_records_which_lengths_of_which_folder_it_holds(packed: Callable[..., Path], tmp_path: Path) -> None:
    """If the lengths no longer exist, any range may hold a document: epochs are then overestimated, never
    underestimated."""
    documents = [[1] * length for length in (3, 5, 9)]
    for name, materialize in (("index", False), ("copy", True)):
        index = PackedIndex(packed(name, documents, 16, materialize=materialize))
        (selection,) = index.selections
        assert (selection.folder, selection.shortest, selection.longest) == (
            str(tmp_path / f"{name}_tokens"),
            1,
            NO_LIMIT,
        )
        assert index.holds(selection)
        assert index.holds(dataclasses.replace(selection, shortest=4, longest=5))
        assert not index.holds(dataclasses.replace(selection, shortest=6, longest=8))
    shutil.rmtree(tmp_path / "copy_tokens")
    assert PackedIndex(tmp_path / "copy").holds(dataclasses.replace(selection, shortest=6, longest=8))
