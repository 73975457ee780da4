"""What vLLM's own code makes of a quantised folder, without a kernel: the scheme of every layer, and the conditions of
its method for experts. In vLLM's interpreter, VLLM_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hunyuan_pretrain.checkpoint.quantized_format import SCHEMES, quantization_config

pytestmark = pytest.mark.vllm

SCRIPT = r"""
import json, sys
from types import SimpleNamespace
import torch
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as ct
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8 as fp8
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    WNA16_SUPPORTED_BITS,
)

model = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
fp8.get_current_vllm_config = lambda: model
found = {}
for name, quantization in json.load(sys.stdin).items():
    config = ct.CompressedTensorsConfig.from_config(quantization)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]
    }
    ct.CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(config.kv_cache_scheme)

    def scheme(kind, layer):
        of_kind = type(kind, (torch.nn.Module,), {})()
        chosen = config.get_scheme(of_kind, layer)
        if chosen is None:
            return None
        return [type(chosen).__name__, chosen.strategy, getattr(chosen, "is_static_input_scheme", None)]

    prefix = "model.layers.1."
    layers = {
        "qkv": scheme("QKVParallelLinear", prefix + "self_attn.qkv_proj"),
        "borrower's q": scheme("ColumnParallelLinear", prefix + "self_attn.q_proj"),
        "o": scheme("RowParallelLinear", prefix + "self_attn.o_proj"),
        "shared gate_up": scheme("MergedColumnParallelLinear", prefix + "mlp.shared_mlp.gate_up_proj"),
        "shared down": scheme("RowParallelLinear", prefix + "mlp.shared_mlp.down_proj"),
        "router": scheme("ReplicatedLinear", prefix + "mlp.gate"),
        "head": scheme("ParallelLMHead", "lm_head"),
    }
    embedding = type("VocabParallelEmbedding", (torch.nn.Module,), {})()
    layers["embedding"] = config.get_scheme_dict(embedding, "model.embed_tokens")
    config._add_fused_moe_to_target_scheme_map()
    experts = type("RoutedExperts", (torch.nn.Module,), {})()
    dicts = [
        config.get_scheme_dict(experts, f"{prefix}mlp.experts.0.{part}_proj") for part in ("gate", "up", "down")
    ]
    weights, inputs, format = (dicts[0][key] for key in ("weights", "input_activations", "format"))
    layers["experts"] = {
        "one scheme": all(one == dicts[0] for one in dicts),
        "WNA16": config._is_wNa16_group_channel(weights, inputs)
        and format == "pack-quantized" and weights.num_bits in WNA16_SUPPORTED_BITS and weights.group_size == -1,
        "FP8 W8A8": bool(config._is_fp8_w8a8(weights, inputs)),
        "strategies": [weights.strategy, inputs and inputs.strategy],
        "dynamic": inputs and inputs.dynamic,
    }
    found[name] = layers
print("RESULT", json.dumps(found))
"""

LINEAR = {
    "int8": ["CompressedTensorsWNA16", "channel", None],
    "fp8": ["CompressedTensorsW8A8Fp8", "channel", False],
    "fp8-static": ["CompressedTensorsW8A8Fp8", "tensor", True],
}
EXPERTS = {
    "int8": {"WNA16": True, "FP8 W8A8": False, "strategies": ["channel", None], "dynamic": None},
    "fp8": {"WNA16": False, "FP8 W8A8": True, "strategies": ["channel", "token"], "dynamic": True},
    "fp8-static": {"WNA16": False, "FP8 W8A8": True, "strategies": ["tensor", "tensor"], "dynamic": False},
}


def test_vllm_gives_every_layer_the_scheme_that_was_asked_for() -> None:
    python = os.environ.get("VLLM_PYTHON")
    if not python or not Path(python).exists():
        pytest.skip("needs vLLM in an environment of its own: VLLM_PYTHON")
    configs = {name: quantization_config(scheme, name != "fp8") for name, scheme in SCHEMES.items()}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", SCRIPT], input=json.dumps(configs), capture_output=True, text=True, env=environment
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == 1, done.stderr[-2000:]
    found = json.loads(results[0].removeprefix("RESULT "))
    for name in SCHEMES:
        layers = found[name]
        for untouched in ("router", "head", "embedding"):
            assert layers[untouched] is None, (name, untouched)
        for linear in ("qkv", "borrower's q", "o", "shared gate_up", "shared down"):
            assert layers[linear] == LINEAR[name], (name, linear)
        assert layers["experts"] == {"one scheme": True} | EXPERTS[name], name
