"""Gathering updated weights during the forward pass (overlap_param_gather) changes no loss, whatever reads a weight.

Nothing here gathers between the steps, so a weight that is read before its gather completes has the value of the step
before.
"""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.runtime.quiet import QUIET_WARNINGS
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

pytestmark = pytest.mark.slow
STEPS = 6
Case = tuple[dict[str, Any], dict[str, Any], str, bool]
PIPELINE = {"pipeline_model_parallel_size": 2}
CASES: dict[str, Case] = {
    # parallel, model, dtype, a bucket for every weight
    "tied": (PIPELINE, {}, "fp32", False),
    "tied, bf16": (PIPELINE, {}, "bf16", False),
    "untied": (PIPELINE, {"share_embeddings_and_output_weights": False}, "fp32", False),
    "untied, bf16": (PIPELINE, {"share_embeddings_and_output_weights": False}, "bf16", False),
    "interleaved": (PIPELINE | {"virtual_pipeline_model_parallel_size": 2}, {"num_layers": 8}, "fp32", False),
    "every weight alone": ({}, {}, "fp32", True),
    "every weight alone, untied, bf16": (
        {"recompute": "cla_group"},
        {"share_embeddings_and_output_weights": False},
        "bf16",
        True,
    ),
}


def experiment(corpus: Path, folder: Path, name: str, overlap: bool) -> Experiment:
    parallel, model, dtype, _ = CASES[name]
    fields = experiment_fields(corpus, folder, STEPS, precision={"dtype": dtype}, stages__micro_batch_sequences=1)
    fields["parallel"] = parallel | {"overlap_grad_reduce": True, "overlap_param_gather": overlap}
    fields["model"] |= model
    return Experiment.model_validate(fields)


def losses_of(jobs: list[tuple[str, bool, Experiment]]) -> list[list[float]]:
    """Losses of every step of every job on this rank. Core's warning about an out-of-order gather is an error, except
    in bf16, where routers have their own buffer and are gathered out of order."""
    from hunyuan_pretrain.train import optimizer, setup
    from hunyuan_pretrain.train.step import train_step

    found, config = [], optimizer.DistributedDataParallelConfig
    for name, _, job in jobs:
        optimizer.DistributedDataParallelConfig = partial(config, bucket_size=1) if CASES[name][-1] else config
        run = setup.prepare(job)
        losses = []
        with warnings.catch_warnings():
            if job.precision.dtype == "fp32":
                warnings.filterwarnings("error", message="The next bucket's parameter all-gather")
            for step in range(STEPS):
                optimizer.set_learning_rate(run.optimizer, job.optimizer.lr * run.schedule.lr_fraction(step), 1.0)
                losses.append(train_step(run, run.schedule.stage(step), step).loss)
        setup.leave(run)
        found.append(losses)
    return found


@pytest.fixture(scope="module")
def losses(corpus, tmp_path_factory) -> dict[str, tuple[list[float], list[float]]]:
    """Losses without and with the overlap."""
    folder = tmp_path_factory.mktemp("gather")
    found: dict[str, tuple[list[float], list[float]]] = {}
    for ranks in (2, 4):
        names = [
            name
            for name, (parallel, *_) in CASES.items()
            if (4 if "pipeline_model_parallel_size" in parallel else 2) == ranks
        ]
        jobs = [
            (name, overlap, experiment(corpus, folder / f"{number}_{overlap}", name, overlap))
            for number, name in enumerate(names)
            for overlap in (False, True)
        ]
        every = fork_ranks(ranks, losses_of, jobs)[0]
        found |= {name: (every[2 * number], every[2 * number + 1]) for number, name in enumerate(names)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_losses_with_and_without_the_overlap_are_bitwise_identical(losses, name):
    without, overlapped = losses[name]
    assert overlapped == without
    assert len(set(without)) == STEPS


# --- core's warning, which runtime/quiet.py silences ------------------------------------------------------------------

ONE_STAGE = [name for name, (parallel, *_) in CASES.items() if "pipeline_model_parallel_size" not in parallel]


def warnings_of(jobs: list[tuple[str, Experiment]]) -> list[tuple[list[tuple[str, str]], list[str], list[str]]]:
    """Of each job: the weights whose gather was out of order and those that were to come next, by dtype; the messages
    of a step with all warnings shown, and of one with ours silenced."""
    import sys

    from megatron.core.distributed import param_and_grad_buffer

    from hunyuan_pretrain.runtime.quiet import quieten
    from hunyuan_pretrain.train import optimizer, setup
    from hunyuan_pretrain.train.step import train_step

    def dtypes(group: Any) -> str:
        return " ".join(sorted({str(weight.dtype) for bucket in group.buckets for weight in bucket.params_list}))

    class Watched:
        """In place of the module `warnings`, for its one call in this file of core."""

        @staticmethod
        def warn(message: str) -> None:
            here = sys._getframe(1).f_locals["self"]
            pairs.append((dtypes(here), dtypes(here.next_param_gather_bucket_group)))
            warnings.warn(message, stacklevel=2)

    found, config = [], optimizer.DistributedDataParallelConfig
    for name, job in jobs:
        pairs: list[tuple[str, str]] = []
        optimizer.DistributedDataParallelConfig = partial(config, bucket_size=1) if CASES[name][-1] else config
        run = setup.prepare(job)
        param_and_grad_buffer.warnings = Watched
        messages = []
        for step, is_silenced in enumerate((False, False, True)):  # the first gathers nothing that was updated
            with warnings.catch_warnings(record=True) as shown:
                warnings.simplefilter("always")
                if is_silenced:
                    quieten()
                train_step(run, run.schedule.stage(step), step)
            messages.append([str(one.message) for one in shown])
        param_and_grad_buffer.warnings = warnings
        setup.leave(run)
        found.append((pairs, messages[1], messages[2]))
    return found


def test_only_routers_are_gathered_out_of_order_and_only_that_is_silenced(corpus: Path, tmp_path: Path) -> None:
    """A weight of the bf16 buffer out of order would cost speed, and its warning would be silenced with theirs."""
    silence = "The next bucket's parameter all-gather operation has already been"
    assert silence in QUIET_WARNINGS
    jobs = [(name, experiment(corpus, tmp_path / str(number), name, True)) for number, name in enumerate(ONE_STAGE)]
    for (name, job), (pairs, shown, silenced) in zip(jobs, fork_ranks(2, warnings_of, jobs)[0], strict=True):
        of_buckets = [message for message in shown if message.startswith(silence)]
        if job.precision.dtype == "fp32":
            assert (name, pairs, of_buckets) == (name, [], [])
            continue
        assert set(pairs) == {("torch.float32", "torch.bfloat16")}, "of fp32 routers, followed by the bf16 buffer"
        assert of_buckets
        assert silenced == [
            message for message in shown if not any(re.match(pattern, message) for pattern in QUIET_WARNINGS)
        ]
        assert {pattern for pattern in QUIET_WARNINGS for message in of_buckets if re.match(pattern, message)} == {
            silence
        }
