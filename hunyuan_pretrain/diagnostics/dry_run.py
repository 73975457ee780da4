"""`hunyuan-pretrain plan --dry-run`: run ranks of the real job in this process, one after another, without its nodes.

Each rank is built as `train` builds it: its process groups, model, gradient buffers and optimizer. It then runs one
step of each stage of training through core's pipeline schedule. Tensors are meta tensors: shapes are checked because
everything runs, and nothing is computed. Calls of collectives are recorded (parallel/fake_world.py) and compared
between ranks (diagnostics/dry_run_checks.py).

Ranks of a pipeline rank run the same program, on other data, so of each pipeline rank the first and the last rank are
built, which differ in every coordinate; in a world of up to SMALL_WORLD ranks all are. What is not built communicates
as the first rank of its pipeline rank.

What differs from a real step, because meta tensors have no values or because it communicates nothing:
    attention        torch's FlashAttention, whatever the backend; one document per sequence
    layers           those that run everywhere, without FP8, whose recipes change what is kept and gathered
    no capacity      every expert gets the same number of rows (`even_counts`)
    update           the weights are not updated: gradients are reduced and normed, weights are gathered
    host memory      nothing is offloaded
    noise scale      not measured
    micro-batches    as many as fill the pipeline and show its steady state (`num_micro_batches`)
"""

from __future__ import annotations

import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS, grid, smallest_world_size
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.data.loader import MicroBatch, PairedAnswers
from hunyuan_pretrain.model import dispatch, packed_attention
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model
from hunyuan_pretrain.parallel.fake_world import (
    Membership,
    Record,
    Recorder,
    as_rank,
    current_autograd_node,
    kind_of_group,
    next_autograd_node,
    positions,
    replaced,
)
from hunyuan_pretrain.parallel.sharding import Placement
from hunyuan_pretrain.parallel.traffic import Traffic
from hunyuan_pretrain.runtime import cpu_megatron
from hunyuan_pretrain.train import optimizer as train_optimizer
from hunyuan_pretrain.train.optimizer import build_optimizer, wrap_data_parallel
from hunyuan_pretrain.train.run import Run
from hunyuan_pretrain.train.step import launch_step

META = torch.device("meta")
SMALL_WORLD = 16
"""Up to this many ranks, all are built."""


@dataclass
class BuiltRank:
    """What one rank is and does."""

    rank: int
    pipeline_rank: int
    membership: Membership
    weight_bytes: int = 0
    gradient_bytes: int = 0
    placements: dict[int, list[dict[str, Placement]]] = field(default_factory=dict)
    """Rank -> placements of its model chunks: of this rank and those that it stands for."""
    calls: list[Record] = field(default_factory=list)
    """In all steps, in order."""
    traffic: list[Traffic] = field(default_factory=list)
    """Of each step."""


@dataclass(frozen=True)
class DryRun:
    """The ranks that were built, and what prevents the job."""

    experiment: Experiment
    """As it ran; see `as_it_runs`."""
    world_size: int
    ranks: list[BuiltRank]
    stages: list[StageConfig]
    """The steps: stages of training that differ in shape, with as many micro-batches as ran."""
    problems: list[str]
    """Errors of single ranks."""
    loss_chunk_tokens: int


def dry_run(experiment: Experiment, world_size: int | None = None) -> DryRun:
    """Run the ranks of `experiment` that stand for all. `world_size`: None as in plan.summary.summarise. config.rules
    must have checked it. Leaves no process-wide state of torch.distributed and megatron-core."""
    world_size = world_size or experiment.parallel.world_size or smallest_world_size(experiment)
    experiment = as_it_runs(experiment)
    stages = steps_of(experiment, world_size)
    ranks, problems = [], []
    for rank in ranks_to_build(world_size, experiment.parallel.pipeline_model_parallel_size):
        place = Place()
        try:
            ranks.append(run_rank(experiment, world_size, rank, stages, place))
        except Exception as error:
            problems.append(f"rank {rank} fails in {place()}: {_told(error)}")
    return DryRun(experiment, world_size, ranks, stages, problems, loss_chunk_tokens(experiment))


def ranks_to_build(world_size: int, pipeline_size: int) -> list[int]:
    """The first and the last rank of each pipeline rank, or all of a small world."""
    if world_size <= SMALL_WORLD:
        return list(range(world_size))
    each = world_size // pipeline_size
    return sorted({rank for start in range(0, world_size, each) for rank in (start, start + each - 1)})


def as_it_runs(experiment: Experiment) -> Experiment:
    """Without what needs real memory or kernels: FP8, state and activations on the host, a second stream, and other
    formats of the optimizer state. Without the gradient noise scale, whose few numbers are not in the plan."""
    changes: dict[str, dict[str, Any]] = {
        "optimizer": {
            "cpu_offload_fraction": 0.0,
            "use_precision_aware_optimizer": False,
            "measure_noise_scale_every_steps": None,
        },
        "parallel": {"cpu_offloading_num_layers": 0, "overlap_shared_expert": False},
        "precision": {"fp8_recipe": None, "fp8_parameters": False},
    }
    return experiment.model_copy(
        update={name: getattr(experiment, name).model_copy(update=change) for name, change in changes.items()}
    )


def steps_of(experiment: Experiment, world_size: int) -> list[StageConfig]:
    """One step for each shape of micro-batch, with `num_micro_batches`."""
    dp = grid(experiment.parallel, world_size).dp
    found: dict[tuple[int, int], StageConfig] = {}
    for stage in experiment.stages:
        per_round = stage.micro_batch_sequences * dp
        whole = max(stage.global_batch_sequences // per_round, 1)
        sequences = per_round * min(whole, num_micro_batches(experiment))
        shape = stage.sequence_length, stage.micro_batch_sequences
        found.setdefault(shape, stage.model_copy(update={"global_batch_sequences": sequences}))
    return list(found.values())


def num_micro_batches(experiment: Experiment) -> int:
    """Enough to fill the pipeline and to repeat its steady state once; the interleaved schedule takes whole rounds."""
    size = experiment.parallel.pipeline_model_parallel_size
    return 2 * size if experiment.parallel.virtual_pipeline_model_parallel_size > 1 else size + 1


def loss_chunk_tokens(experiment: Experiment) -> int:
    """Of the device that the job runs on."""
    return LOSS_CHUNK_TOKENS["cpu" if experiment.runtime.device == "cpu" else "cuda"]


# --- one rank ---------------------------------------------------------------------------------------------------------


def run_rank(experiment: Experiment, world_size: int, rank: int, stages: list[StageConfig], place: Place) -> BuiltRank:
    """Build one rank and run one step of each of `stages`."""
    parallel, each = experiment.parallel, world_size // experiment.parallel.pipeline_model_parallel_size
    with (
        as_rank(rank, world_size, parallel, experiment.runtime.distributed_timeout_s) as (groups, membership),
        on_meta(experiment),
    ):
        built = BuiltRank(rank, groups.pp.rank(), membership)
        place.doing = "building the model"
        chunks, wrapped = _build(experiment, groups)
        place.doing = "building the optimizer"
        optimizer = build_optimizer(wrapped, experiment, groups)
        for part in optimizer.chained_optimizers:
            if part.optimizer is not None:
                part.optimizer.step = lambda *args, **kwargs: None
        weights = [weight for model in chunks for weight in model.parameters()]
        built.weight_bytes = _storage_bytes(weights)
        built.gradient_bytes = _storage_bytes([weight.main_grad for weight in weights if weight.requires_grad])
        place.follow(chunks)
        for stage in stages:
            place.doing = f"a step of stage {stage.name}"
            loader: Any = _Batches(stage, groups.dp.size())
            log: Any = None
            run = Run(experiment, META, groups, chunks, wrapped, optimizer, loader, None, 0, log)
            counts = partial(even_counts, experiment, stage, groups)
            with replaced(dispatch, "read_counts", counts), Recorder(groups, place) as recorder:
                launch_step(run, stage, 0)
            built.calls += recorder.calls
            built.traffic.append(recorder.traffic)
        place.doing = "naming its part of the checkpoint"
        first = rank // each * each
        stands_for = range(first, first + each - 1) if rank == first and world_size > SMALL_WORLD else [rank]
        for other in stands_for or [rank]:
            built.placements[other] = _placements(chunks, _Groups(other, groups, membership))
    return built


def _build(
    experiment: Experiment, groups: ProcessGroupCollection
) -> tuple[list[HunyuanModel], list[DistributedDataParallel]]:
    """As train.setup does, with the layers that run everywhere."""
    with META:
        config = transformer_config(
            experiment.model, experiment.parallel, experiment.precision, True, False, "cpu", tuning=experiment.tuning
        )
        chunks = build_model(config, groups, None)
        return chunks, wrap_data_parallel(chunks, experiment, groups)


def _storage_bytes(tensors: list[Any]) -> int:
    """Bytes of all memory that the tensors lie in, padding included."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class _Batches:
    """In the place of a StepLoader: sequences of one document each, or of one pair with task=dpo."""

    pad_id = -1
    """No token is padding."""

    def __init__(self, stage: StageConfig, dp_size: int) -> None:
        self.stage, self.dp_size = stage, dp_size

    def micro_batches(self, step: int) -> list[MicroBatch]:
        stage = self.stage
        length, sequences = stage.sequence_length, stage.micro_batch_sequences
        zero_T = torch.zeros(length * sequences, dtype=torch.int64)
        batch = MicroBatch(
            tokens_T=zero_T,
            labels_T=zero_T,
            loss_mask_T=torch.ones(length * sequences),
            positions_T=torch.arange(length).repeat(sequences),
            cu_seqlens=torch.arange(0, length * sequences + 1, length, dtype=torch.int32),
            max_seqlen=length,
            sequence_ids=torch.arange(sequences),
            pairs=self._pairs() if stage.task == "dpo" else None,
        )
        return [batch] * (stage.global_batch_sequences // (sequences * self.dp_size))

    def _pairs(self) -> PairedAnswers:
        """The first half of each sequence is the chosen answer."""
        length, answers = self.stage.sequence_length, 2 * self.stage.micro_batch_sequences
        answer_T = torch.arange(answers * length // 2) * 2 // length
        return PairedAnswers(answer_T, torch.zeros(answers, dtype=torch.float64), int((answer_T % 2 == 0).sum()))


class _Groups:
    """The groups of another rank of the world, as model.placements reads them: positions and sizes."""

    def __init__(self, rank: int, groups: ProcessGroupCollection, membership: Membership) -> None:
        for name in ("tp", "ep", "dp_cp", "expt_tp", "expt_dp"):
            kind = kind_of_group(getattr(groups, name))
            setattr(self, name, _Position(*positions(membership[kind])[rank]))


@dataclass(frozen=True)
class _Position:
    """Of a rank in a group."""

    place: int
    num_ranks: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.num_ranks


def _placements(chunks: list[HunyuanModel], groups: Any) -> list[dict[str, Placement]]:
    found = []
    for model in chunks:
        with replaced(model, "groups", groups):
            found.append(model.placements())
    return found


# --- stand-ins --------------------------------------------------------------------------------------------------------


@contextmanager
def on_meta(experiment: Experiment) -> Iterator[None]:
    """Inside, the device is the meta device for megatron-core, and what needs values or kernels has a stand-in."""
    flash = packed_attention._Kernel(packed_attention._flash_cuda, packed_attention._flash_cuda_backward)
    type_of = torch.Tensor.type
    with ExitStack() as stack:
        for owner, name, value in (
            (cpu_megatron, "CPU", META),
            # core keeps it on the class, on the device of the first loss
            (MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
            (packed_attention, "_kernel", lambda q_TNH: flash),
            (train_optimizer, "device_of", lambda group: META),
            # core sorts weights by such names
            (torch.Tensor, "type", lambda tensor, *args, **kwargs: _without_meta(type_of(tensor, *args, **kwargs))),
        ):
            stack.enter_context(replaced(owner, name, value))
        LOSS_CHUNK_TOKENS["meta"] = loss_chunk_tokens(experiment)
        stack.callback(LOSS_CHUNK_TOKENS.pop, "meta")
        yield


def _without_meta(type_name: Any) -> Any:
    return type_name.replace("meta.", "") if isinstance(type_name, str) else type_name


def even_counts(
    experiment: Experiment, stage: StageConfig, groups: ProcessGroupCollection, counts: torch.Tensor
) -> list[Any]:
    """In the place of model.dispatch.read_counts: every token to the next expert in turn. `counts`: (E,) of this rank;
    (2, p, e) sent to and received from expert-parallel ranks; (p, e) of the ranks that share experts."""
    model, ep = experiment.model, groups.ep
    tokens = stage.sequence_length * stage.micro_batch_sequences // groups.cp.size() // groups.tp.size()
    rows_E = even_rows(tokens * model.moe_router_topk, model.num_moe_experts)
    e = len(rows_E) // ep.size()
    mine_e = rows_E[ep.rank() * e : (ep.rank() + 1) * e]
    if counts.dim() == 1:
        return rows_E
    if counts.dim() == 2:
        return [[ep.size() * rows for rows in mine_e]] * counts.shape[0]
    return [[rows_E[start : start + e] for start in range(0, len(rows_E), e)], [mine_e] * ep.size()]


def even_rows(num_choices: int, num_experts: int) -> list[int]:
    """Rows of each expert if choices are dealt to the experts in turn."""
    rows, rest = divmod(num_choices, num_experts)
    return [rows + (expert < rest) for expert in range(num_experts)]


# --- where a rank is --------------------------------------------------------------------------------------------------


class Place:
    """What a rank is doing, in words: call it."""

    def __init__(self) -> None:
        self.doing = "joining its groups"
        self._layer: int | None = None
        self._starts: list[int] = []
        self._made: list[tuple[int, int]] = []  # end, layer: the autograd nodes that a layer's forward pass made

    def follow(self, chunks: list[HunyuanModel]) -> None:
        """From now on, know which layer is at work."""
        for layer in (layer for model in chunks for layer in model.decoder.layers):
            layer.forward = self._within(layer.layer, layer.forward)  # type: ignore[method-assign]

    def __call__(self) -> str:
        node: Any = current_autograd_node()
        if self._layer is not None:
            return f"layer {self._layer}, {'forward' if node is None else 'recomputation'}"
        if node is None:
            return self.doing
        number = node._sequence_nr()
        index = bisect_right(self._starts, number) - 1
        if index >= 0 and number < self._made[index][0]:
            return f"layer {self._made[index][1]}, backward"
        return f"{self.doing}, backward"

    def _within(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self._layer, start = layer, next_autograd_node()
            try:
                return forward(*args)
            except Exception:
                self.doing = self()
                raise
            finally:
                self._layer = None
                self._starts.append(start)
                self._made.append((next_autograd_node(), layer))

        return run


def _told(error: Exception) -> str:
    """The message of an error and the line of this project that it comes from."""
    package = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(package)]
    own = [frame for frame in frames if frame.name != "__torch_dispatch__"]
    place = own[-1]
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0]} ({Path(place.filename).name}:{place.lineno} {place.name})"
