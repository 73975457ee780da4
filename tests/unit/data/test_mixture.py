"""The global order: exact shares, even interleaving, whole epochs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.mixture import Mixture


def stage(weights: dict[str, float], sequences: int, name: str = "s") -> StageConfig:
    data = [{"path": path, "weight": weight} for path, weight in weights.items()]
    return StageConfig.model_validate(
        {"name": name, "tokens": sequences * 8, "sequence_length": 8, "global_batch_sequences": 1, "lr_end": 1.0, "data": data}
    )


def order(mixture: Mixture, number: int) -> tuple[np.ndarray, np.ndarray]:
    return mixture.lookup(number, np.arange(mixture.num_sequences(number)))


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=12), sequences=st.integers(1000, 3000))
@settings(max_examples=100, deadline=None)
def test_mixture_is_exact_at_the_end_and_even_on_the_way(weights: Sequence[int], sequences: int) -> None:
    # Not below a share of 1/sequences, which is refused.
    kept = {f"d{i}": float(max(weight, 15)) for i, weight in enumerate(weights)}
    mixture = Mixture([stage(kept, sequences)], dict.fromkeys(kept, 170), seed=1)
    source, _ = order(mixture, 0)
    for number, weight in enumerate(kept.values()):
        share = sequences * weight / sum(kept.values())
        taken = np.cumsum(source == number)
        assert abs(taken[-1] - share) < 1
        assert np.abs(taken - np.arange(1, sequences + 1) * share / sequences).max() < 3
        own_share = taken[-1] / sequences
        assert np.abs(taken - np.arange(1, sequences + 1) * own_share).max() < 2


def test_largest_remainder_decides_what_is_left_over() -> None:
    mixture = Mixture(
        [stage({"a": 0.47, "b": 0.16, "c": 0.158, "d": 0.12, "e": 0.061, "f": 0.031}, 100)], dict.fromkeys("abcdef", 9), seed=0
    )
    assert list(mixture.counts[0].values()) == [47, 16, 16, 12, 6, 3]


def test_one_dominant_source_among_many_small_ones_has_no_bursts() -> None:
    weights = {"big": 900.0, **{f"d{i}": 10.0 for i in range(10)}}
    source, _ = order(Mixture([stage(weights, 5000)], dict.fromkeys(weights, 50), seed=0), 0)
    gaps = np.diff(np.flatnonzero(source == 0))
    assert gaps.max() <= 2


def test_each_epoch_takes_every_sequence_once_in_a_new_order() -> None:
    _, rows = order(Mixture([stage({"a": 1.0}, 40)], {"a": 10}, seed=3), 0)
    epochs = rows.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_source_goes_on_in_a_later_stage_where_it_stopped() -> None:
    stages = [stage({"a": 1.0, "b": 1.0}, 12, "one"), stage({"b": 1.0, "c": 1.0}, 8, "two"), stage({"./b": 1.0}, 10, "three")]
    mixture = Mixture(stages, {"a": 7, "b": 20, "c": 3}, seed=2)
    rows = np.concatenate([order(mixture, i)[1][order(mixture, i)[0] == mixture.sources.index("b")] for i in range(3)])
    assert sorted(rows.tolist()) == list(range(20))
    assert mixture.epochs(2) == {"b": 1.0}


def test_order_is_a_function_of_the_seed_alone_and_of_any_slice() -> None:
    stages, sizes = [stage({"a": 3.0, "b": 1.0}, 200)], {"a": 31, "b": 11}
    one, same, other = (order(Mixture(stages, sizes, seed), 0) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one[1], other[1])
    picked = np.array([[7, 3], [150, 199]])
    assert np.array_equal(np.array(Mixture(stages, sizes, 1).lookup(0, picked)), np.array(one)[:, picked])


def test_a_full_size_run_needs_no_memory() -> None:
    """7T tokens at 4K: a batch is looked up at the end of 1.7e9 sequences without a table of them."""
    sequences = 1_709_000_000
    mixture = Mixture([stage({"web": 0.7, "code": 0.2, "zh": 0.1}, sequences)], {"web": 10**9, "code": 10**8, "zh": 10**7}, seed=0)
    source, row = mixture.lookup(0, np.arange(sequences - 4000, sequences))
    assert np.abs(np.bincount(source) / 4000 - [0.7, 0.2, 0.1]).max() < 0.001
    assert row.max() < 10**9
    assert (row[source == 2] < 10**7).all()


def test_a_source_without_a_single_sequence_is_refused() -> None:
    message = r"stage s: b has weight 0\.001 of 1\.001, which is none of the stage's 100 sequences; remove it or give it a share"
    with pytest.raises(DataFormatError, match=message):
        Mixture([stage({"a": 1.0, "b": 0.001}, 100)], {"a": 5, "b": 5}, seed=0)
