"""Finds what training would refuse before its first step, in one process and without a model: `hunyuan-pretrain doctor
CONFIG`. On a GPU, also tries the attention backends.

Calls the same functions as training, so both report the same errors. Not checked: the data's SHA-256 (`hunyuan-data
verify` checks it), the bytes of a checkpoint, and whether another process is training in the run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import WITHOUT_ANY, checkpoint_of, faults_of, none_is_good, step_of
from hunyuan_pretrain.checkpoint.history import history_of
from hunyuan_pretrain.config.derived import data_parallel_size, smallest_world_size
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import with_absolute_paths
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.loader import StepLoader
from hunyuan_pretrain.data.packed_format import PackedIndex
from hunyuan_pretrain.data.sample_order import SampleOrder
from hunyuan_pretrain.data.tokenizer import Tokenizer
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.runtime.device import Machine, versions
from hunyuan_pretrain.runtime.logging import check_writable
from hunyuan_pretrain.runtime.seeding import use_deterministic_algorithms
from hunyuan_pretrain.train import branches, reference, resume, setup
from hunyuan_pretrain.train.attention_choice import choose
from hunyuan_pretrain.train.base_weights import base_in, refuse_other_base


def refusals(experiment: Experiment) -> list[str]:
    """Messages of all failed checks; if empty, training can start as far as one process can tell. Writes nothing."""
    experiment = with_absolute_paths(experiment)  # as recorded in a run's history
    found = [
        *_messages(lambda: check_writable(Path(experiment.run_dir))),
        *_messages(lambda: setup.check_tokenizer_folder(experiment.tokenizer)),
    ]
    loaded: list[Tokenizer] = []
    found += [] if found else _messages(lambda: loaded.append(Tokenizer.load(experiment.tokenizer)))
    digest = loaded[0].digest if loaded else None
    ranks = data_parallel_size(experiment, _world_size(experiment))
    found += _messages(lambda: _check_data(experiment, ranks, digest))
    found += _messages(lambda: _check_evaluation(experiment, ranks, loaded[0])) if loaded else []
    if digest is not None and not found:  # resuming compares the data too
        found += _messages(lambda: _start(experiment, digest))
    return list(dict.fromkeys(found))


def attention_trials(
    experiment: Experiment, machine: Machine, device: str = "cuda"
) -> tuple[list[tuple[str, str]], list[str]]:
    """((name, value) rows, messages of failed checks): the attention backends that a run on this device would take,
    with the times of all that it tries, as rank 0 measures them alone. A run that resumes keeps what it has recorded in
    its newest checkpoint."""
    experiment = with_absolute_paths(experiment)
    use_deterministic_algorithms(experiment.runtime.deterministic)
    config = transformer_config(experiment.model, experiment.parallel, experiment.precision)
    loader = StepLoader(experiment, 0, data_parallel_size(experiment, _world_size(experiment)), None)
    try:
        batch = loader.micro_batches(0)[0]
        room = loader.order.most_documents(0) if experiment.runtime.cuda_graphs else 0
    finally:
        loader.close()
    ranks, lines = (0, experiment.parallel.context_parallel_size), list[str]()

    def try_all() -> None:
        recorded = _recorded_attention(experiment)
        lines.extend(choose(experiment, machine, config, batch, ranks, torch.device(device), recorded, room)[1])

    failed = list(_messages(try_all))
    return [(name, value) for name, _, value in (line.partition(": ") for line in lines)], failed


def _check_data(experiment: Experiment, ranks: int, tokenizer_digest: str | None) -> None:
    loader = StepLoader(experiment, 0, ranks, tokenizer_digest)
    loader.close()
    _check_shards(loader.indexes)


def _check_evaluation(experiment: Experiment, ranks: int, tokenizer: Tokenizer) -> None:
    evaluation, sets = setup.open_evaluation(experiment, 0, ranks, tokenizer)
    for one in [*([evaluation] if evaluation else []), *sets.values()]:
        _check_shards(one.indexes)


def _check_shards(indexes: Iterable[PackedIndex]) -> None:
    for index in indexes:
        for shard in index.read_shards:
            shard.check()


def _messages(check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except (ConfigError, DataFormatError, CheckpointError) as error:
        yield str(error)
    except OSError as error:
        yield f"{error.filename}: {error.strerror}"


def _recorded_attention(experiment: Experiment) -> dict[str, str]:
    found = save_load.find_checkpoints(Path(experiment.run_dir)) if experiment.checkpoint.resume else []
    return history_of(found[-1], save_load.read_marker(found[-1]), with_data=False)[-1].attention if found else {}


def _start(experiment: Experiment, tokenizer_digest: str) -> None:
    """Check the checkpoint that the run would start or resume from."""
    settings, run_dir = experiment.checkpoint, Path(experiment.run_dir)
    last_step = branches.last_usable_step(run_dir)
    found = save_load.find_checkpoints(run_dir)
    if last_step is not None:
        found = [one for one in found if (step_of(one) or 0) <= last_step]
    met = resume.what_is_met(experiment, tokenizer_digest, versions(), _world_size(experiment))
    wanted = settings.resume_from
    if wanted is not None and not (
        found and resume.is_of_branch(experiment, met, found[-1], save_load.read_marker(found[-1]), str(wanted))
    ):
        folder = branches.branch_folder(experiment, found)
        resume.go_on(experiment, met, folder, save_load.read_marker(folder))
    elif found and settings.resume:
        resume.go_on(experiment, met, found[-1], save_load.read_marker(found[-1]))
    elif found:
        raise branches.other_run_error(found[-1])
    elif settings.resume and (faults := faults_of(run_dir)):
        raise none_is_good(run_dir, faults, WITHOUT_ANY)
    is_start = not found and wanted is None
    if not is_start and experiment.stages[0].task == "dpo":
        reference.find(experiment, SampleOrder(experiment, tokenizer_digest).datasets)
    if settings.init_from is not None and (is_start or experiment.tuning.lora is not None):
        folder = checkpoint_of(Path(settings.init_from))
        base = base_in(experiment, folder, save_load.read_marker(folder))
        for of_run in found[-1:]:  # with LoRA, every start reads the base
            refuse_other_base(of_run, save_load.read_marker(of_run), base)


def _world_size(experiment: Experiment) -> int:
    return experiment.parallel.world_size or smallest_world_size(experiment)
