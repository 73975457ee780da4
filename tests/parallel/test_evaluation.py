"""A checkpoint under every kind of layout answers as one rank does, and as its export in transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hunyuan_pretrain.checkpoint.export_run import export_run
from hunyuan_pretrain.checkpoint.generate import load_model
from hunyuan_pretrain.evaluation.scoring import Item, Read, sequence_item
from hunyuan_pretrain.evaluation.transformers_scorer import TransformersScorer
from tests.helpers.benchmark_data import write_run
from tests.helpers.ranks import fork_ranks

LENGTH = 256
ALONE = ""
LAYOUTS = ("tp=2,pp=2", "cp=2,dp=2,ep=2", "pp=2,vpp=2,dp=2", "tp=2,cp=2,ep=4")
TOLERANCE = 1e-4
"""Nats of a token's log-probability, fp32: sums of the same numbers in another order, over 8 layers."""
NUM_IDS = 466


def items() -> list[Item]:
    """Texts of very different lengths, some read at several places, one at the same place twice."""
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, NUM_IDS, (n,), generator=generator).tolist() for n in (2, 250, 31, 64, 9, 100, 257, 40)]
    wanted = [sequence_item(text, max(1, len(text) // 2)) for text in texts]
    return [*wanted, Item(texts[3], [63, 63, 10], [1, 2, 3])]


def scored(run_dir: Path, layouts: tuple[str, ...]) -> dict[str, list[tuple[list[float], list[int], list[int]]]]:
    """On one of the ranks: by layout, of each item the log-probabilities and the likeliest ids, of all and of those
    that are tokens. On rank 0 only."""
    from hunyuan_pretrain.evaluation.layout_scorer import LayoutScorer, checkpoint_and_stage, load
    from hunyuan_pretrain.parallel.groups import leave_layout

    checkpoint, experiment, stage = checkpoint_and_stage(run_dir, None)
    found = {}
    for layout in layouts:
        model = load(experiment, checkpoint, layout, int(os.environ["WORLD_SIZE"]))
        # a small budget, so that there are several micro-batches
        scorer = LayoutScorer(model, rope_alpha=stage.rope_alpha, max_length=LENGTH, batch_tokens=300)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_gather_object", lambda *_: pytest.fail("it grows with the ranks"))
            if os.environ["RANK"] != "0":
                scorer.follow()
            else:
                pairs = zip(scorer.score(items()), scorer.score(items(), NUM_IDS), strict=True)
                found[layout] = [(a.logprob_n.tolist(), a.best_n.tolist(), b.best_n.tolist()) for a, b in pairs]
                scorer.release()
        leave_layout()
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("evaluation") / "run", LENGTH, num_layers=8)


@pytest.fixture(scope="module")
def alone(run_dir: Path) -> list[tuple[list[float], list[int], list[int]]]:
    return fork_ranks(1, scored, run_dir, (ALONE,))[0][ALONE]


@pytest.fixture(scope="module")
def of_layouts(run_dir: Path) -> dict[str, list[tuple[list[float], list[int], list[int]]]]:
    return fork_ranks(4, scored, run_dir, LAYOUTS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_one_rank(alone, of_layouts, layout: str) -> None:  # type: ignore[no-untyped-def]
    same(of_layouts[layout], alone)


def export_here(run_dir: Path, output: Path) -> None:
    """Ends this process's job."""
    export_run(run_dir, output)


def test_the_export_in_transformers_gives_them_too(alone, run_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    fork_ranks(1, export_here, run_dir, tmp_path / "export")
    scorer = TransformersScorer(load_model(tmp_path / "export"))
    assert scorer.max_length == LENGTH
    pairs: list[tuple[Read, Read]] = list(zip(scorer.score(items()), scorer.score(items(), NUM_IDS), strict=True))
    same([(a.logprob_n.tolist(), a.best_n.tolist(), b.best_n.tolist()) for a, b in pairs], alone)


def same(
    found: list[tuple[list[float], list[int], list[int]]], expected: list[tuple[list[float], list[int], list[int]]]
) -> None:
    assert len(found) == len(expected) == len(items())
    for item, (logprobs, *best), (wanted, *best_wanted) in zip(items(), found, expected, strict=True):
        assert len(logprobs) == len(item.positions)
        assert logprobs == pytest.approx(wanted, abs=TOLERANCE)
        assert best == best_wanted
    flat = torch.tensor([value for logprobs, *_ in expected for value in logprobs])
    assert flat.std() > 0.1, "the model does not say the same everywhere"
