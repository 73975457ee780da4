"""The experiment of an imported model: as recorded beside its weights, and as a file from which a user continues."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from hunyuan_pretrain.checkpoint.foreign_config import ForeignModel
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.config.yaml_tree import Dumper

__all__ = ["continuation", "imported_experiment"]

DATA = "data/packed"
"""Placeholder in experiment.yaml."""
LEARNING_RATE = 3e-5
CONTINUED_TOKENS = 1_000_000_000
CONTINUED_LENGTH = 4096
LARGEST_GROUP = 512
"""Default of model.moe_routing_group_tokens."""


def imported_experiment(config: ForeignModel, output: Path, dtype: str) -> Experiment:
    """What is known of the imported model's training: its architecture, its positions and the RoPE at its end. Exports
    read it; the rest is filled in."""
    length = config.max_position_embeddings
    model = config.model.model_copy(update={"moe_routing_group_tokens": math.gcd(length, LARGEST_GROUP)})
    return Experiment.model_validate(
        _fields(model.model_dump(), output, dtype)
        | {"stages": [_stage("imported", length, length, 1, config.rope_alpha)]}
    )


def continuation(experiment: Experiment, config: ForeignModel, output: Path) -> str:
    """experiment.yaml: training continues from the weights in `output`."""
    length = min(CONTINUED_LENGTH, config.max_position_embeddings)
    batch = 256
    stage = _stage("continue", length, CONTINUED_TOKENS, batch, config.rope_alpha)
    model = experiment.model.model_copy(update={"moe_routing_group_tokens": math.gcd(length, LARGEST_GROUP)})
    fields = _fields(model.model_dump(), output, experiment.precision.dtype) | {
        "stages": [stage],
        "checkpoint": {"init_from": str(output.absolute()), "save_every_steps": 500},
    }
    Experiment.model_validate(fields)
    # in a file a dollar begins a variable
    text = yaml.dump(_with_dollars(fields), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=140)
    notes = {
        "run_dir:": "yours",
        "  lr:": "yours; a model folder does not say at which rate its training ended",
        "- name:": "yours, as many as you like: see configs/ and docs/guide/experiments.md",
        "  tokens:": "yours",
        f"  sequence_length: {length}": f"yours; config.json allows {config.max_position_embeddings} positions",
        "  rope_alpha:": "of config.json; it belongs to the weights",
        "  - path:": "yours: a folder written by `hunyuan-data pack` with this tokenizer",
        "  init_from:": "weights only; the optimizer starts fresh",
    }
    lines = []
    for line in text.splitlines():
        note = next((note for start, note in notes.items() if line.startswith(start)), None)
        lines.append(f"{line} # {note}" if note else line)
    return "\n".join([f"# Continues training from the weights in {output.absolute()}.", *lines]) + "\n"


def _fields(model: dict[str, Any], output: Path, dtype: str) -> dict[str, Any]:
    name = output.absolute().name
    return {
        "name": name,
        "run_dir": f"runs/{name}",
        "seed": 1234,
        "tokenizer": str(output.absolute() / "tokenizer"),
        "model": model,
        "precision": {"dtype": dtype},
        "optimizer": {"lr": LEARNING_RATE},
    }


def _with_dollars(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_dollars(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_dollars(one) for one in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _stage(name: str, length: int, tokens: int, batch: int, rope_alpha: float) -> dict[str, Any]:
    return {
        "name": name,
        "tokens": tokens,
        "sequence_length": length,
        "global_batch_sequences": batch,
        "rope_alpha": rope_alpha,
        "lr_end": 0.1,
        "data": [{"path": DATA}],
    }
