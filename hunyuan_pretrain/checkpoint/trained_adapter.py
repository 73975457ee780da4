"""The adapter of a run with LoRA in PEFT's format: written from its checkpoint, and read by a run that starts from one.

PEFT's names are those of `adapter`; routed experts have one A and one B each. `merge_lora` adds the result to an
export of the run's base.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.adapter import CERTIFICATE, CONFIG, PREFIX, WEIGHTS, Adapter
from hunyuan_pretrain.checkpoint.folders import ADAPTER_OF
from hunyuan_pretrain.checkpoint.generate import sha256_of
from hunyuan_pretrain.checkpoint.outputs import new_folder, refuse_existing
from hunyuan_pretrain.checkpoint.stored_weights import StoredWeights
from hunyuan_pretrain.checkpoint.tensor_files import SINGLE, ShardWriter, StoredTensors, TensorSpec
from hunyuan_pretrain.config.schema import Experiment, LoraConfig, ModelConfig
from hunyuan_pretrain.config.tuning import linears_of_layer, targets
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel

FORMAT = "peft"
"""Of an adapter, in its certificate."""


class Factor(NamedTuple):
    """One A or B of the model, whole."""

    name: str
    """Ours, as in a checkpoint of a run with LoRA."""
    theirs: tuple[str, ...]
    """PEFT's; one for each routed expert, which are the rows of ours."""
    is_routed: bool


def factors(model: ModelConfig, lora: LoraConfig) -> Iterator[Factor]:
    """Every A and B of a model with these adapters, in the order of the forward pass."""
    for layer in range(model.num_layers):
        found = targets(model, lora, layer)
        for linear in linears_of_layer(model, layer):
            for part, module in zip(linear.parts, linear.modules, strict=True):
                if part not in found.get(linear.name, ()):
                    continue
                experts = range(model.num_moe_experts) if linear.is_routed else range(1)
                modules = [f"model.layers.{layer}.{module.format(expert)}" for expert in experts]
                for letter in "ab":
                    ours = f"decoder.layers.{layer}.{linear.name}.adapter.{part}.{letter}"
                    theirs = tuple(f"{PREFIX}{one}.lora_{letter.upper()}.weight" for one in modules)
                    yield Factor(ours, theirs, linear.is_routed)


def modules_of(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """PEFT's target_modules: the ends of the names, if these name the same modules, else the full names."""
    chosen = [
        theirs.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        for factor in factors(model, lora)
        for theirs in factor.theirs
        if theirs.endswith("lora_A.weight")
    ]
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    every = {
        f"model.layers.{layer}.{module.format(expert)}"
        for layer in range(model.num_layers)
        for linear in linears_of_layer(model, layer)
        for module in linear.modules
        for expert in range(model.num_moe_experts if linear.is_routed else 1)
    }
    meant = {name for name in every if name.rpartition(".")[2] in ends}
    return ends if meant == set(chosen) else chosen


def export_adapter(
    experiment: Experiment,
    marker: Mapping[str, Any],
    weights: StoredWeights,
    output: Path,
    dtype: torch.dtype,
    source: Mapping[str, Any],
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """Write the adapter of a checkpoint to the new folder `output` as PEFT does; returns its certificate.

    What was written is read back and compared with the checkpoint, number by number after the rounding to `dtype`.
    source: for the certificate, as in `hf_export.export`; system_prompt: of the conversations that it was trained on,
    for the certificate too; None for texts.
    Raises CheckpointError if the folder exists, a tensor is missing or damaged, or the disk is full.
    """
    lora, model = experiment.tuning.lora, experiment.model
    assert lora is not None, "a run without LoRA"
    refuse_existing(output, weights.folder)
    table = list(factors(model, lora))
    missing = [factor.name for factor in table if factor.name not in weights]
    if missing:
        raise CheckpointError(f"{weights.folder}: {missing[0]} is missing; it is not the adapter of this experiment")
    specs = {
        theirs: TensorSpec(dtype, weights.spec(factor.name).shape[int(factor.is_routed) :])
        for factor in table
        for theirs in factor.theirs
    }
    with new_folder(output) as new:
        writer = ShardWriter(new, specs, max_shard_bytes=sys.maxsize)
        writer.create()
        for factor in table:
            for row, theirs in enumerate(factor.theirs):
                writer.write(theirs, _whole(weights, factor, row))
        writer.finish()
        (new / SINGLE).rename(new / WEIGHTS)
        _write(new / CONFIG, _config(experiment, marker))
        written = StoredTensors(new, WEIGHTS)
        for factor in table:
            for row, theirs in enumerate(factor.theirs):
                if not torch.equal(written[theirs], _whole(weights, factor, row).to(dtype)):
                    raise CheckpointError(f"{theirs}: is not what was written; the disk may be faulty")
        certificate = {
            "format": FORMAT,
            "dtype": str(dtype).removeprefix("torch."),
            "source": dict(source),
            "base": dict(marker[ADAPTER_OF]),
            **({} if system_prompt is None else {"chat": {"system_prompt": system_prompt}}),
            "tensors": len(specs),
            "max_abs_difference": 0.0,
            "sha256": {name: sha256_of(new / name) for name in (CONFIG, WEIGHTS)},
        }
        _write(new / CERTIFICATE, certificate)
    return certificate


@torch.no_grad()
def read_adapter(folder: Path, chunks: list[HunyuanModel]) -> int:
    """Read a PEFT adapter into the adapters of this rank's model; returns the number of its tensors. Communicates
    nothing. Raises CheckpointError if its rank, alpha or modules are others, or a tensor is damaged."""
    model, lora = chunks[0].config.model, chunks[0].config.tuning.lora
    assert lora is not None, "a run without LoRA"
    adapter = Adapter(folder)
    _refuse_other_settings(folder, adapter.config, lora)
    table = {factor.name: factor for factor in factors(model, lora)}
    expected = {theirs for factor in table.values() for theirs in factor.theirs}
    if strange := sorted(expected ^ set(adapter.tensors)):
        which = "missing" if strange[0] in expected else "not among tuning.lora.target_modules"
        raise CheckpointError(f"{folder}: {strange[0]} is {which} ({len(strange)} such tensors)")
    for chunk in chunks:
        placements = chunk.placements()
        for name, parameter in chunk.named_parameters():
            if name not in table:
                continue
            factor, placement = table[name], placements[name]
            if adapter.tensors.spec(factor.theirs[0]).shape != placement.whole_shape[int(factor.is_routed) :]:
                raise CheckpointError(f"{folder}: {factor.theirs[0]} has another shape; an adapter of another base")
            for part in placement.parts:
                if not factor.is_routed:
                    parameter[part.local] = adapter.tensors[factor.theirs[0]][part.whole].to(parameter.dtype)
                    continue
                for row, expert in enumerate(range(part.whole[0].start, part.whole[0].stop)):
                    whole = adapter.tensors[factor.theirs[expert]]
                    parameter[row][part.local[1:]] = whole[part.whole[1:]].to(parameter.dtype)
    return len(expected)


def _refuse_other_settings(folder: Path, config: Mapping[str, Any], lora: LoraConfig) -> None:
    wanted = {"r": lora.rank, "lora_alpha": lora.alpha}
    problems = [
        f"{name}={config.get(name)}, but this run has {value:g}"
        for name, value in wanted.items()
        if config.get(name) != value
    ]
    problems += [
        f"{name}: not supported here"
        for name in ("use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save")
        if config.get(name)
    ]
    if problems:
        raise CheckpointError(f"{folder / CONFIG}: {'; '.join(problems)}")


def _whole(weights: StoredWeights, factor: Factor, row: int) -> torch.Tensor:
    return weights.rows(factor.name, row, row + 1)[0] if factor.is_routed else weights[factor.name]


def _config(experiment: Experiment, marker: Mapping[str, Any]) -> dict[str, Any]:
    lora = experiment.tuning.lora
    assert lora is not None
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(marker[ADAPTER_OF]["path"]),
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules_of(experiment.model, lora),
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
