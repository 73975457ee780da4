"""An FP8 key/value cache whose scales the checkpoint brings, for owners only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.test_offline import prompts

KEY_SCALE, VALUE_SCALE = 32**0.5 / 448, 10 / 448
"""|k_hat| is at most the square root of the head width; no |v| of this model exceeds 10."""


def with_cache_scales(model: Path, folder: Path, factor: float) -> Path:
    """A copy of an export with `factor` times the scales above, named as compressed-tensors does; other tensors stay as
    they are."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "float-quantized",
        "config_groups": {},
        "ignore": ["re:.*"],
        "kv_cache_scheme": scheme,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(0, config["num_hidden_layers"], config["cla_share_factor"]):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([factor * KEY_SCALE])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([factor * VALUE_SCALE])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(
    "avx512f" not in Path("/proc/cpuinfo").read_text(), reason="vLLM's FP8 cache needs a CPU with AVX-512"
)
def test_a_borrowing_layer_reads_the_cache_with_the_scales_of_its_owner(
    exported: Callable[..., Path], serve: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A power of 2 on all scales changes no rounded value, except the smallest. A layer that read the cache with
    another scale than it was written with would see other keys."""
    model = exported()
    found = []
    for factor in (1.0, 2.0):
        scaled = with_cache_scales(model, tmp_path / str(factor), factor)
        result = serve(scaled, prompts(), rounds=[{"prompt_logprobs": True}])
        assert "error" not in result, result["log"]
        found.append(result)
    assert found[0]["blocks"] == 2**30 // (32 * 2 * 2 * 2 * 32)  # of one byte a number
    for one, other in zip(found[0]["rounds"][0], found[1]["rounds"][0], strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["prompt_logprobs"] == pytest.approx(other["prompt_logprobs"], abs=0.01)
