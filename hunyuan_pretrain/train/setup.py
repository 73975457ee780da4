"""Builds everything the training loop needs from an experiment: groups, model, optimizer, data, checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import step_of
from hunyuan_pretrain.config import rules
from hunyuan_pretrain.config.errors import ConfigError, Problem
from hunyuan_pretrain.config.history import set_aside_later, write_history
from hunyuan_pretrain.config.load import dump_resolved
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.values import with_absolute_paths
from hunyuan_pretrain.data.errors import DataFormatError
from hunyuan_pretrain.data.loader import EvaluationLoader, StepLoader
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, copy_tokenizer
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.agreement import error_of_rank_0, from_rank_0, patience
from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed, leave_layout
from hunyuan_pretrain.runtime.device import probe, versions
from hunyuan_pretrain.runtime.environment import keep_freed_memory, recorded, set_variables
from hunyuan_pretrain.runtime.lock import RunLock
from hunyuan_pretrain.runtime.logging import RunLog, check_writable, record_environment
from hunyuan_pretrain.runtime.policy import (
    backend_of,
    choose_device,
    cpu_threads,
    obstacles,
)
from hunyuan_pretrain.runtime.seeding import seed_generators, use_deterministic_algorithms
from hunyuan_pretrain.runtime.stop import StoppedBeforeFirstStepError, StopRequest
from hunyuan_pretrain.train import branches, reference, resume, same_start
from hunyuan_pretrain.train.attention_choice import settle
from hunyuan_pretrain.train.base_weights import Base, load_base, load_weights, refuse_other_base, start_adapter
from hunyuan_pretrain.train.benchmarks import Benchmarks, open_benchmarks
from hunyuan_pretrain.train.chunks import build_chunks
from hunyuan_pretrain.train.optimizer import build_optimizer, wrap_data_parallel
from hunyuan_pretrain.train.recorded_step import RecordedSteps
from hunyuan_pretrain.train.resume import OWES_TASKS, OWES_VALIDATION, Start
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import sum_over
from hunyuan_pretrain.train.verification import verify_data


def prepare(
    experiment: Experiment,
    stop: StopRequest | None = None,
    accepted: Collection[str] = (),
    benchmarks: Benchmarks | None = None,
) -> Run:
    """Build a run on the ranks that torchrun's environment defines (or on one rank without it), resuming from the
    newest checkpoint if there is one.

    `accepted`: keys of changes since the checkpoint that the user accepts (`config.changes`). `benchmarks`: evaluates
    evaluation.tasks. The returned run has absolute paths. Raises ConfigError if the layout does not fit the world size,
    DataFormatError or CheckpointError if the data or a checkpoint cannot be used; nothing is written before all of them
    are checked. Raises StoppedBeforeFirstStepError, on all ranks, if any rank was asked to stop.
    """
    experiment = with_absolute_paths(experiment)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # one of several would leave the others waiting for it
        leave_if_asked(stop)
    device = start_machine(experiment)
    leave_if_asked(stop, device)
    _check_paths(experiment)
    benchmarks = open_benchmarks(experiment, benchmarks)
    leave_if_asked(stop, device)
    met = same_start.meet(experiment)
    lock = _take_lock(experiment)
    try:
        groups = build_groups(experiment.parallel, experiment.runtime.distributed_timeout_s)
        chunks, wrapped = _build_model(experiment, groups)
        optimizer = build_optimizer(wrapped, experiment, groups)
        base = load_base(experiment, chunks, optimizer)
        start = _load_or_init(experiment, chunks, optimizer, met, accepted, base).after(lock.notes if lock else ())
        start = branches.with_ledger(replace(start, base=base.record if base else None), Path(experiment.run_dir))
        leave_if_asked(stop, device)
        loader, evaluation, sets = _open_data(experiment, groups, stop, start)
        leave_if_asked(stop, device)
        if start.first_step > 0:
            reference.resumed(experiment, loader.order.datasets)
        start = settle(experiment, groups, chunks, loader, device, start)
        log = _open_log(experiment, start)
        recorded = RecordedSteps() if experiment.runtime.cuda_graphs else None
        model = (chunks, wrapped, optimizer)
        data, first = (loader, evaluation), start.first_step
        run = Run(experiment, device, groups, *model, *data, first, log, start, lock, sets, recorded, benchmarks)
        reference.attach(run, partial(leave_if_asked, stop, device))
    except BaseException:
        if lock is not None:
            lock.release(began=False)
        raise
    return run


def is_stop_asked(stop: StopRequest, device: torch.device) -> bool:
    """Whether any rank was asked to stop. All ranks get the same answer and so save the same step. Communicates: all
    ranks."""
    flag = torch.tensor(float(stop.is_asked), device=device)
    return bool(sum_over(dist.group.WORLD, flag).item())


def leave_if_asked(stop: StopRequest | None, device: torch.device | None = None) -> None:
    """Raise StoppedBeforeFirstStepError if any rank was asked to stop; without `device`, if this rank was."""
    if stop is not None and (stop.is_asked if device is None else is_stop_asked(stop, device)):
        raise StoppedBeforeFirstStepError()


def leave(run: Run, leave_groups: Callable[[], None] = leave_layout) -> None:
    """End a run but keep the job's ranks for another run. The training loop passes `destroy_groups`, which ends the job
    too."""
    run.log.close()
    run.loader.close()
    if run.recorded is not None:
        run.recorded.close()  # first: NCCL waits for graphs that hold its work
    if run.lock is not None:
        run.lock.release()
    leave_groups()


@contextmanager
def left_at_the_end(run: Run, leave_groups: Callable[[], None] = leave_layout) -> Iterator[None]:
    """Call `leave` after the block; after an error in it, only if there is no other rank.

    Other ranks may be waiting for this one in a collective. Leaving the groups would then wait for them, and the error
    would never be reported. The command prints it and ends the process (cli.program.main).
    """
    try:
        yield
    except BaseException:
        if dist.get_world_size() == 1:
            leave(run, leave_groups)
        elif run.lock is not None:
            run.lock.release()
        raise
    leave(run, leave_groups)


def start_machine(experiment: Experiment) -> torch.device:
    """Choose this rank's device, and join the other ranks. Raises ConfigError."""
    kind = choose_device(experiment.runtime.device)
    device = torch.device(kind)
    rules.check(experiment, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if found := obstacles(probe(), experiment, ranks_of_node):
        raise ConfigError("this machine", found)
    set_variables(experiment)  # the command has done so already, and earlier
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        if experiment.runtime.cuda_graphs:
            torch.cuda.set_stream(torch.cuda.Stream(device))  # of the whole run: see CudaGraph
    else:
        keep_freed_memory()
    if kind == "cpu" or experiment.optimizer.cpu_offload_fraction > 0:
        torch.set_num_threads(cpu_threads(ranks_of_node, experiment.runtime.cpu_threads_per_rank))
    use_deterministic_algorithms(experiment.runtime.deterministic)
    initialize_distributed(backend_of(kind), experiment.runtime.distributed_timeout_s)
    seed_generators(experiment.seed, dist.get_rank())
    return device


def _build_model(
    experiment: Experiment, groups: ProcessGroupCollection
) -> tuple[list[HunyuanModel], list[DistributedDataParallel]]:
    chunks = build_chunks(experiment, groups, experiment.seed)
    return chunks, wrap_data_parallel(chunks, experiment, groups)


def _open_data(
    experiment: Experiment, groups: ProcessGroupCollection, stop: StopRequest | None = None, start: Start | None = None
) -> tuple[StepLoader, EvaluationLoader | None, dict[str, EvaluationLoader]]:
    """Loaders of training, evaluation.data and evaluation.sets."""
    tokenizer = Tokenizer.load(experiment.tokenizer)
    digest = tokenizer.digest
    rank, size = groups.dp.rank(), groups.dp.size()
    # an unchanged run continues its last segment, which is `experiment`
    segments = start.segments if start else ()
    first_step, left_out = (segments[-1].first_step, segments[-1].left_out) if segments else (0, ())
    past = segments[:-1]
    loader = StepLoader(experiment, rank, size, digest, past, first_step, left_out, tokenizer.token_bytes)
    evaluation, sets = open_evaluation(experiment, rank, size, tokenizer)
    opened: list[StepLoader | EvaluationLoader] = [loader, *([evaluation] if evaluation else []), *sets.values()]
    indexes = [index for one in opened for index in one.indexes]
    verify_data(indexes, experiment.runtime.verify_data, stop, Path(experiment.run_dir))
    return loader, evaluation, sets


def open_evaluation(
    experiment: Experiment, rank: int, size: int, tokenizer: Tokenizer
) -> tuple[EvaluationLoader | None, dict[str, EvaluationLoader]]:
    """Loaders of evaluation.data and evaluation.sets for data-parallel rank `rank` of `size`.

    Raises DataFormatError.
    """
    # the interleaved schedule needs the number of micro-batches to be a multiple of the pipeline size
    rounds = (
        experiment.parallel.pipeline_model_parallel_size
        if experiment.parallel.virtual_pipeline_model_parallel_size > 1
        else 1
    )
    open_set = partial(
        EvaluationLoader, experiment, rank, size, tokenizer.digest, rounds, token_bytes=tokenizer.token_bytes
    )
    evaluation = open_set() if experiment.evaluation.data else None
    sets = {named.name: open_set(named=named) for named in experiment.evaluation.sets}
    opened = [*([evaluation] if evaluation else []), *sets.values()]
    multiple = experiment.model.moe_routing_group_tokens * experiment.parallel.context_parallel_size
    for path, one in zip(experiment.evaluation.paths, opened, strict=True):
        if one.sequence_length % multiple:
            raise DataFormatError(
                f"{path}: packed to sequences of {one.sequence_length} tokens, which do not give every "
                "context-parallel rank "
                f"whole routing groups; pack it to a multiple of {multiple}"
            )
    return evaluation, sets


def _load_or_init(
    experiment: Experiment,
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer,
    met: Mapping[str, Any],
    accepted: Collection[str] = (),
    base: Base | None = None,
) -> Start:
    """Resume from the run's newest intact checkpoint; without one, start from `checkpoint.init_from` or fresh
    weights. base: the weights of a run with LoRA, which are there already."""
    settings, run_dir = experiment.checkpoint, Path(experiment.run_dir)
    if not settings.resume:
        found, error = from_rank_0(lambda: save_load.find_checkpoints(run_dir))
        if error is not None:
            raise CheckpointError(f"{run_dir}: {error}")
        if found:
            raise branches.other_run_error(found[-1])
    else:
        starts: dict[Path, Start] = {}

        def accept(folder: Path, marker: dict[str, Any]) -> None:
            refuse_other_base(folder, marker, base)
            start = resume.go_on(experiment, met, folder, marker, accepted)
            owes = frozenset(key for key in (OWES_VALIDATION, OWES_TASKS) if marker.get(key))
            starts[folder] = replace(start, owes=owes)

        if (
            settings.resume_from is not None
            and (start := _branch(experiment, met, accepted, chunks, optimizer, base)) is not None
        ):
            return start
        last_step = resume.on_rank_0(lambda: branches.last_usable_step(run_dir))
        resumed = save_load.load_newest(run_dir, chunks, optimizer, accept, last_step)
        if resumed is not None:
            return starts[resumed.folder].after(resumed.notes)
    if settings.init_from is None:
        return resume.begin(experiment, met)
    weights = base or load_weights(experiment, chunks, optimizer)
    lines = (*weights.lines, *start_adapter(experiment, chunks, optimizer))
    return resume.begin(experiment, met, lines, weights.changes)


def _branch(
    experiment: Experiment,
    met: Mapping[str, Any],
    accepted: Collection[str],
    chunks: list[HunyuanModel],
    optimizer: MegatronOptimizer,
    base: Base | None,
) -> Start | None:
    """Resume from `checkpoint.resume_from`. Returns None if the run is already on that branch. Communicates: all
    ranks."""
    wanted, run_dir = str(experiment.checkpoint.resume_from), Path(experiment.run_dir)
    found: list[Path] = resume.on_rank_0(lambda: save_load.find_checkpoints(run_dir))
    if found and resume.is_of_branch(
        experiment, met, found[-1], resume.on_rank_0(lambda: save_load.read_marker(found[-1])), wanted
    ):
        return None
    folder = branches.branch_folder(experiment, found)
    marker = resume.on_rank_0(lambda: save_load.read_marker(folder))
    refuse_other_base(folder, marker, base)
    start = resume.go_on(experiment, met, folder, marker, accepted)
    save_load.load(folder, chunks, optimizer)
    later = [one for one in found if (step_of(one) or 0) > start.first_step]
    return resume.branched(start, wanted, later)


def _check_paths(experiment: Experiment) -> None:
    """Raise ConfigError early for a run_dir that cannot be written or a tokenizer that is a file. Communicates: all
    ranks."""
    _write_on_rank_0(experiment, lambda: check_writable(Path(experiment.run_dir)))
    check_tokenizer_folder(experiment.tokenizer)


def _take_lock(experiment: Experiment) -> RunLock | None:
    """Lock the run directory on rank 0; returns None elsewhere. Raises ConfigError, on all ranks, if another process is
    training in it. Communicates: all ranks."""
    taken: list[RunLock] = []

    def take() -> Sequence[Problem]:
        try:
            taken.append(RunLock.take(Path(experiment.run_dir)))
        except ConfigError as error:
            return error.problems
        except OSError as error:
            return [Problem("run_dir", Problem.NO_VALUE, f"cannot be written: {error.strerror}", "choose another")]
        return ()

    with patience():  # it may have to wait for a heartbeat
        problems = resume.on_rank_0(take)
    if problems:
        raise ConfigError(experiment.run_dir, problems)
    return taken[0] if taken else None


def check_tokenizer_folder(tokenizer: str) -> None:
    """Raise ConfigError if `tokenizer` is a file: the run copies a whole tokenizer folder."""
    path = Path(tokenizer)
    if path.is_file():
        is_in_place = path.name == RANKS_FILE or (path.parent / RANKS_FILE).is_file()
        hint = f"use {path.parent}" if is_in_place else f"put it in its own folder as {RANKS_FILE}, and use that folder"
        raise ConfigError(
            "tokenizer",
            [Problem("tokenizer", tokenizer, f"is a file; a tokenizer is a folder with {RANKS_FILE}", hint)],
        )


def _write_on_rank_0(experiment: Experiment, job: Callable[[], None]) -> None:
    """Run `job` on rank 0. If it fails, raises ConfigError on all ranks, because the others would wait. Communicates:
    all ranks."""

    def told() -> None:
        try:
            job()
        except OSError as error:
            place = "" if error.filename in (None, experiment.run_dir) else f" ({error.filename})"
            raise RuntimeError(f"{error.strerror}{place}") from error

    with patience():  # a service may take its time to answer, a disk to copy
        error = error_of_rank_0(told)
    if error is not None:
        problem = Problem("run_dir", Problem.NO_VALUE, f"cannot be written: {error}", "choose another")
        raise ConfigError(experiment.run_dir, [problem])


def _open_log(experiment: Experiment, start: Start) -> RunLog:
    run_dir = Path(experiment.run_dir)
    log: RunLog | None = None

    def write() -> None:
        nonlocal log
        branches.note_branch(run_dir, start)
        set_aside_later(run_dir, start.leaves)
        variables = recorded()
        variables.pop(experiment.logging.webhook_url_env or "", None)  # its value may be a secret
        record_environment(run_dir, dump_resolved(experiment), versions() | variables)
        write_history(run_dir, start.segments)
        copy_tokenizer(experiment.tokenizer, run_dir / "tokenizer")  # an export needs the run directory only
        log = RunLog(run_dir, experiment.logging, experiment.name, is_writer=True)
        log.truncate_after(start.first_step)
        log.open_sinks(experiment.model_dump(mode="json"))
        for line in save_load.remove_partials(run_dir):
            log.line(line)

    _write_on_rank_0(experiment, write)
    return log or RunLog(run_dir, experiment.logging, experiment.name, is_writer=False)
