"""Jobs for the tests of FP8-only parameters. They run in their own processes, which have the stand-in for Transformer
Engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import transformer_engine_stub
from tests.helpers.transformer_engine_cases import MARKS, Build, Case, chosen, chunks_on_meta


@dataclass
class ParameterRun:
    """What one rank observed in a run."""

    trace: Any
    """Loss, gradients, moments and weights of its last step."""
    validation: float
    """Loss on held-out text after the steps."""
    in_fp8: list[str]
    """Parameters that are FP8 tensors."""
    buffers: dict[str, int]
    """Bytes of the buffers from which parameters are gathered, by number format."""
    scales: dict[str, np.ndarray]
    """Scales of the delayed recipe at the end."""


def parameter_runs(cases: Sequence[Case], steps: range) -> list[ParameterRun]:
    """On every rank: run these steps of each case, then save a checkpoint."""
    transformer_engine_stub.install()
    found = []
    for case in cases:
        gc.collect()
        with chosen(case):
            found.append(_parameter_run(case.experiment, steps))
    return found


def broken_runs(pairs: Sequence[Sequence[Case]], steps: int) -> list[ParameterRun]:
    """Observations of the second case of each pair, which resumes from the checkpoint that the first wrote after a
    step."""
    transformer_engine_stub.install()
    found = []
    for first, then in pairs:
        for case, mine in ((first, range(1)), (then, range(1, steps))):
            gc.collect()
            with chosen(case):
                last = _parameter_run(case.experiment, mine)
        found.append(last)
    return found


def _parameter_run(experiment: Any, steps: range) -> ParameterRun:
    from megatron.core.fp8_utils import is_float8tensor

    from hunyuan_pretrain.checkpoint import save_load
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.model.engines import scaling_state
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.evaluate import evaluate
    from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
    from hunyuan_pretrain.train.step import train_step

    _gather_one_by_one()
    run = setup.prepare(experiment)
    assert run.first_step == steps.start
    for step in steps[:-1]:  # as in a run: nothing is gathered between two steps but what the steps gather themselves
        apply_learning_rate(run, step)
        train_step(run, run.schedule.stage(step), step)
    (trace,) = trace_steps(run, steps[-1:])
    assert run.evaluation is not None
    validation = evaluate(run, experiment.stages[-1], run.evaluation)
    save_load.save(run.run_dir, steps.stop, run.chunks, run.optimizer, None)
    buffers: dict[str, int] = {}
    for model in run.wrapped:
        for buffer in model.buffers + model.expert_parallel_buffers:
            buffers[str(buffer.param_dtype)] = buffers.get(str(buffer.param_dtype), 0) + buffer.param_data.nbytes
    found = ParameterRun(
        trace,
        validation["loss"],
        [name for model in run.chunks for name, parameter in model.named_parameters() if is_float8tensor(parameter)],
        buffers,
        {name: tensor.numpy().copy() for name, tensor in scaling_state(run.chunks).items()},
    )
    setup.leave(run)
    return found


def values_and_gradients(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the quantisers whose values differ from the emulation, and of the FP8-only parameters whose gradient
    outside a step differs from the gradient of the bf16 values that they represent."""
    transformer_engine_stub.install()
    import hunyuan_pretrain.model  # noqa: F401  makes megatron importable

    # isort: split
    import torch

    from hunyuan_pretrain.config.recipe import OPERANDS
    from hunyuan_pretrain.config.schema import PrecisionConfig
    from hunyuan_pretrain.model.fp8.emulated import Fp8Matmul
    from hunyuan_pretrain.model.fp8.parameters import unquantised
    from tests.helpers import fp8_comparisons as fp8
    from tests.helpers.tiny import world_of_one

    wrong_values, wrong_gradients = [], []
    generator = torch.Generator().manual_seed(1)
    for name, fp8_format, operand, along_rows in product(fp8.RECIPES, ("e4m3", "hybrid"), OPERANDS, (False, True)):
        recipe = PrecisionConfig(fp8_recipe=name, fp8_format=fp8_format).recipe
        x_RC = fp8.wide_numbers(generator, (160, 96))
        emulated = Fp8Matmul(recipe, 1, False, False, "cpu")
        if name == "delayed":
            emulated.delayed[operand].scale_e.fill_(fp8.DELAYED_SCALE)
        expected = emulated.operand(x_RC[None], operand, along_rows, slice(0, 1), True)[0]
        if not torch.equal(fp8.kernel_values(x_RC, recipe, operand, along_rows), expected):
            wrong_values.append(f"{name} {fp8_format} {operand}, along rows: {along_rows}")
    for name in names:
        kept, plain = (fp8.built(world_of_one(), True, name, is_kept) for is_kept in (True, False))
        weights = dict(kept.named_parameters())

        def of(model_name: str, weights: dict[str, Any] = weights, take: Any = unquantised) -> torch.Tensor:
            experts = [f"{model_name}{expert}" for expert in range(fp8.MODEL.num_moe_experts)]
            return (
                take(weights[model_name])
                if model_name in weights
                else torch.stack([take(weights[expert]) for expert in experts])
            )

        for key, parameter in plain.named_parameters():
            parameter.data = of(key).detach().clone()
        for model in (kept, plain):
            loss, _ = model(fp8.inputs("cpu"))
            loss.backward()
        for key, parameter in plain.named_parameters():
            if any(weight.grad is None for weight in weights.values()) or not torch.equal(
                of(key, take=lambda w: w.grad), parameter.grad
            ):
                wrong_gradients.append(f"{name} {key}")
    return wrong_values, wrong_gradients


class _Works(list[Any]):
    """Pending communication."""

    def wait(self) -> None:
        for work in self:
            work.wait()


def _gather_one_by_one() -> None:
    """Make core gather buffers one at a time. Core gathers FP8, bf16 and fp32 weights in one coalesced call; gloo
    (torch 2.13) silently executes it in the format of the first, which destroys the values of all. NCCL groups the
    calls and is not affected."""
    from megatron.core.distributed import param_and_grad_buffer as core

    if core._coalescing_manager is _one_by_one:
        return
    core._coalescing_manager = _one_by_one
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(core, name, _remembered(getattr(core, name)))


def _remembered(communicate: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        work = communicate(*args, **kwargs)
        if work is not None:
            _running[-1].append(work)
        return work

    return call


_running: list[_Works] = []


@contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[_Works]:
    _running.append(_Works())
    yield _running[-1]


def differences_of_files(pairs: Sequence[Sequence[Path]]) -> list[list[str]]:
    """Names of the tensors that are not bitwise equal, for each pair of checkpoints."""
    import hunyuan_pretrain.model  # noqa: F401  makes megatron importable

    # isort: split
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    found = []
    for pair in pairs:
        contents = [_load_state_dict_from_keys(storage_reader=FileSystemReader(str(folder))) for folder in pair]
        tensors = [{name: x for name, x in _leaves("", content) if isinstance(x, torch.Tensor)} for content in contents]
        assert len(tensors[0]) > 50
        names = tensors[0].keys() | tensors[1].keys()
        pairs_of_tensors = {name: [one.get(name) for one in tensors] for name in names}
        found.append(
            sorted(name for name, (a, b) in pairs_of_tensors.items() if a is None or b is None or not torch.equal(a, b))
        )
    return found


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(f"{prefix}.{key}", inner)]
    return [(prefix, value)]


def differences_of_shards(builds: Sequence[Build]) -> list[str]:
    """Differences between the checkpoint shards of experts held in one parameter and of experts held in separate
    parameters."""
    transformer_engine_stub.install()
    found = []
    for build in builds:
        for rank in build.ranks:
            whole, alone = (_shards(build, rank, is_kept) for is_kept in (False, True))
            if whole != alone:
                differing = [key for key in whole.keys() | alone.keys() if whole.get(key) != alone.get(key)]
                found.append(
                    f"{build}, rank {rank}: {differing[:5]}, e.g. {whole.get(differing[0])} and "
                    f"{alone.get(differing[0])}"
                )
    return found


def _shards(build: Build, rank: int, is_kept: bool) -> dict[Any, Any]:
    """Maps (name, offset) of every shard, with experts listed one by one, to its global shape, shape, replica and
    attributes."""
    formats = {"fp8_recipe": "blockwise", "fp8_parameters": is_kept, "num_layers_at_start_in_bf16": 1}
    found: dict[Any, Any] = {}
    with chunks_on_meta(build, rank, formats, True) as chunks:
        for chunk in chunks:
            placements = chunk.placements()
            for name, parameter in chunk.named_parameters():
                placement = placements[name]
                marks = [
                    getattr(parameter, mark, default) for mark, default in MARKS.items() if mark != "partition_dim"
                ]
                dim = getattr(parameter, "partition_dim", -1) - parameter.dim()
                is_expert = getattr(parameter, "is_routed_expert", False)
                for part in placement.parts:
                    offset = tuple(where.start for where in part.whole)
                    for expert in range(part.lengths[0] if is_expert else 1):
                        lengths = part.lengths[1:] if is_expert else part.lengths
                        found[placement.name, offset[0] + expert, *offset[1:]] = (
                            placement.whole_shape,
                            lengths,
                            placement.replica,
                            marks,
                            dim,
                        )
    return found
