"""The clip norm does not depend on how weights are sharded, however many small gradients there are beside large
ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.train.optimizer import sum_of_squares
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

ROWS, HIDDEN = 65536, 32
"""Gradients of the output weight: rows of tokens that do not occur have a thousandth of the gradients of those that
do."""


def experiment(corpus: Path, folder: Path, ranks: int, **parallel: Any) -> Experiment:
    fields = experiment_fields(
        corpus, folder, model__num_layers=2, model__hidden_size=HIDDEN, model__padded_vocab_size=ROWS
    )
    fields["parallel"] = {"world_size": ranks, **parallel}
    fields["optimizer"]["adam_eps"] = 1e-3
    return Experiment.model_validate(fields)


def trace(layout: Experiment) -> Any:
    from hunyuan_pretrain.diagnostics.parity import trace_layout

    return trace_layout(layout, 1)


@pytest.mark.parametrize("use_distributed_optimizer", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_clip_norm_does_not_depend_on_how_a_large_output_weight_is_sharded(corpus, tmp_path, use_distributed_optimizer):
    from hunyuan_pretrain.diagnostics.parity import compare

    settings = {"use_distributed_optimizer": use_distributed_optimizer}
    (alone,) = fork_ranks(1, trace, experiment(corpus, tmp_path / "one", 1, **settings))
    cut = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    divided = fork_ranks(2, trace, experiment(corpus, tmp_path / "two", 2, **cut, **settings))[0]
    exact = sum(float((gradient.astype("float64") ** 2).sum()) for gradient in alone[0].gradients.values()) ** 0.5
    assert alone[0].scalars["grad_norm"] == pytest.approx(exact, rel=1e-6)
    outside = [difference for difference in compare(divided, alone) if not difference.is_within]
    assert not outside, outside[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_elements_are_not_lost_in_a_long_sum(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 21, generator=generator).mul_(1e-4).to(dtype)
    values[:5000] *= 100
    exact = values.double().square().sum().item()
    assert sum_of_squares([values]).item() == pytest.approx(exact, rel=1e-6)
    assert sum_of_squares(list(values.split(99_991))).item() == pytest.approx(exact, rel=1e-6)
    assert sum_of_squares([values.view(1024, -1).t()]).item() == pytest.approx(exact, rel=1e-6)
    assert sum_of_squares([]).item() == 0
