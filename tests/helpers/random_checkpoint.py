"""A training run of a model of any size with random weights, written tensor by tensor in one process: the files of
megatron's distributed format, without the state of an optimizer."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hunyuan_pretrain.checkpoint import folders
from hunyuan_pretrain.checkpoint.stored import INDEX
from hunyuan_pretrain.checkpoint.stored_weights import StoredWeights
from hunyuan_pretrain.checkpoint.weight_map import weight_map
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.runs import experiment_fields, write_experiment
from tests.helpers.tiny_export import write_tiny_tokenizer

STEP = 3


def write_random_run(run_dir: Path, model: dict[str, Any], rank_files: int = 2) -> Path:
    """Returns the run directory. model: changes of `experiment_fields`' model. The weights are fp32, with the standard
    deviations of `tiny_export.random_tensors`; layer by layer they go into rank_files files in turn."""
    changes = {f"model__{key}": value for key, value in model.items()}
    fields = experiment_fields(Path("no_corpus"), run_dir, steps=STEP, **changes)
    folder = folders.checkpoint_folder(run_dir, STEP)
    folder.mkdir(parents=True)
    (run_dir / "tokenizer").mkdir()
    write_tiny_tokenizer(run_dir / "tokenizer")
    write_experiment(run_dir / "resolved.yaml", fields)
    architecture = Experiment.model_validate(fields).model
    files = _write_tensors(folder, weight_map(architecture), rank_files)
    marker = {"step": STEP, "world_size": rank_files, "model": architecture.model_dump(), "dtype": "torch.float32"}
    folders.write_marker(folder, {**json.loads(json.dumps(marker)), "files": dict(sorted(files.items()))})
    return run_dir


def weights_of(folder: Path) -> StoredWeights:
    """The weights of a checkpoint, whose digests are not compared."""
    return StoredWeights(folder, {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})


def _write_tensors(folder: Path, table: list[Any], rank_files: int) -> dict[str, dict[str, Any]]:
    writers = [_Digested(folder / f"__{rank}_0.distcp") for rank in range(rank_files)]
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for number, row in enumerate(table):
        writer = writers[number % rank_files]
        begin = writer.written
        torch.save(_random(row, number), writer)
        tensors[row.megatron_name] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32),
            torch.Size(row.megatron_shape),
            [ChunkStorageMetadata(torch.Size([0] * len(row.megatron_shape)), torch.Size(row.megatron_shape))],
        )
        index = MetadataIndex(row.megatron_name, torch.Size([0] * len(row.megatron_shape)))
        places[index] = _StorageInfo(writer.path.name, begin, writer.written - begin)
    with _Digested(folder / INDEX) as metadata:
        pickle.dump(Metadata(tensors, storage_data=places), metadata)
    for writer in writers:
        writer.close()
    return {
        writer.path.name: {"bytes": writer.written, "sha256": writer.digest.hexdigest()}
        for writer in [*writers, metadata]
    }


def _random(row: Any, seed: int) -> torch.Tensor:
    tensor = torch.empty(row.megatron_shape).normal_(generator=torch.Generator().manual_seed(seed))
    is_norm = "layernorm" in row.megatron_name
    return tensor.mul_(0.2).add_(1) if is_norm else tensor.mul_(row.megatron_shape[-1] ** -0.5)


class _Digested(io.RawIOBase):
    """A file that knows its length and sha256. `torch.save` does not seek in it."""

    def __init__(self, path: Path) -> None:
        self.path, self._file, self.written, self.digest = path, path.open("wb"), 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.written += self._file.write(data)
        return len(data)

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
