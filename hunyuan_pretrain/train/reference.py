"""What the reference model of a DPO run says of every answer: log-probabilities under the weights that the run starts
from, computed in evaluation mode before the first step and kept in RUN_DIR/reference.

A file is named by the digest of its key: data, tokenizer, weights and numerics. A run that resumes reads the file of
its own key and is refused without it; the weights that it holds are no longer those of the reference.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import checkpoint_of
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.data.digests import digest_of, file_digest
from hunyuan_pretrain.data.folders import write_file
from hunyuan_pretrain.data.loader import PairLoader
from hunyuan_pretrain.data.packed_dataset import PackedDataset
from hunyuan_pretrain.data.sample_order import facts_of
from hunyuan_pretrain.model.preference import PairSums
from hunyuan_pretrain.model.routing import EVALUATION
from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.train import TrainingError, resume
from hunyuan_pretrain.train.feed import SentBatch, model_inputs, sent_ahead
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import run_schedule, sum_over

FOLDER = "reference"
ROUNDS_AT_A_TIME = 8
"""Micro-batches of each pipeline stage between two looks for a stop."""
ALLOWED_NATS = {"fp32": 0.01, "bf16": 1.0}
"""How far the two log-ratios of a pair may be apart on average before the first update, where they are 0 but for
rounding: fp32 keeps a sum over a thousand tokens to 1e-3, and the cross-entropies of bf16 logits to about 1e-2 each,
which add up as their square root. Other weights, dropout or another document differ by several nats."""


def attach(run: Run, leave_if_asked: Callable[[], None] = lambda: None) -> None:
    """Give every dataset of a run with task=dpo its `reference`.

    leave_if_asked: called by all ranks now and then. Raises CheckpointError if a run that resumes has no file of its
    key. Communicates: all ranks, and a forward pass over data without a file.
    """
    stage = run.experiment.stages[0]
    if stage.task != "dpo":  # the rules: then no other stage has it
        return
    weights = resume.on_rank_0(lambda: _digest_of_weights(run.experiment))
    for path, dataset in run.loader.order.datasets.items():
        key = _key(run, dataset, weights)
        file = run.run_dir / FOLDER / f"{digest_of(key)[:16]}.npz"
        dataset.reference = resume.on_rank_0(partial(_read, file, key))
        if dataset.reference is None:
            if run.first_step > 0:
                differing = resume.on_rank_0(partial(_differences, file.parent, key))
                raise CheckpointError(
                    f"{file.parent}: holds no reference log-probabilities of {path} for this run{differing}; they were "
                    "computed with the weights that the run started from: go back to that data and those settings, "
                    "or start a new run"
                )
            run.log.line(f"reference: a pass over the {len(dataset.index.piece_length):,} pairs of {path}")
            dataset.reference = _compute(run, stage, dataset, leave_if_asked)
            resume.on_rank_0(partial(_write, file, key, dataset.reference))
    run.loader.forget()


def check_first_step(sums: PairSums, beta: float, dtype: str) -> None:
    """Raise TrainingError unless model and reference agree before the first update: the loss of the pairs is ln 2, and
    margins are 0."""
    loss, nats = sums.preference_loss / sums.pairs, sums.margin_size / sums.pairs / beta
    allowed = ALLOWED_NATS[dtype]
    # |-log sigmoid(x) - ln 2| <= |x|
    if not (nats <= allowed and abs(loss - math.log(2)) <= beta * allowed):
        raise TrainingError(
            f"step 1: before the first update the model is the reference, but the loss of the pairs is {loss:.6f} "
            f"(ln 2 = {math.log(2):.6f}) and their log-ratios differ by {nats:.4g} nats on average (0; up to {allowed} "
            f"in {dtype} by rounding): something other than the weights differs between the two passes"
        )


def _key(run: Run, dataset: PackedDataset, weights: str) -> dict[str, Any]:
    experiment = run.experiment
    return {
        "data": facts_of(dataset).digest,
        "tokenizer": dataset.index.tokenizer_digest,
        "weights": weights,
        "model": experiment.model.model_dump(mode="json"),
        "precision": experiment.precision.model_dump(mode="json"),
        "rope_alpha": experiment.stages[0].rope_alpha,
        "device": run.device.type,
    }


def _digest_of_weights(experiment: Experiment) -> str:
    """Of the weights that the run starts from, on rank 0."""
    folder = checkpoint_of(Path(str(experiment.checkpoint.init_from)))
    parts: list[Any] = [save_load.read_marker(folder)["files"]]
    if experiment.tuning.lora is not None and experiment.tuning.lora.adapter is not None:
        files = sorted(path for path in Path(experiment.tuning.lora.adapter).iterdir() if path.is_file())
        parts += [(path.name, file_digest(path)) for path in files]
    return digest_of(parts)


def _read(file: Path, key: dict[str, Any]) -> np.ndarray | None:
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found, stored = arrays["log_probability"], json.loads(str(arrays["key"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); before its first step, a run writes it again once it is removed"
        ) from None
    if stored != key:
        raise CheckpointError(f"{file}: belongs to another run; remove it")
    return found


def _write(file: Path, key: dict[str, Any], log_probability: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, log_probability=log_probability, key=np.array(json.dumps(key)))
    file.parent.mkdir(exist_ok=True)
    write_file(file, content.getvalue())


def _differences(folder: Path, key: dict[str, Any]) -> str:
    """In words, how the files that are there differ from what is wanted."""
    found = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            stored = json.loads(str(arrays["key"]))
        found.append(f"{file.name} has another {', '.join(name for name in key if stored.get(name) != key[name])}")
    return f" ({'; '.join(found)})" if found else ""


@torch.no_grad()
def _compute(run: Run, stage: StageConfig, dataset: PackedDataset, leave_if_asked: Callable[[], None]) -> np.ndarray:
    """(2 * pieces,) float64. Communicates: all ranks."""
    whereabouts.phase("reference log-probabilities")
    parallel, groups, width = run.experiment.parallel, run.groups, stage.micro_batch_sequences
    rounds = groups.pp.size() if parallel.virtual_pipeline_model_parallel_size > 1 else 1
    loader = PairLoader(dataset, width, groups.dp.rank(), groups.dp.size(), rounds)
    found = np.zeros(2 * len(dataset.index.piece_length))

    def forward(sent: Iterator[SentBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(sent)
        inputs = model_inputs(
            batch, rope_alpha=stage.rope_alpha, loss_tokens=1.0, route=lambda *_: EVALUATION, as_pairs=True
        )
        output, _ = model(inputs)
        return output, lambda kept: (kept.sum(), torch.zeros((), dtype=torch.int, device=run.device), kept)

    for model in run.wrapped:
        model.eval()
    try:
        at_a_time = ROUNDS_AT_A_TIME * groups.pp.size()
        for first in range(0, len(loader.rows), at_a_time):
            leave_if_asked()
            last = min(first + at_a_time, len(loader.rows))

            def feed(first: int = first, last: int = last) -> Iterator[SentBatch]:
                return sent_ahead(run, loader.micro_batches(first, last))

            answers = run_schedule(run, forward, feed, last - first, stage.sequence_length * width, forward_only=True)
            if groups.tp.rank() == 0 and groups.cp.rank() == 0:  # the others have the same
                for number, of_batch in zip(range(first, last), answers, strict=False):  # none but on the last stage
                    loader.put(found, number, of_batch.cpu().numpy())
    finally:
        for model in run.wrapped:
            model.train()
    return sum_over(dist.group.WORLD, torch.from_numpy(found).to(run.device)).cpu().numpy()
