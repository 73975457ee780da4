"""Exports a training run's checkpoint as a Hugging Face folder, certified against the training model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import faults_of, none_is_good
from hunyuan_pretrain.checkpoint.hf_export import Format, export
from hunyuan_pretrain.checkpoint.history import history_of, present_piece
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment, ParallelConfig, StageConfig
from hunyuan_pretrain.model.hunyuan_config import DTYPES, transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.parallel.groups import build_groups, destroy_groups, initialize_distributed

__all__ = ["export_run"]


def export_run(
    run_dir: Path, output: Path, *, step: int | None = None, dtype: str | None = None, format: Format = "hunyuan"
) -> dict[str, Any]:
    """Export the newest complete checkpoint of a run (or the one after `step` steps) to `output`; returns the
    certificate.

    Runs in one process, which holds the whole model. dtype: "fp32" or "bf16", by default that of training. The number
    of positions and the RoPE alpha are those of the stage in which the checkpoint was taken. Raises CheckpointError if
    there is no such checkpoint, and as `hf_export.export` does.
    """
    resolved = run_dir / "resolved.yaml"
    if not resolved.exists():
        raise CheckpointError(f"{run_dir}: not a run directory (no resolved.yaml); give the run_dir of an experiment")
    folder = _choose_checkpoint(run_dir, step)
    step = int(save_load.read_marker(folder)["step"])
    experiment, stage = in_force(folder)
    model = _load_on_one_rank(experiment, folder, DTYPES[dtype or experiment.precision.dtype])
    try:
        return export(
            experiment.model,
            {name: parameter.detach() for name, parameter in model.named_parameters()},
            run_dir / "tokenizer",
            output,
            rope_alpha=stage.rope_alpha,
            max_position_embeddings=stage.sequence_length,
            dtype=DTYPES[dtype or experiment.precision.dtype],
            reference_logits=lambda tokens_BS: dropless_logits(model, tokens_BS, stage.rope_alpha),
            format=format,
            certificate_info={"run": experiment.name, "step": step},
        )
    finally:
        destroy_groups()


@torch.no_grad()
def dropless_logits(model: HunyuanModel, tokens_BS: Tensor, rope_alpha: float) -> Tensor:
    """Logits (B, S, V) of B sequences that do not attend to each other, routed without a capacity limit, on one
    rank."""
    B, S = tokens_BS.shape
    positions_T = torch.arange(S).repeat(B)
    logits_TV, _ = model(ModelInputs(tokens_BS.reshape(-1), positions_T, list(range(0, B * S + 1, S)), rope_alpha))
    return logits_TV.view(B, S, -1)


def in_force(folder: Path) -> tuple[Experiment, StageConfig]:
    """The configuration and the stage in which a checkpoint was taken. Raises CheckpointError."""
    marker = save_load.read_marker(folder)
    history = history_of(folder, marker, with_data=False)
    schedule = Schedule.of_segments([(segment.first_step, segment.config.stages) for segment in history])
    return history[-1].config, present_piece(schedule, int(marker["step"]), folder).stage


def _choose_checkpoint(run_dir: Path, step: int | None) -> Path:
    if step is not None:
        folder = save_load.checkpoint_folder(run_dir, step)
        save_load.read_marker(folder)
        return folder
    found = save_load.find_checkpoints(run_dir)
    if not found and (faults := faults_of(run_dir)):
        raise none_is_good(run_dir, faults, "there is nothing to export")
    if not found:
        raise CheckpointError(f"{run_dir}: no complete checkpoint")
    return found[-1]


def _load_on_one_rank(experiment: Experiment, folder: Path, dtype: torch.dtype) -> HunyuanModel:
    """The model on the CPU in one process, whatever parallel layout trained it."""
    initialize_distributed("gloo", experiment.runtime.distributed_timeout_s)
    groups = build_groups(ParallelConfig(), experiment.runtime.distributed_timeout_s)
    config = transformer_config(experiment.model, ParallelConfig(), experiment.precision, device="cpu")
    (model,) = build_model(config, groups, seed=None)
    save_load.load(folder, [model], None)
    for name, parameter in model.named_parameters():
        if not name.endswith("router.weight"):  # fp32 in every export
            parameter.data = parameter.data.to(dtype)
    return model
