"""From a run trained in FP8 to an FP8 export, without a second rounding."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hunyuan_pretrain.checkpoint.quantized_format import SCHEMES, read_weight
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors
from hunyuan_pretrain.checkpoint.weight_map import weight_map
from hunyuan_pretrain.config.recipe import RECIPES
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.model.fp8.quantise import quantize, to_fp32
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import experiment_fields, run_forked, write_experiment


def save_weights_of_run(run_dir: str, file: str) -> ModelConfig:
    """Write the weights in a run's checkpoint as training holds them, under megatron's names."""
    from hunyuan_pretrain.checkpoint import export_run, folders
    from hunyuan_pretrain.checkpoint.stored_weights import verified_weights

    folder = folders.checkpoint_of(Path(run_dir))
    experiment, _ = export_run.in_force(folder)
    weights, _ = verified_weights(folder, folders.read_marker(folder), processes=1)
    save_file(dict(weights), file)
    return experiment.model


def test_a_run_with_the_tensorwise_recipe_is_exported_in_the_bits_of_its_matmuls(corpus: Path, tmp_path: Path) -> None:
    fields = experiment_fields(
        corpus,
        tmp_path / "run",
        steps=3,
        precision={"dtype": "bf16", "fp8_recipe": "tensorwise"},
        model__moe_ffn_hidden_size=48,
    )
    text = tmp_path / "text.txt"
    text.write_text((corpus / "texts/calendar.txt").read_text()[:8000])
    static = ("--scheme", "fp8-static", "--calibration", text, "--sequence-length", 64)
    for command in (
        ("train", write_experiment(tmp_path / "experiment.yaml", fields)),
        ("export", tmp_path / "run", tmp_path / "bf16"),
        ("quantize", tmp_path / "bf16", tmp_path / "fp8-static", *static),
        ("quantize", tmp_path / "bf16", tmp_path / "fp8", "--scheme", "fp8", "--one-scale-per-tensor"),
    ):
        status, out, err = run_forked(*command)
        assert status == 0, err
    assert "likeliest token as in BF16" in out
    (model,) = fork_ranks(1, save_weights_of_run, str(tmp_path / "run"), str(tmp_path / "weights"))
    weights = load_file(tmp_path / "weights")
    compared = 0
    for row in weight_map(model):
        if row.is_fp32 or "norm" in row.megatron_name or "embedding" in row.megatron_name:
            continue
        weight = weights[row.megatron_name]
        _, codes, inverse = quantize(weight.reshape(-1, *weight.shape[-2:]), RECIPES["tensorwise"], "w", False)
        used = (to_fp32(codes) * inverse).reshape(weight.shape)
        for name, expected in zip(row.hf_names, row.to_hf(used), strict=True):
            for scheme in ("fp8-static", "fp8"):
                stored = StoredTensors(tmp_path / scheme)
                found = read_weight(stored, name.removesuffix(".weight"), SCHEMES[scheme])
                assert torch.equal(found.dequantized(), expected), (scheme, name)
                compared += 1
    assert compared == 2 * (4 * (2 + 3 + 4 * 3) + 2 * 2)
