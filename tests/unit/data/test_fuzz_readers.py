"""Every data reader on damaged files: it reads them, or raises DataFormatError that names them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.folders import MANIFEST
from hunyuan_pretrain.data.indexed import TokenizedDataset
from hunyuan_pretrain.data.ledger import sequences_of_step
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.sample_order import SampleOrder, positions_of_rank
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, format_ranks
from tests.helpers.damage import damaged, damaged_json, fuzzed, in_place_of, read_or_refused

LENGTH = 16


@pytest.fixture(params=[False, True], ids=["index", "materialized"])
def folder(
    request: pytest.FixtureRequest, packed: Callable[..., Path], numbered_documents: Callable[..., list]
) -> Path:
    """A packed folder `p` over its tokenized folder `p_tokens`, and `q` and `q_tokens` of different documents."""
    _, p = (
        packed(name, numbered_documents(30, seed), LENGTH, documents_per_shard=20, materialize=request.param)
        for seed, name in enumerate("qp")
    )
    return p


@st.composite
def damaged_file(draw: st.DrawFn, *folders: Path) -> tuple[Path, bytes]:
    """One file of the folders, and its damaged content."""
    file = draw(st.sampled_from([file for folder in folders for file in sorted(folder.iterdir())]))
    other = file.parent.with_name(file.parent.name.replace("p", "q", 1)) / file.name
    strategy = damaged_json if file.name == MANIFEST else damaged
    return file, draw(strategy(file.read_bytes(), other.read_bytes()))


def read_all(folder: Path) -> None:
    dataset = PackedDataset(folder)
    for number in range(len(dataset)):
        sequence = dataset[number]
        assert {len(part) for part in (sequence.tokens, sequence.labels, sequence.loss_mask, sequence.positions)} == {
            dataset.sequence_length
        }
        assert (sequence.cu_seqlens[0], sequence.cu_seqlens[-1]) == (0, dataset.sequence_length)
        assert (np.diff(sequence.cu_seqlens) > 0).all()


@fuzzed()
@given(data=st.data())
def test_packed_sequences(data: st.DataObject, folder: Path, tmp_path: Path) -> None:
    with in_place_of(*data.draw(damaged_file(folder, folder.with_name("p_tokens")))), read_or_refused(tmp_path):
        read_all(folder)


@fuzzed()
@given(data=st.data())
def test_tokenized_documents(data: st.DataObject, folder: Path, tmp_path: Path) -> None:
    tokens = folder.with_name("p_tokens")
    with in_place_of(*data.draw(damaged_file(tokens))), read_or_refused(tmp_path):
        dataset = TokenizedDataset(tokens)
        for number in range(dataset.num_documents):
            dataset.document(number)
            dataset.origin(number)


@fuzzed()
@given(data=st.data())
def test_verify_names_whatever_changed(data: st.DataObject, folder: Path) -> None:
    file, content = data.draw(damaged_file(folder, folder.with_name("p_tokens")))
    is_checked = file.name != MANIFEST and file in PackedDataset(folder).index.digests()
    is_changed = content != file.read_bytes()
    message = None
    with in_place_of(file, content):
        try:
            PackedDataset(folder).index.verify()
        except DataFormatError as error:
            message = str(error)
    assert is_changed or message is None
    if is_changed and is_checked:
        assert message is not None
        assert file.name in message


@fuzzed(100)
@given(data=st.data())
def test_the_order_and_the_ledger(
    data: st.DataObject, folder: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    tokens = 6 * 4 * LENGTH
    common = {"data": [{"path": str(folder)}], "global_batch_sequences": 4, "sequence_length": LENGTH, "tokens": tokens}
    stages = experiment([{**common, "balance_attention": balance} for balance in ("group", "deal")])
    with in_place_of(*data.draw(damaged_file(folder, folder.with_name("p_tokens")))), read_or_refused(tmp_path):
        order = SampleOrder(stages, None)
        for step in range(order.num_steps):
            positions_of_rank(order, step, 0, 2)
            for dataset, row in order.sequences(step, np.arange(4)):
                dataset[row]
            list(sequences_of_step(order, step))


@fuzzed()
@given(data=st.data())
def test_tokenizers(data: st.DataObject, tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    content = format_ranks(ranks)
    at = data.draw(st.integers(0, len(content)))  # most damage affects one byte; the rest of the file is intact
    part = data.draw(damaged(content[at : at + 40], content[:40]))
    (tmp_path / RANKS_FILE).write_bytes(content[:at] + part + content[at + 40 :])
    with read_or_refused(tmp_path):
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.decode(tokenizer.encode("the other 中")) == "the other 中"
