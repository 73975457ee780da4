"""The global order: exact shares, even interleaving, whole epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import StageConfig
from hunyuan_pretrain.data.epochs import NO_LIMIT, Selection
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.mixture import DataSegment, Mixture, SourceSize


def stage(weights: dict[str, float], sequences: int, name: str = "s") -> StageConfig:
    data = [{"path": path, "weight": weight} for path, weight in weights.items()]
    return StageConfig.model_validate(
        {
            "name": name,
            "tokens": sequences * 8,
            "sequence_length": 8,
            "global_batch_sequences": 1,
            "lr_end": 1.0,
            "data": data,
        }
    )


def sizes(sequences: dict[str, int]) -> dict[str, SourceSize]:
    """Sources without padding."""
    return {path: SourceSize(count, count * 8) for path, count in sequences.items()}


def order(mixture: Mixture, number: int) -> tuple[np.ndarray, np.ndarray]:
    return mixture.lookup(number, np.arange(mixture.num_sequences(number)))


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=12), sequences=st.integers(1000, 3000))
@settings(max_examples=100, deadline=None)
def test_the_mixture_is_exact_at_the_end_and_even_along_the_way(weights: Sequence[int], sequences: int) -> None:
    # Not below a share of 1/sequences, which is refused.
    kept = {f"d{i}": float(max(weight, 15)) for i, weight in enumerate(weights)}
    mixture = Mixture([stage(kept, sequences)], sizes(dict.fromkeys(kept, 170)), seed=1)
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
        [stage({"a": 0.47, "b": 0.16, "c": 0.158, "d": 0.12, "e": 0.061, "f": 0.031}, 100)],
        sizes(dict.fromkeys("abcdef", 9)),
        seed=0,
    )
    assert list(mixture.counts[0].values()) == [47, 16, 16, 12, 6, 3]


def test_one_dominant_source_among_many_small_ones_has_no_bursts() -> None:
    weights = {"big": 900.0, **{f"d{i}": 10.0 for i in range(10)}}
    source, _ = order(Mixture([stage(weights, 5000)], sizes(dict.fromkeys(weights, 50)), seed=0), 0)
    gaps = np.diff(np.flatnonzero(source == 0))
    assert gaps.max() <= 2


def test_each_epoch_takes_every_sequence_once_in_a_new_order() -> None:
    _, rows = order(Mixture([stage({"a": 1.0}, 40)], sizes({"a": 10}), seed=3), 0)
    epochs = rows.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_a_source_continues_in_a_later_stage_where_it_stopped() -> None:
    stages = [
        stage({"a": 1.0, "b": 1.0}, 12, "one"),
        stage({"b": 1.0, "c": 1.0}, 8, "two"),
        stage({"./b": 1.0}, 10, "three"),
    ]
    mixture = Mixture(stages, sizes({"a": 7, "b": 20, "c": 3}), seed=2)
    rows = np.concatenate([order(mixture, i)[1][order(mixture, i)[0] == mixture.sources.index("b")] for i in range(3)])
    assert sorted(rows.tolist()) == list(range(20))
    assert mixture.epochs(2) == {"b": 1.0}


def test_order_is_a_function_of_the_seed_alone_and_of_any_slice() -> None:
    stages, of_sources = [stage({"a": 3.0, "b": 1.0}, 200)], sizes({"a": 31, "b": 11})
    one, same, other = (order(Mixture(stages, of_sources, seed), 0) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one[1], other[1])
    picked = np.array([[7, 3], [150, 199]])
    assert np.array_equal(np.array(Mixture(stages, of_sources, 1).lookup(0, picked)), np.array(one)[:, picked])


def test_a_full_size_run_needs_no_memory() -> None:
    """7T tokens at 4K: a batch at the end of 1.7e9 sequences is looked up without a table of them."""
    sequences = 1_709_000_000
    of_sources = sizes({"web": 10**9, "code": 10**8, "zh": 10**7})
    mixture = Mixture([stage({"web": 0.7, "code": 0.2, "zh": 0.1}, sequences)], of_sources, seed=0)
    source, row = mixture.lookup(0, np.arange(sequences - 4000, sequences))
    assert np.abs(np.bincount(source) / 4000 - [0.7, 0.2, 0.1]).max() < 0.001
    assert row.max() < 10**9
    assert (row[source == 2] < 10**7).all()


def test_a_source_without_a_single_sequence_is_refused() -> None:
    message = (
        r"stage s: b has weight 0\.001 of 1\.001, which gives it none of the stage's 100 sequences; remove it or give "
        r"it a share"
    )
    with pytest.raises(DataFormatError, match=message):
        Mixture([stage({"a": 1.0, "b": 0.001}, 100)], sizes({"a": 5, "b": 5}), seed=0)


def test_weights_are_shares_of_tokens_not_of_sequences() -> None:
    """A source that is half padding needs twice as many sequences for the same tokens."""
    of_sources = {"full": SourceSize(100, 800), "half": SourceSize(100, 400)}
    mixture = Mixture([stage({"full": 1.0, "half": 1.0}, 300)], of_sources, seed=0)
    assert list(mixture.counts[0].values()) == [100, 200]
    assert mixture.tokens(0) == {"full": 800.0, "half": 800.0}


def test_tiers_split_the_stage_and_sources_split_their_tier() -> None:
    fields = stage({"a": 1.0, "b": 3.0, "c": 5.0}, 100).model_dump()
    for entry, tier in zip(fields["data"], ("high", "high", "low"), strict=True):
        entry["tier"] = tier
    fields["tier_weights"] = {"high": 0.8, "low": 0.2}
    mixture = Mixture([StageConfig.model_validate(fields)], sizes({"a": 9, "b": 9, "c": 9}), seed=0)
    assert list(mixture.counts[0].values()) == [20, 60, 20]


def test_a_source_is_not_read_more_often_than_allowed() -> None:
    def capped(cap: float, name: str) -> StageConfig:
        fields = stage({"a": 1.0, "b": 1.0}, 20, name).model_dump()
        fields["data"][0]["max_epochs"] = cap
        return StageConfig.model_validate(fields)

    of_sources = sizes({"a": 10, "b": 1000})
    mixture = Mixture([capped(1, "one"), capped(2, "two")], of_sources, seed=0)
    assert mixture.epochs(1)["a"] == 2.0
    message = (
        r"stage two: a would have been read 2 times, max_epochs is 1.5; 40 tokens are left for the stage, which "
        r"asks for 80\n"
        r"lower the weight or the stage's tokens, raise max_epochs, or give more data"
    )
    with pytest.raises(DataFormatError, match=message):
        Mixture([capped(1, "one"), capped(1.5, "two")], of_sources, seed=0)


@given(
    ranges=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 8)), max_size=4),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_skipping_leaves_out_exactly_those_steps_and_changes_nothing_before_them(
    ranges: list[tuple[int, int]], seed: int
) -> None:
    skipped: list[list[int]] = []
    for first, more in sorted(ranges):
        if not skipped or first > skipped[-1][1]:
            skipped.append([first, first + more])
    fields = {**stage({"a": 2.0, "b": 1.0}, 40 * 3).model_dump(), "global_batch_sequences": 3}
    plain = StageConfig.model_validate(fields)
    with_skips = StageConfig.model_validate({**fields, "skip_data_steps": skipped})
    of_sources = sizes({"a": 31, "b": 17})
    one, other = Mixture([plain], of_sources, seed), Mixture([with_skips], of_sources, seed)
    assert plain.num_steps == with_skips.num_steps == 40
    (piece,) = other.schedule.pieces
    steps = [piece.position_of(3 * step) // 3 for step in range(40)]
    left_out = {step for first, last in skipped for step in range(first - 1, last)}
    assert steps == [step for step in range(200) if step not in left_out][:40]
    before = np.arange(min([step for step in left_out if step < 40], default=40) * 3)
    assert np.array_equal(one.lookup(0, before), other.lookup(0, before))
    assert np.array_equal(one.lookup(0, np.arange(120)), other.lookup(0, np.arange(120))), "data steps keep their data"


def test_a_later_stage_continues_after_the_data_that_replaced_skipped_steps() -> None:
    first = StageConfig.model_validate({**stage({"a": 1.0}, 5).model_dump(), "skip_data_steps": [[2, 3]]})
    mixture = Mixture([first, stage({"a": 1.0}, 3, "later")], sizes({"a": 10}), seed=0)
    rows = np.concatenate([order(mixture, number)[1] for number in range(2)])
    assert sorted(rows.tolist()) == list(range(10))


def over_one_corpus(*selections: tuple[int, int], sequences: int = 100) -> dict[str, SourceSize]:
    """Packs a, b, c... of 100 sequences, each with the documents of one corpus in a range of lengths."""
    documents = [(Selection("digest", "/tokens", shortest, longest),) for shortest, longest in selections]
    return {
        name: SourceSize(sequences, sequences * 8, documents=held) for name, held in zip("abc", documents, strict=False)
    }


def two_stages(cap: float, first: str = "a", second: str = "b", sequences: int = 98) -> list[StageConfig]:
    """98 sequences of one source without a cap, then 98 of another with `cap`."""
    fields = stage({second: 1.0}, sequences, "two").model_dump()
    fields["data"][0]["max_epochs"] = cap
    return [stage({first: 1.0}, sequences, "one"), StageConfig.model_validate(fields)]


def test_documents_that_packs_of_two_lengths_share_are_counted_together() -> None:
    of_sources = over_one_corpus((1, NO_LIMIT), (1, NO_LIMIT))
    message = (
        r"stage two: b: documents of /tokens would have been read 1.96 times \(0.98 in a \+ 0.98 in b\), "
        r"max_epochs is 1; 16 tokens are left for the stage, which asks for 784"
    )
    with pytest.raises(DataFormatError, match=message):
        Mixture(two_stages(cap=1), of_sources, seed=0)
    reading = Mixture(two_stages(cap=2), of_sources, seed=0).most_read(1, "b")
    assert reading is not None
    assert (reading.epochs, reading.at_most) == (1.96, 2)


def test_disjoint_selections_by_length_are_not_counted_together() -> None:
    mixture = Mixture(two_stages(cap=1), over_one_corpus((1, 64), (65, NO_LIMIT)), seed=0)
    assert mixture.most_read(1, "b").epochs == 0.98  # type: ignore[union-attr]
    other = {
        name: replace(size, documents=(Selection(name, name, 1, 9),))
        for name, size in over_one_corpus((1, 9), (1, 9)).items()
    }
    assert Mixture(two_stages(cap=1), other, seed=0).most_read(1, "b").epochs == 0.98  # type: ignore[union-attr]


def test_only_lengths_that_occur_decide_whether_selections_overlap() -> None:
    """Both packs take documents of 64 tokens: refused if there is one."""
    for has_one in (True, False):
        of_sources = {
            name: replace(size, holds=lambda part, has_one=has_one: has_one or not part.shortest == part.longest == 64)
            for name, size in over_one_corpus((1, 64), (64, NO_LIMIT)).items()
        }
        if has_one:
            with pytest.raises(
                DataFormatError, match=r"documents of 64 to 64 tokens of /tokens would have been read 1.96 times"
            ):
                Mixture(two_stages(cap=1), of_sources, seed=0)
        else:
            Mixture(two_stages(cap=1), of_sources, seed=0)


def test_lengths_are_not_read_if_the_bound_suffices() -> None:
    def holds(part: Selection) -> bool:
        raise AssertionError("read")

    of_sources = {name: replace(size, holds=holds) for name, size in over_one_corpus((1, 64), (64, NO_LIMIT)).items()}
    Mixture(two_stages(cap=2), of_sources, seed=0)


def test_a_pack_that_contains_part_of_another_counts_for_that_part() -> None:
    of_sources = over_one_corpus((1, NO_LIMIT), (100, 200))
    with pytest.raises(
        DataFormatError, match=r"b: documents of 100 to 200 tokens of /tokens would have been read 1.96 times"
    ):
        Mixture(two_stages(cap=1), of_sources, seed=0)
    with pytest.raises(
        DataFormatError, match=r"a: documents of 100 to 200 tokens of /tokens would have been read 1.96 times"
    ):
        Mixture(two_stages(cap=1, first="b", second="a"), of_sources, seed=0)


@given(
    selections=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=3),
    counts=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    lengths=st.sets(st.integers(1, 20), min_size=1),
)
@settings(max_examples=200, deadline=None)
def test_epochs_of_documents_equal_a_count_of_each_document(
    selections: Sequence[tuple[int, int]], counts: Sequence[int], lengths: set[int]
) -> None:
    ranges = [(shortest, shortest + more) for shortest, more in selections]
    of_sources = {
        name: replace(size, holds=lambda part: any(part.shortest <= length <= part.longest for length in lengths))
        for name, size in over_one_corpus(*ranges, sequences=10).items()
    }
    stages = [stage({name: 1.0}, count, name) for name, count in zip(of_sources, counts, strict=False)]
    mixture = Mixture(stages, of_sources, seed=0)
    for name, own in zip(of_sources, ranges, strict=True):
        read = [
            sum(count / 10 for (low, high), count in zip(ranges, counts, strict=False) if low <= length <= high)
            for length in lengths
            if own[0] <= length <= own[1]
        ]
        found = mixture.most_read(len(stages) - 1, name)
        assert (found.epochs if found else None) == (pytest.approx(max(read)) if read else None)


def trained(mixture: Mixture) -> list[tuple[int, int]]:
    """(source, row) of every sequence that the steps take, in order."""
    found: list[tuple[int, int]] = []
    for piece in mixture.schedule.pieces:
        numbers = np.arange(piece.num_steps * piece.stage.global_batch_sequences)
        sources, rows = mixture.lookup(piece.lane, piece.position_of(numbers))
        found += zip(sources.tolist(), rows.tolist(), strict=True)
    return found


def with_batch(fields: StageConfig, batch: int) -> StageConfig:
    return StageConfig.model_validate({**fields.model_dump(), "global_batch_sequences": batch})


some_mixes = st.dictionaries(st.sampled_from("abc"), st.integers(20, 80).map(float), min_size=1)


@given(
    mixes=st.lists(some_mixes, min_size=1, max_size=4),
    batches=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    lengths=st.lists(st.integers(150, 260), min_size=4, max_size=4),
    stops=st.lists(st.integers(1, 90), min_size=3, max_size=3, unique=True),
)
@example(
    [{"a": 20.0}, {"a": 20.0}], [8, 1, 1, 1], [153, 150, 150, 150], [19, 20, 21]
)  # the second segment ends the stage at its current position
@settings(max_examples=100, deadline=None)
def test_no_sequence_is_repeated_or_left_out_in_an_epoch_whatever_changes_mid_run(
    mixes: list[dict[str, float]], batches: list[int], lengths: list[int], stops: list[int]
) -> None:
    """Batch size, length and mix change: all epochs of each source but the last are complete, as in a run that never
    changes."""
    of_sources = sizes({"a": 23, "b": 40, "c": 11})
    segments: list[DataSegment] = []
    for mix, batch, length, step in zip(mixes, batches, lengths, [0, *sorted(stops)], strict=False):
        if segments and step >= Mixture(segments[-1].stages, of_sources, 1, segments).schedule.num_steps:
            break
        try:
            Mixture([], of_sources, 1, [*segments, DataSegment(step, [with_batch(stage(mix, length), batch)], 1)])
        except ConfigError:
            continue  # shorter than what is trained
        segments.append(
            DataSegment(step, [with_batch(stage(mix, length), batch), stage({"a": 1.0, "c": 2.0}, 30, "later")], 1)
        )
    mixture = Mixture(segments[-1].stages, of_sources, 1, segments)
    found = trained(mixture)
    for number, name in enumerate(mixture.sources):
        rows = [row for source, row in found if source == number]
        size = of_sources[name].sequences
        for first in range(0, len(rows), size):
            epoch = rows[first : first + size]
            assert len(set(epoch)) == len(epoch)
    for number, (segment, after) in enumerate(pairwise(segments), start=1):
        before = Mixture(segment.stages, of_sources, 1, segments[:number])
        done = before.schedule.tokens_after(after.first_step) // 8
        assert found[:done] == trained(before)[:done], "what was trained is known for ever"


@given(
    batches=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    stops=st.lists(st.integers(1, 30), min_size=3, max_size=3, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_a_new_batch_size_keeps_the_order_of_the_data(batches: list[int], stops: list[int]) -> None:
    of_sources, mix = sizes({"a": 23, "b": 40}), {"a": 2.0, "b": 1.0}
    segments = [DataSegment(0, [with_batch(stage(mix, 120), batches[0])], 1)]
    for batch, step in zip(batches[1:], sorted(stops), strict=False):
        if step < Mixture([], of_sources, 1, segments).schedule.num_steps:
            segments.append(DataSegment(step, [with_batch(stage(mix, 120), batch)], 1))
    straight = Mixture(segments[0].stages, of_sources, 1)
    assert trained(Mixture([], of_sources, 1, segments))[:120] == trained(straight)[:120]


def test_a_new_seed_reorders_only_the_remaining_data() -> None:
    of_sources, stages = sizes({"a": 40}), [stage({"a": 1.0}, 40)]
    one, both = (
        Mixture(stages, of_sources, 1),
        Mixture(stages, of_sources, 2, [DataSegment(0, stages, 1), DataSegment(10, stages, 2)]),
    )
    assert trained(both)[:10] == trained(one)[:10]
    assert trained(both)[10:] == trained(Mixture(stages, of_sources, 2))[10:]


def test_skipping_data_from_here_on_is_as_if_it_had_been_skipped_from_the_start() -> None:
    fields = stage({"a": 2.0, "b": 1.0}, 40).model_dump()
    skipping = StageConfig.model_validate({**fields, "skip_data_steps": [[11, 15]]})
    of_sources, plain = sizes({"a": 40, "b": 20}), StageConfig.model_validate(fields)
    later = Mixture([skipping], of_sources, 1, [DataSegment(0, [plain], 1), DataSegment(7, [skipping], 1)])
    assert trained(later) == trained(Mixture([skipping], of_sources, 1))
