"""On the CPU, a run with Transformer Engine importable is bitwise identical to one without it."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import experiment_fields
from tests.helpers.transformer_engine_stub import TE_FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TE_FOLDER.is_dir(), reason=f"needs Transformer Engine's Python part in {TE_FOLDER}: run make"
    ),
]


def two_steps(fields: list[dict[str, Any]], is_installed: bool) -> list[tuple[list[str], list[tuple[float, float]]]]:
    """Optimizer classes, and loss and norm of two steps, of each experiment. If installed, the package is where an
    installation would have it, with a substitute for its compiled part."""
    from tests.helpers import transformer_engine_stub

    if is_installed:
        sys.path.insert(0, str(TE_FOLDER))
        os.environ["NVTE_PROJECT_BUILDING"] = "1"
        sys.modules["transformer_engine_torch"] = transformer_engine_stub._compiled_module()
    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.runtime import cpu_megatron, device

    cpu_megatron.install()

    from hunyuan_pretrain.diagnostics.parity import trace_steps
    from hunyuan_pretrain.train import setup

    device.transformer_engine_error = lambda thorough: None  # it looks for a file of the compiled part
    found = []
    for one in fields:
        run = setup.prepare(Experiment.model_validate(one))
        kinds = [type(part.optimizer).__module__ for part in run.optimizer.chained_optimizers]
        found.append(
            (kinds, [(trace.scalars["loss"], trace.scalars["grad_norm"]) for trace in trace_steps(run, range(2))])
        )
        setup.leave(run)
    return found


def test_training_on_a_cpu_uses_nothing_of_an_installed_transformer_engine(corpus, tmp_path):
    cases = [("fp32", False, 0.0), ("bf16", True, 0.0), ("bf16", True, 0.5)]
    fields = [
        experiment_fields(
            corpus,
            tmp_path / str(number),
            model__num_layers=2,
            precision={"dtype": dtype},
            parallel={"use_distributed_optimizer": is_distributed},
            optimizer={"lr": 1e-2, "clip_grad": 0.1, "cpu_offload_fraction": offloaded},
        )
        for number, (dtype, is_distributed, offloaded) in enumerate(cases)
    ]
    (with_engine,), (without,) = (run_ranks(1, two_steps, fields, is_installed) for is_installed in (True, False))
    assert with_engine == without
    assert not [kind for kinds, _ in with_engine for kind in kinds if kind.startswith("transformer_engine")]
