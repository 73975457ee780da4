"""Transformer Engine's spec and the emulated one side by side, with the same weights and data, in processes that have
its stand-ins."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.helpers import transformer_engine_stub
from tests.helpers.transformer_engine_cases import Case, chosen

KINDS = ("column", "row", "norm", "experts", "unequal experts")
STEPS, MICRO_BATCHES = 3, 2


@dataclass
class Run:
    """What one rank observed in a run under one spec."""

    traces: list[Any]
    """Traces of its steps."""
    scales: dict[str, Any]
    """Scales of the delayed recipe after the steps."""
    num_quantised: int
    """Tensors that the stand-ins quantised."""


@dataclass
class BothSpecs:
    """What one rank computed in one recipe."""

    engine: Run
    emulated: Run
    products: dict[str, dict[str, tuple[Any, Any]]]
    """By kind: what a single linear layer computed under (Transformer Engine's spec, the emulated one), by name."""


def both_specs(experiments: Mapping[str, Any], ranks: int, capability: tuple[int, int]) -> dict[str, BothSpecs]:
    """On every rank, by recipe: two steps of its experiment, and the linear layers alone."""
    transformer_engine_stub.install(capability)
    from hunyuan_pretrain.config.schema import ParallelConfig
    from hunyuan_pretrain.parallel.groups import build_groups, destroy_groups, initialize_distributed

    found = {}
    for recipe, experiment in experiments.items():
        found[recipe] = BothSpecs(_run(experiment, use_engine=True), _run(experiment, use_engine=False), {})
    initialize_distributed("gloo", 60)
    parallel = ParallelConfig(tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1)
    groups = build_groups(parallel, 60)
    for recipe in experiments:
        for kind in KINDS[: 5 if ranks == 1 else 3]:
            engine, emulated = (_steps(kind, recipe, parallel, groups, use_engine) for use_engine in (True, False))
            assert engine.keys() == emulated.keys()
            found[recipe].products[kind] = {name: (tensor, emulated[name]) for name, tensor in engine.items()}
    destroy_groups()
    return found


def _run(experiment: Any, use_engine: bool) -> Run:
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.model.engines import scaling_state
    from hunyuan_pretrain.train import setup

    gc.collect()
    transformer_engine_stub.calls.clear()
    with chosen(Case(experiment, engine=use_engine)):
        run = setup.prepare(experiment)
        traces = trace_steps(run, range(2))
        scales = {name: tensor.numpy().copy() for name, tensor in scaling_state(run.chunks).items()}
        setup.leave(run)
    return Run(traces, scales, sum(call[0] == "quantize" for call in transformer_engine_stub.calls))


def _steps(kind: str, recipe: str, parallel: Any, groups: Any, use_engine: bool) -> dict[str, Any]:
    """Outputs and gradients of all micro-batches and steps, and the delayed scales. A weight changes after each step,
    as in training."""
    import torch

    from hunyuan_pretrain.config.schema import PrecisionConfig
    from hunyuan_pretrain.model.engine.layers import transformer_engine_spec
    from hunyuan_pretrain.model.engines import scaling_state, training_step
    from hunyuan_pretrain.model.expert_rows import RowSplits
    from hunyuan_pretrain.model.fp8.emulated import emulated_fp8_spec
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from tests.helpers.tiny import tiny_model

    ranks, rank = groups.tp.size(), groups.tp.rank()
    # incomplete blocks where allowed: tensors gathered in FP8 must have whole ones
    T, I, O = (160, 192, 160) if ranks == 1 else (256, 256, 128 if kind == "row" else 256)  # noqa: E741
    splits = {"experts": RowSplits.equal(4, 32), "unequal experts": RowSplits((32, 64, 0, 96))}.get(kind)
    precision = PrecisionConfig(
        dtype="bf16", fp8_recipe=recipe, fp8_amax_history_len=2 if recipe == "delayed" else None
    )
    config = transformer_config(tiny_model(), parallel, precision, True, use_engine)
    spec = transformer_engine_spec(config, 0) if use_engine else emulated_fp8_spec()
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        # more powers of two than a block can hold, and halves of different magnitude: a scale of other values shows
        x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-9, 4, shape, generator=generator))
        x[..., : shape[-2] // 2, :] *= 3
        x[..., : shape[-1] // 2] *= 5
        return x.bfloat16()

    def mine(whole: torch.Tensor, dim: int) -> torch.Tensor:
        return whole.chunk(ranks, dim)[rank].clone()

    class Model(torch.nn.Module):
        """What a training step reads from a model."""

        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.norm = spec.input_norm(config, I) if kind == "norm" else None
            if splits is not None:
                self.product = spec.column_parallel_grouped_linear(config, I, O, groups)
            elif kind == "row":
                self.product = spec.row_parallel_linear(config, I, O, groups)
            elif self.norm is not None:
                self.product = spec.linear_after(self.norm, config, I, O, groups)
            else:
                self.product = spec.column_parallel_linear(config, I, O, groups)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if splits is not None:
                return self.product(x, splits)
            return self.product(x if self.norm is None else self.norm(x)[0])[0]

    model = Model()
    weight = model.product.weight
    if splits is not None:
        T = splits.num_rows
    if model.norm is not None:
        model.norm.weight.data.copy_(draw(1, I)[0])
    found: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        whole_weight = draw(*weight.shape[:-2], O, I)
        weight.data.copy_(whole_weight if splits is not None else mine(whole_weight, 1 if kind == "row" else 0))
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
        with training_step([model], groups):
            for micro_batch in range(MICRO_BATCHES):
                x = mine(draw(T, I), 1 if kind == "row" else 0).requires_grad_()
                y = model(x)
                y.backward(mine(draw(T, O), 0 if kind == "row" else 1))
                found[f"output {step}.{micro_batch}"] = y.detach()
                found[f"input gradient {step}.{micro_batch}"] = x.grad
        found[f"weight gradient {step}"] = weight.main_grad
        if model.norm is not None:
            found[f"norm's gradient {step}"], model.norm.weight.grad = model.norm.weight.grad, None
        found |= {f"{name} {step}": tensor.clone() for name, tensor in scaling_state([model]).items()}
    return {name: tensor.float().numpy() for name, tensor in found.items()}
