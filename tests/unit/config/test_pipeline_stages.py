"""The layers of each pipeline stage: all of them, in order, in whole CLA groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.derived import pipeline_stages
from hunyuan_pretrain.config.schema import Experiment, ParallelConfig


def experiment(num_layers: int, share: int, ranks: int, chunks: int, layout: list[int] | None) -> Experiment:
    """The smallest experiment with these layers and this pipeline."""
    sequences = {"sequence_length": 512, "global_batch_sequences": ranks}
    return Experiment.model_validate(
        {
            "name": "stages",
            "run_dir": "none",
            "tokenizer": "none",
            "model": {
                "num_layers": num_layers,
                "cla_share_factor": share,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 32,
                "num_moe_experts": 4,
                "padded_vocab_size": 64,
            },
            "parallel": {
                "pipeline_model_parallel_size": ranks,
                "virtual_pipeline_model_parallel_size": chunks,
                "pipeline_layout": layout,
            },
            "optimizer": {"lr": 1e-3},
            "stages": [{"name": "all", "tokens": 512, "lr_end": 1.0, "data": [{"path": "none"}], **sequences}],
        }
    )


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[int, int, int, int, list[int] | None]:
    """(layers, layers per CLA group, ranks, chunks, layout): no layout, one that splits the layers anywhere, or
    arbitrary numbers."""
    share, groups = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    ranks, chunks = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    layers = groups * share
    kind = draw(st.sampled_from(["none", "divided", "any"]))
    if kind == "none" or layers < ranks * chunks:
        return layers, share, ranks, chunks, None
    if kind == "any":
        return layers, share, ranks, chunks, draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    inner = ranks * chunks - 1
    cuts = (
        sorted(draw(st.lists(st.integers(1, layers - 1), min_size=inner, max_size=inner, unique=True))) if inner else []
    )
    return layers, share, ranks, chunks, [end - start for start, end in pairwise([0, *cuts, layers])]


@settings(max_examples=300, deadline=None)
@given(pipelines())
def test_a_cla_group_is_never_split(pipeline):
    """For every pipeline, even or given: either the rules refuse it, or each layer is in exactly one stage together
    with its whole group."""
    layers, share, ranks, chunks, _ = pipeline
    wanted = experiment(*pipeline)
    if rules.find_problems(wanted):
        return
    stages = pipeline_stages(wanted.model, wanted.parallel)
    assert len(stages) == ranks * chunks
    assert [layer for stage in stages for layer in stage] == list(range(layers)), "every layer once, in order"
    for stage in stages:
        assert stage, "no stage is empty"
        assert stage.start % share == 0
        assert stage.stop % share == 0


@pytest.mark.parametrize(
    ("ranks", "chunks", "layout", "expected"),
    [
        (1, 1, None, [8]),
        (2, 1, None, [4, 4]),
        (2, 2, None, [2, 2, 2, 2]),
        (2, 1, [2, 6], [2, 6]),
        (3, 1, [2, 4, 2], [2, 4, 2]),
    ],
)
def test_stages_have_the_layers_that_the_layout_assigns(ranks, chunks, layout, expected):
    wanted = experiment(8, 2, ranks, chunks, layout)
    assert rules.find_problems(wanted) == []
    stages = pipeline_stages(wanted.model, wanted.parallel)
    assert [len(stage) for stage in stages] == expected
    assert stages[0].start == 0


def test_a_layout_that_splits_a_group_is_refused_wherever_it_does():
    for first in range(1, 8):
        problems = [str(problem) for problem in rules.find_problems(experiment(8, 2, 2, 1, [first, 8 - first]))]
        assert any("would cut a CLA group of 2" in problem for problem in problems) == bool(first % 2)


def test_one_rank_has_every_layer():
    model = experiment(6, 3, 1, 1, None).model
    assert pipeline_stages(model, ParallelConfig()) == (range(6),)
