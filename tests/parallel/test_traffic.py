"""What a real step communicates and what a rank really holds, counted and compared with the closed forms of the
plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunyuan_pretrain.config.derived import grid
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.plan.communication import communication_per_rank
from hunyuan_pretrain.plan.counts import RankMemory, memory_of_ranks, memory_per_rank
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields

pytestmark = pytest.mark.slow

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
ETP = {"expert_tensor_parallel_size": 2}
ULYSSES = CP | {"context_parallel_method": "all_to_all"}
PLAIN = {"use_distributed_optimizer": False}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

DROPPING = {
    "moe_router_topk": 2,
    "moe_expert_capacity_factor": 1.3,
    "recycle_routing": False,
    "share_embeddings_and_output_weights": False,
}
DROPLESS = {"moe_expert_capacity_factor": None, "recycle_routing": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: ranks, fields of parallel, of model, of precision
    "data": (2, OVERLAP, {}, {}),
    "tensor, expert": (2, TP | EP | {"recompute": "selective"}, DROPPING, {"dtype": "bf16"}),
    "pipeline, uneven": (
        2,
        PP | {"pipeline_layout": [2, 6], "recompute": "cla_group"},
        {},
        {"dtype": "bf16", "grad_reduce_in_fp32": False},
    ),
    "context": (2, CP, {"qk_layernorm": False}, {}),
    "context, Ulysses": (2, ULYSSES | PLAIN, {}, {"dtype": "bf16"}),
    "data, expert, dropless": (2, EP, DROPLESS, {}),
    "data, expert, split main weights": (2, EP | OVERLAP, {}, {"dtype": "bf16", "grad_reduce_in_fp32": False}),
    "pipeline, context, bf16 moments": (4, PP | CP, {}, {"dtype": "bf16"}),
    "data, expert, half offloaded": (2, EP, {}, {"dtype": "bf16", "grad_reduce_in_fp32": False}),
    "context, expert-tensor, half offloaded": (2, CP | ETP, {}, {}),
    "tensor, wholly offloaded": (2, TP, {}, {"dtype": "bf16"}),
    "data, tensor, expert, expert-tensor": (
        4,
        TP | EP | ETP | {"recompute": "swiglu+norms"},
        {},
        {"dtype": "bf16"},
    ),
    "tensor, pipeline, expert, interleaved": (4, TP | PP | EP | {"virtual_pipeline_model_parallel_size": 2}, {}, {}),
    "tensor, context, Ulysses": (4, TP | ULYSSES | {"recompute": "cla_group"}, {"num_query_groups": 4}, {}),
    "data, pipeline, expert, interleaved": (4, PP | EP | PLAIN | {"virtual_pipeline_model_parallel_size": 2}, {}, {}),
    "pipeline, context, expert-tensor": (4, PP | CP | ETP, {"cla_share_factor": 4, "num_layers": 8}, {}),
}
LOSS_CHUNK_TOKENS = 48
"""Smaller than a micro-batch, and not a divisor of one."""


def layout_fields(corpus: Path, run_dir: Path, name: str) -> dict[str, Any]:
    _, parallel, model, precision = LAYOUTS[name]
    num_layers = 8 if "virtual_pipeline_model_parallel_size" in parallel or "pipeline_layout" in parallel else 4
    changes = {
        f"model__{key}": value
        for key, value in ({"num_layers": num_layers, "moe_routing_group_tokens": 16} | model).items()
    }
    changes |= {"stages__global_batch_sequences": 4, "stages__micro_batch_sequences": 1 if "data" in name else 2}
    fields = experiment_fields(corpus, run_dir, parallel=parallel, **changes)
    fields["precision"] |= precision
    fields["optimizer"]["cpu_offload_fraction"] = (
        1.0 if "wholly offloaded" in name else 0.5 if "half offloaded" in name else 0.0
    )
    if "split main weights" in name or "bf16 moments" in name:
        fields["optimizer"]["use_precision_aware_optimizer"] = True
    if "bf16 moments" in name:
        fields["optimizer"] |= {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    return fields


def count_layouts(layouts: list[dict[str, Any]]) -> list[tuple[dict[tuple[str, str], tuple[int, int]], RankMemory]]:
    """For each layout: the traffic of a step on this rank, and the bytes that the rank holds afterwards."""
    from hunyuan_pretrain.model import cross_entropy
    from hunyuan_pretrain.parallel.traffic import TrafficCounter
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.as_planned import held

    cross_entropy.LOSS_CHUNK_TOKENS["cpu"] = LOSS_CHUNK_TOKENS
    found = []
    for fields in layouts:
        run = setup.prepare(Experiment.model_validate(fields))
        with TrafficCounter(run.groups) as counter:
            one_step(run)
        found.append((counter.traffic, held(run)))
        setup.leave(run)
    return found


def one_step(run: Any) -> None:
    from hunyuan_pretrain.train.step import train_step

    train_step(run, run.experiment.stages[0], 0)


def count_all(layouts: list[dict[str, Any]], is_first_job: bool) -> tuple[list[Any], dict[str, Any], tuple[int, int]]:
    """Everything that the tests of this file need from ranks, in one job, because starting a job takes longer than all
    of its steps."""
    counted = count_layouts(layouts)
    return (
        (counted, count_each_function(), count_with_the_profiler(layouts[1])) if is_first_job else (counted, {}, (0, 0))
    )


@pytest.fixture(scope="module")
def jobs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """Number of ranks -> what count_all returned on each rank."""
    folder = tmp_path_factory.mktemp("traffic")
    return {
        world_size: fork_ranks(
            world_size,
            count_all,
            [layout_fields(corpus, folder / name, name) for name in names_of(world_size)],
            world_size == 2,
        )
        for world_size in (2, 4)
    }


def names_of(world_size: int) -> list[str]:
    return [name for name in LAYOUTS if LAYOUTS[name][0] == world_size]


def counted(jobs: dict[int, list[Any]], name: str) -> list[Any]:
    """(traffic, memory) of each rank."""
    world_size = LAYOUTS[name][0]
    return [rank[0][names_of(world_size).index(name)] for rank in jobs[world_size]]


def planned(corpus: Path, name: str) -> tuple[Experiment, int]:
    return Experiment.model_validate(layout_fields(corpus, corpus, name)), LAYOUTS[name][0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_accounts_for_every_byte_that_a_rank_sends(
    jobs: dict[int, list[Any]], corpus: Path, name: str
) -> None:
    experiment, world_size = planned(corpus, name)
    pipeline_rank = grid(experiment.parallel, world_size).pipeline_rank
    for rank, (traffic, _) in enumerate(counted(jobs, name)):
        parts = experiment.model, experiment.parallel, experiment.precision, experiment.stages[0]
        plan = communication_per_rank(*parts, world_size, pipeline_rank(rank), LOSS_CHUNK_TOKENS)
        if plan.is_exact:
            assert plan.messages == traffic
            continue
        routed = "ep", "all_to_all"
        assert {key: value for key, value in plan.messages.items() if key != routed} == {
            key: value for key, value in traffic.items() if key != routed
        }
        assert plan.messages[routed].calls == traffic[routed].calls
        assert plan.messages[routed].bytes == pytest.approx(traffic[routed].bytes, rel=0.2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_accounts_for_every_byte_that_a_rank_holds(
    jobs: dict[int, list[Any]], corpus: Path, name: str
) -> None:
    experiment, world_size = planned(corpus, name)
    parts, optimizer = (
        (experiment.model, experiment.parallel, experiment.precision, world_size),
        experiment.optimizer,
    )
    found = [memory for _, memory in counted(jobs, name)]
    pipeline_ranks = range(experiment.parallel.pipeline_model_parallel_size)
    assert [
        memory for pipeline_rank in pipeline_ranks for memory in memory_of_ranks(*parts, pipeline_rank, optimizer)
    ] == found
    assert memory_per_rank(*parts, optimizer=optimizer).total == max(memory.total for memory in found)


def count_each_function() -> dict[str, Any]:
    """Traffic of one call of every torch.distributed function on 2 ranks, with 24 bytes on each."""
    import torch
    import torch.distributed as dist
    from torch.distributed import _functional_collectives

    from hunyuan_pretrain.config.schema import ParallelConfig
    from hunyuan_pretrain.parallel.groups import build_groups, leave_layout
    from hunyuan_pretrain.parallel.traffic import TrafficCounter

    groups = build_groups(ParallelConfig(tensor_model_parallel_size=2), 60)
    tp, rank = groups.tp, dist.get_rank()
    x, whole, parts = torch.ones(6), torch.ones(12), [torch.ones(6), torch.ones(6)]
    halves = list(torch.ones(6).split(3))

    def exchange(function: Any) -> None:
        other = dist.get_global_rank(tp, 1 - rank)
        for work in function(other):
            work.wait()

    def batched(other: int) -> Any:
        return dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, other, tp), dist.P2POp(dist.irecv, torch.ones(6), other, tp)]
        )

    calls = {
        "all_reduce": lambda: dist.all_reduce(x, group=tp),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, x, group=tp, async_op=True).wait(),
        "all_gather": lambda: dist.all_gather(parts, x, group=tp),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.ones(3), x, group=tp),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.ones(6), x, group=tp),
        "all_to_all_single, uneven": lambda: dist.all_to_all_single(
            torch.ones(8 if rank else 4), x, [4 - 2 * (1 - rank)] * 2, [2, 4], group=tp
        ),
        "broadcast": lambda: dist.broadcast(x, dist.get_global_rank(tp, 0), group=tp),
        "reduce": lambda: dist.reduce(x, dist.get_global_rank(tp, 0), group=tp),
        "gather": lambda: dist.gather(x, parts if rank == 0 else None, dist.get_global_rank(tp, 0), group=tp),
        "scatter": lambda: dist.scatter(
            torch.ones(3), halves if rank == 0 else None, dist.get_global_rank(tp, 0), group=tp
        ),
        "isend, irecv": lambda: exchange(
            lambda other: [dist.isend(x, other, tp), dist.irecv(torch.ones(6), other, tp)]
        ),
        "batch_isend_irecv": lambda: exchange(batched),
        "isend, irecv over all ranks": lambda: exchange(
            lambda other: [dist.isend(x, other), dist.irecv(torch.ones(6), other)]
        ),
        "barrier": lambda: dist.barrier(group=tp),
        "all_reduce over all ranks": lambda: dist.all_reduce(x),
        "all_reduce of one rank": lambda: dist.all_reduce(x, group=groups.dp),
        "all_reduce of a transposed tensor": lambda: dist.all_reduce(torch.ones(2, 3).t(), group=tp),
        "functional all_reduce": lambda: _functional_collectives.all_reduce(x, "sum", tp).sum(),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        with TrafficCounter(groups) as counter:
            try:
                call()
                found[name] = counter.traffic
            except (NotImplementedError, ValueError) as error:
                found[name] = str(error)
    leave_layout()
    return found


def test_every_torch_distributed_function_is_counted_by_axis_kind_and_bytes(jobs: dict[int, list[Any]]) -> None:
    for rank, (_, found, _) in enumerate(jobs[2]):
        message = {"send": (1, 24), "recv": (1, 24)}
        expected = {
            "all_reduce": {"all_reduce": (1, 24)},
            "all_gather_into_tensor": {"all_gather": (1, 24)},
            "all_gather": {"all_gather": (1, 24)},
            "reduce_scatter_tensor": {"reduce_scatter": (1, 12)},
            "all_to_all_single": {"all_to_all": (1, 12)},
            "all_to_all_single, uneven": {"all_to_all": (1, 8 if rank else 16)},
            "broadcast": {"broadcast": (1, 12)},
            "reduce": {"reduce": (1, 12)},
            "gather": {"gather": (1, 24 if rank else 0)},
            "scatter": {"scatter": (1, 0 if rank else 12)},
            "isend, irecv": message,
            "batch_isend_irecv": message,
            "barrier": {"barrier": (1, 0)},
        }
        for name, kinds in expected.items():
            assert found[name] == {("tp", kind): messages for kind, messages in kinds.items()}, name
        assert found["isend, irecv over all ranks"] == {("pp", kind): messages for kind, messages in message.items()}
        assert found["all_reduce over all ranks"] == {("other", "all_reduce"): (1, 24)}
        assert found["all_reduce of one rank"] == {}
        layout = "tensor 0 is written in place, but is not contiguous: shape (3, 2), strides (1, 3)"
        assert found["all_reduce of a transposed tensor"] == f"c10d::allreduce_: {layout}"
        assert "_c10d_functional::all_reduce communicates and is not counted" in found["functional all_reduce"]


def count_with_the_profiler(fields: dict[str, Any]) -> tuple[int, int]:
    """Calls in one step as we count them, and as the backend reports them to torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    from hunyuan_pretrain.parallel.traffic import TrafficCounter
    from hunyuan_pretrain.train import setup

    run = setup.prepare(Experiment.model_validate(fields))
    with profile(activities=[ProfilerActivity.CPU]) as profiler, TrafficCounter(run.groups) as counter:
        one_step(run)
    setup.leave(run)
    return counter.num_calls, sum(event.name.startswith("gloo:") for event in profiler.events())


def test_the_backend_made_as_many_calls_as_we_counted(jobs: dict[int, list[Any]]) -> None:
    for _, _, (counted_calls, profiled_calls) in jobs[2]:
        assert counted_calls == profiled_calls > 50
