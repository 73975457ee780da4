"""Packing by groups of shards: the bytes do not depend on who packs a group, or on interruptions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.packed_output import name_output, pack, plan_pack
from hunyuan_pretrain.data import packed_groups
from hunyuan_pretrain.data.balance import cost_order, squared_lengths
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import unfinished_folder
from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.packed_format import PACKED_FILES
from hunyuan_pretrain.data.packed_groups import seed_of_group
from hunyuan_pretrain.data.packing import pack_documents
from tests.helpers.kills import killed_at

LENGTH, SEED = 32, 7
OPTIONS: dict[str, Any] = {"seed": SEED, "group_tokens": 400}


@pytest.fixture
def sources(tokenized: Callable[..., Path], numbered_documents: Callable[..., list]) -> list[str]:
    """Two tokenized folders of 25 shards together, some documents longer than a sequence."""
    documents = numbered_documents(99)
    return [
        str(tokenized("a", documents[:60], documents_per_shard=4)),
        str(tokenized("b", documents[60:], documents_per_shard=4)),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".job", ".lock")}


def test_a_group_is_packed_as_if_its_shards_were_all_there_is(sources: list[str], tmp_path: Path) -> None:
    manifest = pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS)
    index = PackedDataset(tmp_path / "p").index
    lengths = np.concatenate([TokenizedDataset(folder).lengths for folder in sources])
    document = sequence = piece = 0
    for number, group in enumerate(manifest["groups"]):
        of_group = lengths[document : document + group["documents"]]
        assert of_group.sum() <= OPTIONS["group_tokens"]
        packing = pack_documents(of_group, LENGTH, seed_of_group(SEED, number))
        assert (packing.num_sequences, len(packing.piece_start)) == (group["sequences"], group["pieces"])
        offsets = index.sequence_offsets[sequence : sequence + group["sequences"] + 1]
        assert (offsets == packing.sequence_offsets + piece).all()
        part = slice(piece, piece + group["pieces"])
        assert (index.piece_document[part] == packing.piece_document + np.int64(document)).all()
        assert (index.piece_start[part] == packing.piece_start).all()
        assert (index.piece_length[part] == packing.piece_length).all()
        assert (index.squared_lengths[sequence : offsets.size - 1 + sequence] == squared_lengths(packing)).all()
        document, sequence, piece = (
            document + group["documents"],
            sequence + group["sequences"],
            piece + group["pieces"],
        )
    assert len(manifest["groups"]) > 3
    assert (document, sequence, piece) == (len(lengths), index.num_sequences, len(index.piece_document))
    assert index.most_pieces == np.diff(index.sequence_offsets).max()
    index.verify()


def test_every_token_of_every_document_is_in_one_sequence_of_its_document(sources: list[str], tmp_path: Path) -> None:
    pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS)
    dataset = PackedDataset(tmp_path / "p")
    documents = [source.document(n) for source in map(TokenizedDataset, sources) for n in range(source.num_documents)]
    seen = [np.zeros(len(document), dtype=int) for document in documents]
    for number in range(len(dataset)):
        at, sequence = 0, dataset[number]
        for document, start, length in dataset.documents(number):
            assert (sequence.tokens[at : at + length] == documents[document][start : start + length]).all()
            seen[document][start : start + length] += 1
            at += length
    assert all((counts == 1).all() for counts in seen)


@pytest.mark.parametrize("at_a_time", [1, 5, 1 << 22])
def test_the_merged_order_by_cost_is_that_of_all_sequences(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(packed_groups, "_JOINED_AT_A_TIME", at_a_time)
    pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS)
    index = PackedDataset(tmp_path / "p").index
    assert len(set(index.squared_lengths.tolist())) < index.num_sequences, "some cost the same"
    assert (index.cost_order == cost_order(index.squared_lengths)).all()
    assert index.cost_order.dtype == np.uint32


@pytest.mark.parametrize("order", [1, -1])
def test_the_bytes_do_not_depend_on_the_order_of_the_groups(sources: list[str], tmp_path: Path, order: int) -> None:
    pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS)
    job = plan_pack(sources, LENGTH, **OPTIONS)
    out = str(tmp_path / "q")
    with unfinished_folder(out, files=PACKED_FILES, identity=job.identity) as folder:
        for number in range(job.num_groups)[::order]:
            job.open().write_group(folder, number)
        job.open().finish(folder)
        name_output(out, folder, job.num_groups)
    assert contents(tmp_path / "p") == contents(tmp_path / "q")


@pytest.mark.parametrize("options", [{"group_tokens": 900}, {"group_tokens": 10**6, "materialize": True}])
def test_killed_at_every_write_and_run_again_the_bytes_are_the_same(
    sources: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    pack(sources, LENGTH, str(tmp_path / "p"), seed=SEED, **options)
    kills = 0
    while killed_at(kills + 1, partial(pack, sources, LENGTH, str(tmp_path / f"k{kills}"), seed=SEED, **options)):
        out = tmp_path / f"k{kills}"
        if not (out / "manifest.json").exists():
            assert not out.exists(), "half-written"
            pack(sources, LENGTH, str(out), seed=SEED, **options)
        assert contents(out) == contents(tmp_path / "p"), kills
        kills += 1
    assert kills > 15


def test_a_finished_group_is_not_packed_again(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []

    def until_the_third(lengths: np.ndarray, *arguments: Any) -> Any:
        packed.append(len(lengths))
        if len(packed) == 3:
            raise KeyboardInterrupt
        return pack_documents(lengths, *arguments)

    monkeypatch.setattr("data_tools.packed_output.pack_documents", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS)
    assert not (tmp_path / "p").exists()
    groups = [path.name for path in (tmp_path / ".p.partial").glob("group_*.json")]
    assert sorted(groups) == ["group_00000.json", "group_00001.json"]
    assert not list((tmp_path / ".p.partial").glob("group_00002.*"))
    with pytest.raises(DataFormatError, match="left unfinished by a run with other inputs or options"):
        pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS | {"seed": 8})
    manifest = pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS)
    assert len(packed) == 1 + len(manifest["groups"]), "the third twice, the others once"
    assert not (tmp_path / ".p.partial").exists()


@pytest.mark.parametrize(
    ("options", "manifest_digest"),
    [
        ({}, "7fafbc0af0255e4c2afd94dfec2f112012ea38e37cb4533de769e05e4dabc0bd"),
        ({"materialize": True}, "b104023d49cdad2c1c982dbefc8d8aefafa84543d5dd912012798fac772e6c64"),
        (
            {"method": "chop", "min_fragment_tokens": 3, "min_document_tokens": 5, "max_document_tokens": 38},
            "319e8369a22ccbd1515e3ef4d4e87771faba665383dfe729abb860e73d56435d",
        ),
    ],
    ids=["best_fit", "materialized", "chop"],
)
def test_one_group_has_the_bytes_of_before_there_were_groups(
    sources: list[str], tmp_path: Path, options: dict[str, Any], manifest_digest: str
) -> None:
    """The digest of the manifest, which has the digests of all files, as the program wrote it before."""
    pack(sources, LENGTH, str(tmp_path / "p"), seed=SEED, **options)
    assert hashlib.sha256((tmp_path / "p/manifest.json").read_bytes()).hexdigest() == manifest_digest
    PackedDataset(tmp_path / "p").index.verify()


def test_documents_beyond_32_bits_are_numbered_with_64(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(sources, LENGTH, str(tmp_path / "p"), **OPTIONS)
    # as if 32 bits ended at 50 documents; a group has fewer
    monkeypatch.setattr(packed_groups, "MAX_DOCUMENTS", 50)
    pack(sources, LENGTH, str(tmp_path / "q"), **OPTIONS)
    narrow, wide = PackedDataset(tmp_path / "p"), PackedDataset(tmp_path / "q")
    assert (narrow.index.piece_document.dtype, wide.index.piece_document.dtype) == (np.uint32, np.int64)
    for number in range(len(narrow)):
        assert narrow.documents(number) == wide.documents(number)
        assert (narrow[number].tokens == wide[number].tokens).all()


def test_groups_are_closed_by_tokens_and_by_documents(sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [shard for folder in sources for shard in TokenizedDataset(folder).shards]
    assert packed_groups.split_into_groups(shards, 10**9) == [0]
    assert packed_groups.split_into_groups(shards, 1) == list(range(len(shards)))
    monkeypatch.setattr(packed_groups, "MAX_DOCUMENTS", 9)
    assert packed_groups.split_into_groups(shards, 10**9) == list(range(0, len(shards), 2))


def test_what_is_refused_leaves_nothing(sources: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "p")
    for options, message in (
        ({"materialize": True}, r"--materialize: copies the tokens of one group, but --group-tokens 400 makes \d+"),
        ({"min_document_tokens": 99}, "no document has 99 or more tokens; they have 2 to 40"),
        ({"min_fragment_tokens": 99}, "min_fragment_tokens=99: must be from 1"),
    ):
        with pytest.raises(DataFormatError, match=message):
            pack(sources, LENGTH, out, **OPTIONS, **options)
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    (tmp_path / "b/shard_00002.idx").write_bytes((tmp_path / "b/shard_00001.idx").read_bytes())
    with pytest.raises(DataFormatError, match=r"b/shard_00002\.(idx|bin)"):
        pack(sources, LENGTH, out, **OPTIONS)
    assert not (tmp_path / "p").exists()


def test_a_group_without_a_packed_document_is_empty(tokenized: Callable[..., Path], tmp_path: Path) -> None:
    tokens = tokenized("t", [[1], [2], [3] * 9, [4], [5] * 7], documents_per_shard=1)
    manifest = pack([str(tokens)], 8, str(tmp_path / "p"), seed=1, group_tokens=9, min_document_tokens=5)
    assert [group["sequences"] for group in manifest["groups"]] == [0, 2, 1]
    assert manifest["options"]["left_out_documents"] == 3
    dataset = PackedDataset(tmp_path / "p")
    assert sorted(document for n in range(3) for document, *_ in dataset.documents(n)) == [2, 2, 4]
