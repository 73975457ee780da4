"""The weights that a run with LoRA adapts: read at every start, because its checkpoints hold adapters only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from hunyuan_pretrain.checkpoint import CheckpointError, save_load
from hunyuan_pretrain.checkpoint.folders import ADAPTER_OF, checkpoint_of
from hunyuan_pretrain.checkpoint.optimizer_state import reload_weights
from hunyuan_pretrain.checkpoint.trained_adapter import read_adapter
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.digests import digest_of
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.parallel.agreement import first_error
from hunyuan_pretrain.train import resume


@dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter belongs to."""

    folder: Path
    digest: str
    """Of the digests of its files."""
    lines: tuple[str, ...]
    changes: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """What complete.json of an adapter's checkpoint says of it."""
        return {"path": str(self.folder), "digest": self.digest}


def load_weights(experiment: Experiment, chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> Base:
    """Read the weights of checkpoint.init_from into the model; adapters keep theirs. Communicates: all ranks. Raises
    CheckpointError."""
    wanted = Path(str(experiment.checkpoint.init_from))
    folder: Path = resume.on_rank_0(lambda: checkpoint_of(wanted))
    base = base_in(experiment, folder, resume.on_rank_0(lambda: save_load.read_marker(folder)))
    save_load.load(folder, chunks, None)
    reload_weights(optimizer)
    return base


def base_in(experiment: Experiment, folder: Path, marker: Mapping[str, Any]) -> Base:
    """A checkpoint as the start of a run. Raises CheckpointError if the model cannot use its weights."""
    lines, changes = resume.weights_from(experiment, folder, marker)
    return Base(folder, digest_of(marker["files"]), tuple(lines), tuple(changes))


def load_base(experiment: Experiment, chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> Base | None:
    """`load_weights` of a run with LoRA, whether it resumes or not; None without."""
    return None if experiment.tuning.lora is None else load_weights(experiment, chunks, optimizer)


def start_adapter(experiment: Experiment, chunks: list[HunyuanModel], optimizer: MegatronOptimizer) -> tuple[str, ...]:
    """Read tuning.lora.adapter, if there is one; returns lines for the log. Communicates: all ranks. Raises
    CheckpointError."""
    lora = experiment.tuning.lora
    if lora is None or lora.adapter is None:
        return ()
    counts: list[int] = []
    if error := first_error(lambda: counts.append(read_adapter(Path(str(lora.adapter)), chunks))):
        raise CheckpointError(error)
    reload_weights(optimizer)
    return (f"starts from the adapter {lora.adapter}: {counts[0]:,} tensors",)


def refuse_other_base(folder: Path, marker: Mapping[str, Any], base: Base | None) -> None:
    """Raise CheckpointError if the adapter in a checkpoint of this run was trained on other weights than `base`."""
    adapter = marker.get(ADAPTER_OF)
    if base is not None and adapter is not None and adapter["digest"] != base.digest:
        raise CheckpointError(
            f"{folder}: its adapter was trained on the weights {adapter['digest'][:12]}... of {adapter['path']}, but "
            f"checkpoint.init_from is {base.folder} with {base.digest[:12]}...; give the weights it was trained on"
        )
