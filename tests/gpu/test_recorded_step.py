"""Steps as CUDA graphs on a GPU: bit by bit what steps without give, and one launch. `make test-gpu` runs this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 8
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "recomputed": {"parallel": {"recompute": "cla_group"}},
    "recomputed parts": {"parallel": {"recompute": "swiglu+norms"}},
    "overlapped reduction": {"parallel": {"overlap_grad_reduce": True}},
    "delayed": {"precision": {"dtype": "bf16", "fp8_recipe": "delayed"}},
    "tensorwise": {"precision": {"dtype": "bf16", "fp8_recipe": "tensorwise"}},
    "blockwise": {"precision": {"dtype": "bf16", "fp8_recipe": "blockwise"}},
}


@pytest.fixture
def numbers(corpus: Path, tmp_path: Path) -> Any:
    from hunyuan_pretrain.config.schema import Experiment
    from hunyuan_pretrain.train import setup
    from hunyuan_pretrain.train.lr_schedule import apply_learning_rate
    from hunyuan_pretrain.train.step import train_step
    from tests.helpers.runs import SEQUENCE_LENGTH, experiment_fields

    def of_a_run(is_recorded: bool, **changes: Any) -> list[Any]:
        settings: dict[str, Any] = {"precision": {"dtype": "bf16"}, "model__num_layers": 4} | changes
        sizes = dict.fromkeys(("model__ffn_hidden_size", "model__moe_ffn_hidden_size"), 512)
        fields = experiment_fields(
            corpus,
            tmp_path / str(is_recorded),
            STEPS,
            model__hidden_size=256,
            model__kv_channels=64,
            **sizes,
            **settings,
        )
        fields["stages"][0]["tokens"] = 5 * 8 * SEQUENCE_LENGTH  # in each stage two are computed, then replays
        # the same kernel with and without: `auto` might take a batched one without
        backend = {"attention_backend": "torch_varlen"}
        fields["runtime"] |= {"probes": False, "device": "cuda", "cuda_graphs": is_recorded} | backend
        run = setup.prepare(Experiment.model_validate(fields))
        found = []
        try:
            for step in range(run.loader.num_steps):
                apply_learning_rate(run, step)
                result = train_step(run, run.schedule.stage(step), step)
                statistics = torch.cat([part.flatten() for part in result.statistics]).tolist()
                found.append((result.loss, result.grad_norm, statistics))
        finally:
            setup.leave(run)
            torch.cuda.set_stream(torch.cuda.default_stream())
        return found

    return of_a_run


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_equal_computed_ones(numbers: Any, name: str) -> None:
    recipe = CASES[name].get("precision", {}).get("fp8_recipe")
    if recipe == "blockwise" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("blockwise needs Hopper")
    expected = numbers(False, **CASES[name])
    assert len({norm for _, norm, _ in expected}) == len(expected)
    assert numbers(True, **CASES[name]) == expected
