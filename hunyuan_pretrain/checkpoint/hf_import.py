"""Imports a Hugging Face folder, so that training can continue from it under every layout.

What is written is a run directory whose one checkpoint, after step 0, has weights and no training state:

    checkpoints/step_0000000/   `checkpoint.init_from=OUT` takes it
    tokenizer/                  hy.tiktoken
    experiment.yaml             an experiment that continues from it, to be completed
    resolved.yaml               the imported model as `export` reads it
    import.md                   where it comes from, and what could not be carried over

Weights are read and written one expert, or one other parameter, at a time.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError, folders
from hunyuan_pretrain.checkpoint.foreign_config import ForeignModel, read_config
from hunyuan_pretrain.checkpoint.foreign_tensors import ForeignTensors, refuse_unknown_quantization
from hunyuan_pretrain.checkpoint.generate import sha256_of
from hunyuan_pretrain.checkpoint.imported_experiment import continuation, imported_experiment
from hunyuan_pretrain.checkpoint.outputs import new_folder, refuse_existing
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors, TensorSpec
from hunyuan_pretrain.checkpoint.weight_map import by_expert, weight_map
from hunyuan_pretrain.checkpoint.weights_only import write_weights_only
from hunyuan_pretrain.config.history import Segment
from hunyuan_pretrain.config.load import dump_resolved
from hunyuan_pretrain.config.schedule import Schedule
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.data.hf_tokenizer import read_hf_tokenizer
from hunyuan_pretrain.data.tokenizer import RANKS_FILE, Tokenizer, format_ranks
from hunyuan_pretrain.model.hunyuan_config import DTYPES
from hunyuan_pretrain.runtime.device import versions

__all__ = ["Imported", "import_model"]


class Imported(NamedTuple):
    """What `import_model` has done."""

    model_type: str
    dtype: str
    """bf16 or fp32."""
    parameters: int
    bytes: int
    notes: list[str]
    """What was left out or changed, a line each."""


def import_model(folder: Path, output: Path, *, dtype: str | None = None) -> Imported:
    """Write `output` from the model folder `folder`.

    dtype: "bf16" or "fp32", of the weights (the router is fp32); by default bf16 for a folder in bf16 or FP8, and fp32
    for one in fp32 or fp16, so that nothing is rounded. Needs memory for the embedding, or one expert, twice.
    Raises CheckpointError or DataFormatError, and leaves no output, if `output` exists, the folder is not a model that
    this project computes, a tensor is missing, unknown, misshapen or damaged, the tokenizer is another, or the disk is
    full or not writable.
    """
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {what}; give a Hugging Face model folder")
    refuse_existing(output, folder)
    config = read_config(folder, StoredTensors(folder).keys())
    refuse_unknown_quantization(folder, config.quantization)
    tokenizer = read_hf_tokenizer(folder)
    if tokenizer.vocab_size > config.model.padded_vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding only "
            f"{config.model.padded_vocab_size} rows: they do not belong together"
        )
    tensors = ForeignTensors(folder, config.model)
    _refuse_changed_weights(folder)
    name = dtype or ("bf16" if _is_coarse(tensors) else "fp32")
    notes = [*config.notes, *tensors.notes, *_token_notes(config, tokenizer), *_rounding_notes(tensors, name)]
    experiment = imported_experiment(config, output, name)
    with new_folder(output) as new:
        (new / "tokenizer").mkdir()
        (new / "tokenizer" / RANKS_FILE).write_bytes(format_ranks(tokenizer.ranks))
        (new / "resolved.yaml").write_text(dump_resolved(experiment), encoding="utf-8")
        (new / "experiment.yaml").write_text(continuation(experiment, config, output), encoding="utf-8")
        source = _source(folder, config)
        result = _write_checkpoint(new, config, tensors, DTYPES[name], _marker(experiment, tokenizer, source))
        (new / "import.md").write_text(_page(source, name, notes), encoding="utf-8")
    return Imported(config.model_type, name, *result, notes)


def _write_checkpoint(
    new: Path, config: ForeignModel, tensors: ForeignTensors, dtype: torch.dtype, marker: dict[str, Any]
) -> tuple[int, int]:
    """(number of weights, bytes) of the checkpoint."""
    table = weight_map(config.model)
    parts = {row.megatron_name: by_expert(row) for row in table}
    specs = {
        row.megatron_name: TensorSpec(torch.float32 if row.is_fp32 else dtype, row.megatron_shape) for row in table
    }

    def read(name: str, expert: int) -> Tensor:
        row = parts[name][expert]
        return row.to_megatron([tensors[part].to(specs[name].dtype) for part in row.hf_names])

    write_weights_only(folders.checkpoint_folder(new, 0), specs, read, marker | {"dtype": str(dtype)})
    sizes = [torch.Size(spec.shape).numel() for spec in specs.values()]
    return sum(sizes), sum(spec.nbytes for spec in specs.values())


def _marker(experiment: Experiment, tokenizer: Tokenizer, source: dict[str, Any]) -> dict[str, Any]:
    """complete.json without the files."""
    segment = Segment(
        first_step=0,
        experiment=experiment.model_dump(mode="json"),
        position=Schedule.of(experiment.stages).position(0),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        world_size=1,
        layout="dp=1",
        tokenizer_digest=tokenizer.digest,
        versions=dict(versions().items()),
        changes=[f"imported from {source['folder']}"],
    )
    return {
        "step": 0,
        "world_size": 1,
        "layout": "dp=1",
        "model": experiment.model.model_dump(),
        "fp8_scaling": None,
        "torch": torch.__version__,
        "source": source,
        "history": [segment.model_dump(mode="json")],
    }


def _refuse_changed_weights(folder: Path) -> None:
    """Raise CheckpointError if the folder has the certificate of an export, and its shards are not those that were
    exported."""
    try:
        digests = dict(json.loads((folder / "certificate.json").read_text(encoding="utf-8"))["sha256"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'certificate.json'}: damaged: {error!r}; remove it, or repair it") from None
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in digests and sha256_of(path) != digests[path.name]:
            raise CheckpointError(f"{path}: its sha256 is not the one in certificate.json: damaged, or changed since")


def _source(folder: Path, config: ForeignModel) -> dict[str, Any]:
    """Where the weights come from: the digest of what is small, the size of the rest."""
    found = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".tiktoken"))
    small = [path for path in found if path.suffix != ".safetensors"]
    return {
        "folder": str(folder.resolve()),
        "model_type": config.model_type,
        "sha256": {path.name: sha256_of(path) for path in small},
        "bytes": {path.name: path.stat().st_size for path in found},
    }


def _is_coarse(tensors: ForeignTensors) -> bool:
    """Whether most of the weights are stored in bf16 or FP8."""
    sizes: Counter[bool] = Counter()
    for name in tensors.stored_names:
        spec = tensors.files.spec(name)
        sizes[spec.dtype in (torch.bfloat16, torch.float8_e4m3fn)] += torch.Size(spec.shape).numel()
    return sizes[True] > sizes[False]


def _rounding_notes(tensors: ForeignTensors, dtype: str) -> list[str]:
    """Which tensors lose digits."""
    if dtype == "fp32":
        return []
    finer = [
        name
        for name in tensors
        if tensors.stored_dtype(name) in (torch.float32, torch.float16) and not name.endswith(".mlp.gate.wg.weight")
    ]
    notes = [f"{len(finer)} tensors in a finer format were rounded to bf16, such as {finer[0]}"] if finer else []
    if any(tensors.stored_dtype(name) == torch.float8_e4m3fn for name in tensors):
        notes.append("FP8 weights times their scales were rounded to bf16; --dtype fp32 keeps the products")
    return notes


def _token_notes(config: ForeignModel, tokenizer: Tokenizer) -> list[str]:
    names = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    wrong = {name: config.token_ids[name] for name in names if config.token_ids.get(name, names[name]) != names[name]}
    if not wrong:
        return []
    said = ", ".join(f"{name}={value}" for name, value in wrong.items())
    right = ", ".join(f"{names[name]}" for name in wrong)
    return [f"{said} of config.json: the ids come from the tokenizer instead, for a pretrained model {right}"]


def _page(source: dict[str, Any], dtype: str, notes: list[str]) -> str:
    lines = [
        "# Import",
        "",
        f"From {source['folder']} (model_type {source['model_type']}) to {dtype}.",
        "complete.json of the checkpoint has the digests.",
        "",
        "## Not carried over, or changed",
        "",
        *(f"- {note}" for note in notes or ["nothing"]),
        "- optimizer state, learning rates and data: a model folder has none; experiment.yaml has values to replace",
        "- generation defaults and chat template: exports write those of this project",
    ]
    return "\n".join(lines) + "\n"
