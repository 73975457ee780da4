"""Training continues from an import under every layout as on one rank, and what it exports computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.tokenizer import copy_tokenizer
from tests.helpers.foreign import as_release_fuses, hf_tensors, write_folder
from tests.helpers.layouts import Layout, Outcome, trace_in_jobs, until_failure
from tests.helpers.ranks import fork_ranks
from tests.reference.plain_hunyuan import plain_logits

pytestmark = pytest.mark.slow
STEPS = 2
ONE = Layout(optimizer="plain")
OTHERS = (Layout(tp=2), Layout(pp=2, micro_batch=1), Layout(dp=2, ep=2), Layout(dp=2, etp=2))


def train_all(work: list[Experiment]) -> list[Outcome]:
    """Traces of the first steps of each experiment."""
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.train import setup

    def train(experiment: Experiment) -> list[Any]:
        run = setup.prepare(experiment)
        assert any("starts from the weights" in line for line in run.start.lines)
        traces = trace_steps(run, range(STEPS))
        setup.leave(run)
        return traces

    return until_failure(work, train)


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a model with fused layers, as Tencent's releases have them; imported: the import of it."""
    from hunyuan_pretrain.checkpoint.hf_import import import_model

    folder = tmp_path_factory.mktemp("imports")
    model = ONE.experiment(corpus, folder).model
    write_folder(folder / "hf", model, as_release_fuses(model, hf_tensors(model)))
    copy_tokenizer(corpus / "tokenizer", folder / "hf")
    import_model(folder / "hf", folder / "imported")
    return folder


def continued(layout: Layout, corpus: Path, folder: Path, name: str) -> Experiment:
    experiment = layout.experiment(corpus, folder / name, STEPS)
    settings = experiment.checkpoint.model_copy(update={"init_from": str(folder / "imported")})
    return experiment.model_copy(update={"checkpoint": settings})


def test_every_layout_continues_as_one_rank_does(corpus: Path, folder: Path) -> None:
    from hunyuan_pretrain.diagnostics.parity import compare

    (expected,) = trace_in_jobs(1, train_all, [continued(ONE, corpus, folder, "one")])
    assert not isinstance(expected, str), expected
    work = [continued(layout, corpus, folder, str(number)) for number, layout in enumerate(OTHERS)]
    for layout, actual in zip(OTHERS, trace_in_jobs(2, train_all, work), strict=True):
        assert not isinstance(actual, str), f"{layout}: {actual}"
        found = [difference for difference in compare(actual, expected) if not difference.is_within]
        assert not found, f"{layout}: {len(found)} differences, first: {found[:8]}"
        assert [trace.shares for trace in actual] == [trace.shares for trace in expected]


def train_and_export(experiment: Experiment, tokens: np.ndarray, output: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(logits before the first step, certificate of an export after it)."""
    from hunyuan_pretrain.checkpoint import save_load
    from hunyuan_pretrain.checkpoint.export_run import export_run
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.model.inputs import ModelInputs
    from hunyuan_pretrain.parallel.groups import destroy_groups
    from hunyuan_pretrain.train import setup

    run = setup.prepare(experiment)
    B, S = tokens.shape
    documents = ModelInputs(
        torch.from_numpy(tokens).reshape(-1), torch.arange(S).repeat(B), list(range(0, B * S + 1, S)), 1000.0
    )
    with torch.no_grad():  # without a routing, no expert has a capacity
        before = run.chunks[0](documents)[0].view(B, S, -1).numpy()
    trace_steps(run, range(1))
    save_load.save(run.run_dir, 1, run.chunks, run.optimizer, None)
    setup.leave(run, destroy_groups)
    return before, export_run(run.run_dir, output)


def test_an_import_has_the_logits_of_the_original_trains_a_step_and_exports(corpus: Path, folder: Path) -> None:
    experiment = continued(ONE, corpus, folder, "exported")
    tokens = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    ((before, certificate),) = fork_ranks(1, train_and_export, experiment, tokens.numpy(), folder / "export")
    tensors = hf_tensors(experiment.model)
    for row, logits in zip(tokens, before, strict=True):
        plain = plain_logits(experiment.model, tensors, row, torch.tensor([0, len(row)]), 1000.0)
        # both in fp32, in another order of sums
        torch.testing.assert_close(torch.from_numpy(logits), plain, rtol=1e-4, atol=1e-4)
    assert certificate["median_relative_difference"] < certificate["tolerance"]["median"]
    assert certificate["source"]["step"] == 1
