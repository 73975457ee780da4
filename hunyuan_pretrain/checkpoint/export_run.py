"""Exports a training run's checkpoint as a Hugging Face folder, certified against the training model itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import ADAPTER_OF, faults_of, none_is_good
from hunyuan_pretrain.checkpoint.hf_export import export, refuse_at_once
from hunyuan_pretrain.checkpoint.history import history_of, present_piece, refuse_another_vocabulary
from hunyuan_pretrain.checkpoint.loaders import Format
from hunyuan_pretrain.checkpoint.model_card import facts_of_run, share_of
from hunyuan_pretrain.checkpoint.stored_weights import WhichWeights, verified_weights
from hunyuan_pretrain.checkpoint.trained_adapter import export_adapter
from hunyuan_pretrain.checkpoint.training_layers import TrainingLayers, one_rank
from hunyuan_pretrain.checkpoint.workers import Say
from hunyuan_pretrain.config.history import SourceFacts, schedule_of
from hunyuan_pretrain.config.schema import Experiment, StageConfig
from hunyuan_pretrain.data.mixture import source_path
from hunyuan_pretrain.model.hunyuan_config import DTYPES

__all__ = ["choose_checkpoint", "export_run", "in_force", "system_prompt_in", "system_prompt_of"]


def export_run(
    run_dir: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    format: Format = "hunyuan",
    licence: str | None = None,
    processes: int | None = None,
    which: WhichWeights = "trained",
    say: Say | None = None,
) -> dict[str, Any]:
    """Export the newest complete checkpoint of a run (or the one after `step` steps) to `output`; returns the
    certificate.

    dtype: "fp32" or "bf16", by default that of training. The number of positions and the RoPE alpha are those of the
    stage in which the checkpoint was taken. licence: an identifier for README.md, such as apache-2.0. processes: that
    verify, convert and digest files; by default as many as are worth it and fit into memory. Each then imports the main
    module, so a script that calls this needs the usual `if __name__ == "__main__":`. which: the weights that were
    trained, or with optimizer.ema_decay their moving average. say: gets lines of progress.
    Memory holds one layer, of any layout that trained it. Of a run with LoRA it is the adapter, in PEFT's format
    (`trained_adapter.export_adapter`). After a stage of conversations, the default system prompt is that of
    `system_prompt_of`.
    Raises CheckpointError if there is no such checkpoint or it is damaged, it has no moving average where that is
    wanted, or the run directory has another tokenizer than it was trained with, and as `hf_export.export` does.
    """
    resolved = run_dir / "resolved.yaml"
    if not resolved.exists():
        raise CheckpointError(f"{run_dir}: not a run directory (no resolved.yaml); give the run_dir of an experiment")
    folder = choose_checkpoint(run_dir, step, "there is nothing to export")
    marker = save_load.read_marker(folder)
    experiment, stage = in_force(folder)
    system_prompt = system_prompt_of(folder, say)
    save_load.refuse_other_model(folder, marker, experiment.model)
    refuse_another_vocabulary(folder, run_dir / "tokenizer")
    card = facts_of_run(run_dir, folder, licence)
    torch_dtype = DTYPES[dtype or experiment.precision.dtype]
    if ADAPTER_OF in marker and format != "hunyuan":
        raise CheckpointError(f"--format {format}: the run has trained an adapter, which has one format, PEFT's")
    refuse_at_once(experiment.model, run_dir / "tokenizer", output, dtype=torch_dtype, format=format)
    weights, processes = verified_weights(folder, marker, processes, say, which)
    source: dict[str, Any] = {"run": experiment.name, "step": int(marker["step"]), "weights": which}
    if which == "ema":
        source["ema_decay"] = experiment.optimizer.ema_decay
    if ADAPTER_OF in marker:
        return export_adapter(experiment, marker, weights, output, torch_dtype, source, system_prompt)
    with one_rank(experiment.runtime.distributed_timeout_s) as groups:
        return export(
            experiment.model,
            weights,
            run_dir / "tokenizer",
            output,
            rope_alpha=stage.rope_alpha,
            max_position_embeddings=stage.sequence_length,
            dtype=torch_dtype,
            reference=TrainingLayers(experiment.model, weights, groups, rope_alpha=stage.rope_alpha, dtype=torch_dtype),
            format=format,
            certificate_info=source,
            card=card,
            system_prompt=system_prompt,
            processes=processes,
            say=say,
        )


def in_force(folder: Path) -> tuple[Experiment, StageConfig]:
    """The configuration and the stage in which a checkpoint was taken. Raises CheckpointError."""
    marker = save_load.read_marker(folder)
    history = history_of(folder, marker, with_data=False)
    schedule = schedule_of(history)
    return history[-1].config, present_piece(schedule, int(marker["step"]), folder).stage


def system_prompt_of(folder: Path, say: Say | None = None) -> str | None:
    """The system prompt with which the conversations of the last stage up to a checkpoint were tokenized, "" for none;
    None if that stage read texts only. Of several, that of the source with the largest share of the stage, which `say`
    is told; "" if a version that did not record it has trained, which `say` is told too. Raises CheckpointError."""
    marker = save_load.read_marker(folder)
    history = history_of(folder, marker, with_data=False)
    piece = present_piece(schedule_of(history), int(marker["step"]), folder)
    return system_prompt_in(piece.stage, history[piece.segment].sources, say)


def system_prompt_in(stage: StageConfig, sources: Mapping[str, SourceFacts], say: Say | None = None) -> str | None:
    """`system_prompt_of` a checkpoint in `stage`, whose data are among `sources`."""
    shares: dict[str, float] = {}
    for source in stage.data:
        facts = sources.get(source_path(source.path))
        if facts is not None and facts.system_prompt is not None:
            shares[facts.system_prompt] = shares.get(facts.system_prompt, 0.0) + share_of(source, stage)
    if not shares:
        if stage.task == "pretrain":
            return None
        if say is not None:
            say("the run has not recorded the system prompt of its conversations: the default is none")
        return ""
    chosen = max(shares, key=shares.__getitem__)
    if len(shares) > 1 and say is not None:
        others = ", ".join(repr(prompt) for prompt in shares if prompt != chosen)
        say(f"conversations with several system prompts: the default is {chosen!r}, not {others}")
    return chosen


def choose_checkpoint(run_dir: Path, step: int | None, otherwise: str) -> Path:
    """The checkpoint after `step` steps, or the newest complete one. Raises CheckpointError; if all are damaged, it
    ends with `otherwise`."""
    if step is not None:
        folder = save_load.checkpoint_folder(run_dir, step)
        save_load.read_marker(folder)
        return folder
    found = save_load.find_checkpoints(run_dir)
    if not found and (faults := faults_of(run_dir)):
        raise none_is_good(run_dir, faults, otherwise)
    if not found:
        raise CheckpointError(f"{run_dir}: no complete checkpoint")
    return found[-1]
