"""What the reference model of a DPO run says of every answer: log-probabilities under the weights that the run starts
from, computed in evaluation mode before the first step and kept in RUN_DIR/reference.

A file is named by the digest of its key: data, tokenizer, weights and numerics. A run that resumes reads the file of
its data and is refused without it; the weights that it holds are no longer those of the reference. What else the key
has says how the file was computed: by then the weights may be gone, and other settings may have changed.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
ALLOWED_NATS = {"fp32": (0.01, 0.0), "bf16": (1.0, 0.05)}
"""How far the two log-ratios of a pair may be apart on average before the first update, where they are 0 but for
rounding: at least the first number, and the second times the square root of the target tokens of a pair. fp32 keeps a
sum over a thousand tokens to 1e-3. A bf16 logit of 16 is rounded to 0.06 and one of 32 to 0.125, so cross-entropies
differ by a few hundredths where a matmul of another shape adds in another order, and these add up as a square root.
Other weights, dropout or another document differ in proportion to the tokens."""


def find(experiment: Experiment, datasets: Mapping[str, PackedDataset]) -> dict[str, Path]:
    """The files of a run with task=dpo that resumes, by path of the data; {} for another task. A branch of another run
    uses those of that run until it has its own. Raises CheckpointError if one is missing or cannot be read."""
    if experiment.stages[0].task != "dpo":  # the rules: then no other stage has it
        return {}
    folders, branch = [Path(experiment.run_dir) / FOLDER], str(experiment.checkpoint.resume_from)
    if experiment.checkpoint.resume_from is not None and not branch.isdecimal():
        folders.append(Path(branch).absolute().parent.parent / FOLDER)
    keys = {file: _read(file)[1] for folder in folders for file in sorted(folder.glob("*.npz"))}
    found = {}
    for path, dataset in datasets.items():
        wanted = _lasting_key(experiment, dataset)
        files = [file for file, key in keys.items() if all(key.get(name) == wanted[name] for name in wanted)]
        if not files:
            others = [
                f"{file.name} has another {', '.join(name for name in wanted if key.get(name) != wanted[name])}"
                for file, key in keys.items()
            ]
            differing = f" ({'; '.join(others)})" if others else ""
            raise CheckpointError(
                f"{folders[0]}: holds no reference log-probabilities of {path} for this run{differing}; they were "
                "computed with the weights that the run started from: go back to that data and that rope_alpha, or "
                "start a new run"
            )
        found[path] = files[0]
    return found


def resumed(experiment: Experiment, datasets: Mapping[str, PackedDataset]) -> None:
    """Give every dataset of a run that resumes its `reference`. Raises as `find`. Communicates: all ranks."""
    files = resume.on_rank_0(lambda: find(experiment, datasets))
    for path, file in files.items():
        datasets[path].reference = resume.on_rank_0(partial(_log_probability, file))


def attach(run: Run, leave_if_asked: Callable[[], None] = lambda: None) -> None:
    """Before its first step, give every dataset of a run with task=dpo its `reference`. A run that resumes has them
    (`resumed`), and only keeps the files of the run that it branches off.

    leave_if_asked: called by all ranks now and then. Communicates: all ranks, and a forward pass over data without a
    file.
    """
    stage, folder, datasets = run.experiment.stages[0], run.run_dir / FOLDER, run.loader.order.datasets
    if stage.task != "dpo":
        return
    run.loader.forget()
    if run.first_step > 0:
        resume.on_rank_0(lambda: _copy(find(run.experiment, datasets).values(), folder))
        return
    weights, files = resume.on_rank_0(lambda: _digest_of_weights(run.experiment)), set[str]()
    for path, dataset in datasets.items():
        key = _key(run, dataset, weights)
        file = folder / f"{digest_of(key)[:16]}.npz"
        files.add(file.name)
        if resume.on_rank_0(file.is_file):
            dataset.reference = resume.on_rank_0(partial(_log_probability, file, key))
            continue
        run.log.line(f"reference: a pass over the {len(dataset.index.piece_length):,} pairs of {path}")
        dataset.reference = _compute(run, stage, dataset, leave_if_asked)
        check_finite(dataset.reference, path)
        resume.on_rank_0(partial(_write, file, key, dataset.reference))
    resume.on_rank_0(partial(_remove_others, folder, files))


def check_finite(log_probability: np.ndarray, path: str) -> None:
    """Raise TrainingError for a log-probability that is not a finite number: the run would meet it at any step."""
    wrong = np.flatnonzero(~np.isfinite(log_probability))
    if len(wrong):
        raise TrainingError(
            f"{path}: the weights of checkpoint.init_from give {len(wrong):,} of {len(log_probability):,} answers a "
            f"log-probability that is not a finite number, the first in pair {wrong[0] // 2 + 1}: they are damaged or "
            "diverged"
        )


def check_first_step(sums: PairSums, target_tokens: int, beta: float, dtype: str) -> None:
    """Raise TrainingError unless model and reference agree before the first update: the loss of the pairs is ln 2, and
    margins are 0. target_tokens: of all pairs together."""
    loss, nats = sums.preference_loss / sums.pairs, sums.margin_size / sums.pairs / beta
    least, per_root = ALLOWED_NATS[dtype]
    allowed = max(least, per_root * math.sqrt(target_tokens / sums.pairs))
    # |-log sigmoid(x) - ln 2| <= |x|
    if not (nats <= allowed and abs(loss - math.log(2)) <= beta * allowed):
        raise TrainingError(
            f"step 1: before the first update the model is the reference, but the loss of the pairs is {loss:.6f} "
            f"(ln 2 = {math.log(2):.6f}) and their log-ratios differ by {nats:.4g} nats on average (0; up to "
            f"{allowed:.3g} in {dtype} by rounding): something other than the weights differs between the two passes"
        )


def _lasting_key(experiment: Experiment, dataset: PackedDataset) -> dict[str, Any]:
    """What does not change while a run goes on."""
    return {
        "data": facts_of(dataset).digest,
        "tokenizer": dataset.index.tokenizer_digest,
        "rope_alpha": experiment.stages[0].rope_alpha,
    }


def _key(run: Run, dataset: PackedDataset, weights: str) -> dict[str, Any]:
    experiment = run.experiment
    return _lasting_key(experiment, dataset) | {
        "weights": weights,
        "model": experiment.model.model_dump(mode="json"),
        "precision": experiment.precision.model_dump(mode="json"),
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


def _read(file: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(log-probabilities, key). Raises CheckpointError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays["log_probability"], dict(json.loads(str(arrays["key"])))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); before its first step, a run writes it again once it is removed"
        ) from None


def _log_probability(file: Path, key: dict[str, Any] | None = None) -> np.ndarray:
    """Those of a file, which must have this key. Raises CheckpointError."""
    found, stored = _read(file)
    if key is not None and stored != key:
        raise CheckpointError(f"{file}: belongs to another run; remove it")
    return found


def _write(file: Path, key: dict[str, Any], log_probability: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, log_probability=log_probability, key=np.array(json.dumps(key)))
    file.parent.mkdir(exist_ok=True)
    write_file(file, content.getvalue())


def _copy(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in files:
        if file.parent != folder:
            write_file(folder / file.name, file.read_bytes())


def _remove_others(folder: Path, files: Collection[str]) -> None:
    """Those of earlier attempts at this run, which took no step: what is left says what the run has started from."""
    for file in folder.glob("*.npz"):
        if file.name not in files:
            file.unlink()


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
