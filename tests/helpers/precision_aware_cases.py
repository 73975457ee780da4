"""Jobs for the tests of the precision-aware optimizer under Transformer Engine's FusedAdam. They run in their own
processes, which have the stand-in for its kernels."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from tests.helpers import transformer_engine_stub
from tests.helpers.transformer_engine_cases import Case, chosen

SHAPES = {"bf16": (300, 7), "fp32": (50,)}
"""Of the weights in `both_adams`, by format."""
Held = dict[str, dict[str, Any]]
"""Format of a weight -> name of a tensor -> fp32 array."""


def both_adams_over_stand_ins(formats: Sequence[tuple[str, str]], steps: int) -> list[tuple[Held, Held]]:
    """`both_adams` with a stand-in for FusedAdam's kernels."""
    transformer_engine_stub.install()
    import hunyuan_pretrain.train  # noqa: F401  makes megatron importable

    return both_adams(formats, steps, "cpu")


def both_adams(formats: Sequence[tuple[str, str]], steps: int, device: str) -> list[tuple[Held, Held]]:
    """For each pair of moment formats: what Transformer Engine's FusedAdam on `device`, and PrecisionAwareAdamW on the
    CPU, hold after these steps on the same numbers."""
    import torch
    from transformer_engine.pytorch.optimizers import FusedAdam

    from hunyuan_pretrain.model.hunyuan_config import DTYPES
    from hunyuan_pretrain.train.precision_aware_adam import PrecisionAwareAdamW

    found = []
    for first, second in formats:
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        dtypes = {"exp_avg": DTYPES[first], "exp_avg_sq": DTYPES[second]}
        weights = [_weights(device), _weights("cpu")]
        theirs = FusedAdam(
            list(weights[0].values()),
            **settings,
            master_weights=True,
            use_decoupled_grad=True,
            store_param_remainders=True,
            **{f"{name}_dtype": dtype for name, dtype in dtypes.items()},
        )
        ours = PrecisionAwareAdamW([{"params": list(weights[1].values())} | settings], dtypes)
        generator = torch.Generator().manual_seed(2)
        for _ in range(steps):
            for name, shape in SHAPES.items():
                grad = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)
                for held in weights:  # gradients of a bf16 weight may be bf16, those of an fp32 weight are fp32
                    held[name].decoupled_grad = grad.to(held[name])  # type: ignore[attr-defined]
            theirs.step()
            ours.step()
        found.append((_held(weights[0], theirs), _held(weights[1], ours)))
    return found


def differences(formats: tuple[str, str], theirs: Held, ours: Held) -> list[str]:
    """Tensors that differ by more than the last bits of fp32. Where numbers are rounded to bf16 in between, these bits
    decide one rounding in many thousands, and 1% of the numbers may differ; another way of rounding would change half
    of them."""
    import numpy as np

    found = []
    for name, tensors in ours.items():
        assert theirs[name].keys() - {"master_param"} == tensors.keys() == {"weight", "main", "exp_avg", "exp_avg_sq"}
        for key, value in tensors.items():
            allowed = 0.01 if "bf16" in formats or (key == "weight" and name == "bf16") else 0.0
            is_other = ~np.isclose(value, theirs[name][key], rtol=1e-5, atol=1e-6)
            if is_other.mean() > allowed:
                found.append(f"{formats}: {key} of the {name} weight")
    return found


def _weights(device: str) -> dict[str, Any]:
    import torch

    from hunyuan_pretrain.model.hunyuan_config import DTYPES

    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(device, DTYPES[name]) for name, shape in SHAPES.items()}


def _held(weights: dict[str, Any], optimizer: Any) -> Held:
    import torch

    from hunyuan_pretrain.checkpoint.split_weights import REMAINDER, join

    found = {}
    for name, weight in weights.items():
        state = dict(optimizer.state[weight])
        remainder = state.pop(REMAINDER, None)
        main = torch.empty_like(weight, dtype=torch.float32)
        if weight.dtype == torch.bfloat16:
            join(weight, remainder, main)
        else:
            main.copy_(weight)
        assert {state[key].dtype for key in state} <= {torch.float32, torch.bfloat16}
        tensors = {"weight": weight, "main": main} | state
        found[name] = {key: tensor.float().cpu().numpy().copy() for key, tensor in tensors.items()}
    return found


def resumed_runs(experiments: Sequence[Any], saved_after: int, steps: int) -> list[list[Any]]:
    """Traces of each run after `saved_after` steps: of the first, which saves then, and of the others, which resume."""
    transformer_engine_stub.install()
    return [traces_after(experiment, saved_after, steps, number == 0) for number, experiment in enumerate(experiments)]


def traces_after(experiment: Any, saved_after: int, steps: int, saves: bool) -> list[Any]:
    """Traces of the steps after `saved_after`, of a run that saves or of one that resumes there."""
    from hunyuan_pretrain.checkpoint import save_load
    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.train import setup

    gc.collect()
    with chosen(Case(experiment, engine=False)):
        run = setup.prepare(experiment)
    if saves:
        trace_steps(run, range(saved_after))
        save_load.save(run.run_dir, saved_after, run.chunks, run.optimizer, None)
    else:
        assert run.first_step == saved_after, "it resumes"
    traces = trace_steps(run, range(saved_after, steps))
    setup.leave(run)
    return traces
