"""`parity --precision bf16 --engine te --against-engine own`: Transformer Engine's layers train the same model as this
project's, and a bug in them exceeds rounding and is localised. Kernels are CPU stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hunyuan_pretrain.config.layouts import layout_experiment
from tests.helpers.ranks import run_ranks
from tests.helpers.transformer_engine_cases import Case, traces
from tests.parallel.test_parity import expert_gradients_times_ep
from tests.parallel.test_parity_rounded import STEPS, experiment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("transformer_engine")]


def output_of_a_linear_times_1_02() -> AbstractContextManager[Any]:
    from hunyuan_pretrain.model.engine.layers import RowParallelLinear

    right = RowParallelLinear.forward
    return patch.object(RowParallelLinear, "forward", lambda self, x: (right(self, x)[0] * 1.02, None))


def keys_are_seen_from_the_start_of_a_block() -> AbstractContextManager[Any]:
    """A mask for equal numbers of queries and keys, where the queries of a context-parallel rank are the last of their
    block."""
    from hunyuan_pretrain.model.engine import attention

    right = attention.documents_of
    return patch.object(attention, "documents_of", lambda *args: right(*args)._replace(is_square=True))


def queries_are_read_in_another_layout() -> AbstractContextManager[Any]:
    """The queries are stored head by head, and the kernel reads them token by token."""
    from hunyuan_pretrain.model.engine import attention

    right = attention.handed_over

    def wrong(reader: str, *tensors: Any, **how: Any) -> list[Any]:
        first, *others = right(reader, *tensors, **how)
        return [first.transpose(0, 1).contiguous().transpose(0, 1), *others]

    return patch.object(attention, "handed_over", wrong)


ATTENTION, LAST_EXPERTS = "decoder.layers.0.self_attention", "decoder.layers.1.mlp.experts.linear_fc2.weight"
SAME = ["dp=1", "tp=2", "cp=2"]
BUGS: dict[Callable[[], AbstractContextManager[Any]], tuple[str, tuple[str, str]]] = {
    # bug: layout in which it shows, kind and name of its first difference
    output_of_a_linear_times_1_02: ("dp=1", ("activation", ATTENTION)),
    keys_are_seen_from_the_start_of_a_block: ("cp=2", ("activation", ATTENTION)),
    queries_are_read_in_another_layout: ("dp=1", ("activation", ATTENTION)),
    expert_gradients_times_ep: ("dp=1", ("gradient", LAST_EXPERTS)),
}


@pytest.fixture(scope="module")
def compared(transformer_engine: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """(layout, bug) -> differences of Transformer Engine's layers from one rank of this project's layers."""
    from hunyuan_pretrain.diagnostics.parity_noise import NOISE_SEEDS, compare_rounded

    folder = tmp_path_factory.mktemp("engines")

    def case(layout: str, engine: bool, **options: Any) -> Case:
        run, _ = layout_experiment(experiment(corpus), layout, None, folder, "bf16")
        return Case(run, engine, has_attention=engine, **options)

    own = [case("dp=1", False), *(case("dp=1", False, noise=seed, choices=0) for seed in NOISE_SEEDS)]
    wanted: dict[Any, tuple[str, Any]] = {layout: (layout, nullcontext) for layout in SAME}
    wanted |= {bug: (layout, bug) for bug, (layout, _) in BUGS.items()}
    alone = {key: case(layout, True, choices=0, bug=bug) for key, (layout, bug) in wanted.items() if layout == "dp=1"}
    reference, *rest = run_ranks(1, traces, [*own, *alone.values()], STEPS)[0]
    noisy, found = rest[: len(NOISE_SEEDS)], dict(zip(alone, rest[len(NOISE_SEEDS) :], strict=True))
    choices = [step.choices for step in reference]
    two = {
        key: case(layout, True, choices=choices, bug=bug) for key, (layout, bug) in wanted.items() if key not in alone
    }
    found |= zip(two, run_ranks(2, traces, list(two.values()), STEPS)[0], strict=True)
    return {key: compare_rounded(trace, reference, noisy) for key, trace in found.items()}


@pytest.mark.parametrize("layout", SAME)
def test_transformer_engine_trains_the_same_model(compared: dict[Any, list[Any]], layout: str) -> None:
    found = compared[layout]
    assert not [difference for difference in found if not difference.is_within]
    assert any(difference.relative > 0 for difference in found), "both are the same engine"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_an_engine_is_caught_and_localised(compared: dict[Any, list[Any]], bug: Any) -> None:
    outside = [difference for difference in compared[bug] if not difference.is_within]
    assert outside, "not caught"
    assert (outside[0].kind, outside[0].name) == BUGS[bug][1]
