"""What a run computes, gathered so that two layouts can be compared: losses, routing, gradients, parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.model.router import Router
from hunyuan_pretrain.runtime.logging import RunLog
from hunyuan_pretrain.train import setup
from hunyuan_pretrain.train.lr_schedule import lr_fraction, stage_of_step
from hunyuan_pretrain.train.metrics import step_record
from hunyuan_pretrain.train.optimizer import set_learning_rate
from hunyuan_pretrain.train.step import train_step
from tests.helpers.tiny import world_of_one

Tensors = dict[str, np.ndarray]


@dataclass
class Trace:
    """One rank's view after some steps."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl record of each step."""
    gradients: list[Tensors] = field(default_factory=list)
    """For each step every gradient after its reduction, before clipping."""
    parameters: Tensors = field(default_factory=dict)
    routing: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict)
    """(step, layer, routing group of the global batch) -> expert of each choice, -1 where it was dropped."""


def train_steps(run: setup.Run, steps: range) -> Trace:
    """Train some steps, as train.loop does, and record everything."""
    trace, experiment = Trace(), run.experiment
    prepare_grads = run.optimizer.prepare_grads

    def record_gradients() -> bool:
        _gather_gradient_shards(run)
        trace.gradients.append(_named(run, {name: parameter.main_grad for name, parameter in run.model.named_parameters()}))
        return prepare_grads()

    routing = patch.object(Router, "forward", _recording(Router.forward, trace))
    with routing, patch.object(run.optimizer, "prepare_grads", record_gradients):
        for step in steps:
            stage = experiment.stages[stage_of_step(experiment.stages, step)[0]]
            lr, ratio = experiment.optimizer.lr * lr_fraction(experiment.stages, step), experiment.optimizer.expert_lr_ratio
            assert ratio is not None
            set_learning_rate(run.optimizer, lr, ratio)
            batches = run.loader.micro_batches(step)
            result = train_step(experiment, stage, step, run.wrapped, run.optimizer, batches, run.groups, run.device)
            trace.records.append(step_record(experiment.model, stage, step, result, lr, lr * ratio, 1.0))
    if experiment.parallel.overlap_param_gather:
        run.wrapped.start_param_sync(force_sync=True)
    trace.parameters = _named(run, dict(run.model.named_parameters()))
    return trace


def trace_layouts(layouts: list[dict[str, Any]], steps: int) -> list[Trace]:
    """Traces of several experiments, one after the other, in the ranks of this job."""
    traces = []
    for fields in layouts:
        run = setup.prepare(Experiment.model_validate(fields))
        traces.append(train_steps(run, range(steps)))
        leave(run)
    return traces


def leave(run: setup.Run) -> None:
    """End a run but stay in the job, so that another run can begin."""
    from megatron.core import parallel_state

    run.log.close()
    run.loader.close()
    parallel_state.destroy_model_parallel()


def merge(ranks: list[Trace]) -> Trace:
    """One trace of the whole model and batch: experts put together; what every rank has must be bitwise the same on all of them."""
    merged = Trace(records=ranks[0].records)
    for other in ranks[1:]:
        assert other.records == merged.records, "ranks report different numbers"
    merged.gradients = [_merge_tensors([rank.gradients[step] for rank in ranks]) for step in range(len(ranks[0].gradients))]
    merged.parameters = _merge_tensors([rank.parameters for rank in ranks])
    for rank in ranks:
        assert not merged.routing.keys() & rank.routing.keys(), "two ranks routed the same tokens"
        merged.routing |= rank.routing
    return merged


def _merge_tensors(ranks: list[Tensors]) -> Tensors:
    """Names end in /0 or /1 where a rank holds a part of the experts."""
    found: Tensors = {}
    for tensors in ranks:
        for name, value in tensors.items():
            assert name not in found or np.array_equal(found[name], value), f"ranks disagree on {name}"
            found[name] = value
    whole = {name: value for name, value in found.items() if "/" not in name}
    for name in {name.split("/")[0] for name in found if "/" in name}:
        parts = sorted(part for part in found if part.startswith(name + "/"))
        whole[name] = np.concatenate([found[part] for part in parts])
    return whole


def _named(run: setup.Run, tensors: dict[str, torch.Tensor]) -> Tensors:
    """Copies that can leave the process, with this rank's place where the experts are divided."""
    ep, copies = run.groups.ep, {}
    for name, tensor in tensors.items():
        is_divided = ep.size() > 1 and ".mlp.experts." in name
        copies[f"{name}/{ep.rank()}" if is_divided else name] = tensor.detach().float().numpy().copy()
    return copies


def _gather_gradient_shards(run: setup.Run) -> None:
    """The distributed optimizer leaves each rank only its shard of the reduced gradients: complete them."""
    if not run.experiment.parallel.use_distributed_optimizer:
        return
    for buffer in run.wrapped.buffers + run.wrapped.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _recording(forward: Any, trace: Trace) -> Any:
    def recorded(self: Router, hidden_TD: torch.Tensor, key: Any) -> Any:
        plan, statistics = forward(self, hidden_TD, key)
        E, n = self.config.num_moe_experts, len(key.group_n)
        rows_E = torch.full((E,), plan.rows_E) if isinstance(plan.rows_E, int) else plan.rows_E
        # rows beyond the last expert's are those of dropped choices
        expert_TK = torch.bucketize(plan.row_TK, rows_E.cumsum(0), right=True)
        expert_TK = expert_TK.masked_fill(expert_TK == E, -1)
        for group, expert_gK in zip(key.group_n.tolist(), expert_TK.reshape(n, -1, plan.row_TK.shape[1]), strict=True):
            place = (key.step, self.layer, group)
            found = trace.routing.setdefault(place, expert_gK.numpy().copy())
            assert np.array_equal(found, expert_gK.numpy()), f"routed otherwise when computed again: {place}"
        return plan, statistics

    return recorded


def on_this_rank(fields: dict[str, Any]) -> setup.Run:
    """A run of one rank inside the test process, with fresh weights and a log that writes nothing."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # core keeps this in the class; a backward pass outside its schedules, as tests of the model make, leaves it in another shape
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    experiment, groups = Experiment.model_validate(fields), world_of_one()
    setup.use_deterministic_algorithms(True)
    model, wrapped = setup._build_model(experiment, groups)
    optimizer = setup.build_optimizer(wrapped, experiment, groups)
    loader, evaluation = setup._open_data(experiment, groups)
    log = RunLog(Path(experiment.run_dir), experiment.logging, experiment.name, is_writer=False)
    return setup.Run(experiment, torch.device("cpu"), groups, model, wrapped, optimizer, loader, evaluation, 0, log)


def moments(run: setup.Run) -> Tensors:
    """Both Adam moments and the update count of each tensor of this rank's optimizer, in its order; empty before the first step."""
    found: Tensors = {}
    for part, optimizer in enumerate(run.optimizer.chained_optimizers):
        for number, parameter in enumerate(chain(*(group["params"] for group in optimizer.optimizer.param_groups))):
            state = optimizer.optimizer.state.get(parameter, {})
            found |= {f"{part}/{number}/{key}": value.detach().float().numpy().copy() for key, value in state.items()}
    return found
