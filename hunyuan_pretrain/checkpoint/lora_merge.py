"""Merges a LoRA adapter into its base: full weights that need no PEFT. One tensor is in memory at a time; sums are
computed in fp32 and rounded once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.adapter import CONFIG, WEIGHTS, Adapter, Change, system_prompt_of_adapter
from hunyuan_pretrain.checkpoint.generate import sha256_of
from hunyuan_pretrain.checkpoint.hf_export import make_chat
from hunyuan_pretrain.checkpoint.outputs import new_folder, refuse_existing
from hunyuan_pretrain.checkpoint.tensor_files import INDEX, ShardWriter, StoredTensors, TensorSpec

__all__ = ["BASE_RECORD", "Merged", "merge_lora", "merged_tensors"]

MERGED_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BASE_RECORD = "base.json"
"""In an adapter's folder, {"sha256": {file of the base: digest}}: the base that it was trained on. Optional."""
RECORD = "merge.json"
"""In the output: what was merged."""
NOT_COPIED = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
ROUTER = ".mlp.gate.wg.weight"
"""Stays fp32, as in every export."""


class Merged(NamedTuple):
    """What `merge_lora` has done."""

    changed: int
    tensors: int
    dtype: str
    left_out: list[str]
    """Files of the base that are not true of the merged model."""


def merge_lora(base: Path, adapter: Path, output: Path, *, dtype: str | None = None) -> Merged:
    """Write `output`: the model folder `base` with the PEFT adapter in `adapter` added.

    dtype: "fp16", "bf16" or "fp32", of all weights but the router; by default that of the base. All other files of
    the base are copied. If an export of this project gets an adapter that was trained on conversations, its end of
    sequence and default system prompt become theirs. Raises CheckpointError and leaves no output if `output` exists,
    the adapter is of a kind that is not understood or of another base, a tensor of it has no place, a sum is not
    finite in the new format, or the disk is full or not writable.
    """
    config, stored, added, changes = _opened(base, adapter, output)
    specs = {name: stored.spec(name) for name in stored}
    name = dtype or _dtype_of(specs)
    wanted = {
        tensor: TensorSpec(torch.float32 if tensor.endswith(ROUTER) else MERGED_DTYPES[name], spec.shape)
        for tensor, spec in specs.items()
    }
    with new_folder(output) as new:
        left_out = _copy_others(base, new)
        writer = ShardWriter(new, wanted)
        writer.create()
        for tensor, spec in wanted.items():
            writer.write(tensor, _merged(tensor, stored, added, changes.get(tensor), spec.dtype))
        writer.finish()
        if (base / "certificate.json").is_file() and (prompt := system_prompt_of_adapter(adapter)) is not None:
            config |= make_chat(new, prompt)
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        _write_json(new / "config.json", config | {key: str(MERGED_DTYPES[name]).removeprefix("torch.")})
        _write_json(new / RECORD, _record(base, adapter, len(changes), name))
    return Merged(len(changes), len(specs), name, left_out)


def merged_tensors(base: Path, adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model folder `base` that the adapter changes, with it added, in the format of the base's.
    Raises CheckpointError at once as `merge_lora` does, and while the tensors are read for a sum that is not finite."""
    _, stored, added, changes = _opened(base, adapter)
    return (
        (tensor, _merged(tensor, stored, added, change, stored.spec(tensor).dtype))
        for tensor, change in changes.items()
    )


def _opened(
    base: Path, adapter: Path, output: Path | None = None
) -> tuple[dict[str, Any], StoredTensors, Adapter, dict[str, Change]]:
    """config.json and tensors of the base, the adapter, and its changes. Raises CheckpointError unless they fit."""
    for folder in (base, adapter):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
    if output is not None:
        refuse_existing(output, base, adapter)
    config = _read_config(base)
    stored, added = StoredTensors(base), Adapter(adapter)
    specs = {name: stored.spec(name) for name in stored}
    strange = next((name for name, spec in specs.items() if not spec.dtype.is_floating_point), None)
    if config.get("quantization_config") or strange is not None:
        raise CheckpointError(f"{base}: a quantised base; merge into the weights in bf16, fp16 or fp32")
    changes = added.changes(specs)
    _refuse_other_base(base, adapter, stored, added)
    return config, stored, added, changes


def _merged(name: str, base: StoredTensors, adapter: Adapter, change: Change | None, dtype: torch.dtype) -> Tensor:
    """A tensor of the merged model, rounded to `dtype`."""
    if change is None:
        return _rounded(name, base[name], dtype)
    if change.b is None:
        return _rounded(name, adapter.tensors[change.a], dtype)
    if change.expert is not None and change.expert[0] == -1:
        experts = [
            _rounded(name, _sum(base.rows(name, expert, expert + 1)[0], adapter, change, expert), dtype)
            for expert in range(change.expert[1])
        ]
        return torch.stack(experts)
    return _rounded(name, _sum(base[name], adapter, change), dtype)


def _sum(weight: Tensor, adapter: Adapter, change: Change, expert: int | None = None) -> Tensor:
    a, b = adapter.factors(change, expert)
    product = b @ a
    return weight.float() + (product.T if change.is_embedding else product) * change.scaling


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    if not bool(rounded.isfinite().all()):
        hint = "; choose bf16 or fp32" if dtype == torch.float16 and bool(tensor.isfinite().all()) else ""
        raise CheckpointError(f"{name}: has values that are not finite numbers in {str(dtype)[6:]}{hint}")
    return rounded


def _refuse_other_base(base: Path, adapter: Path, stored: StoredTensors, added: Adapter) -> None:
    """Raise CheckpointError if what the adapter's folder keeps of its base is not what `base` has."""
    for copy, name in added.copies().items():
        if not torch.equal(added.tensors[copy].float(), stored[name].float()):
            raise CheckpointError(f"{adapter}: of another base: its copy of {name} differs from that in {base}")
    path = adapter / BASE_RECORD
    if not path.is_file():
        return
    try:
        digests = dict(json.loads(path.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}") from None
    for name, digest in digests.items():
        if Path(name).name != name or not (base / name).is_file() or sha256_of(base / name) != digest:
            raise CheckpointError(f"{adapter}: of another base: the sha256 of {name} in {path} is not that in {base}")


def _dtype_of(specs: dict[str, TensorSpec]) -> str:
    """The format of most of the base's weights."""
    sizes = dict.fromkeys(MERGED_DTYPES, 0)
    names = {dtype: name for name, dtype in MERGED_DTYPES.items()}
    for spec in specs.values():
        sizes[names.get(spec.dtype, "fp32")] += spec.nbytes
    return max(sizes, key=sizes.__getitem__)


def _copy_others(base: Path, new: Path) -> list[str]:
    """Copy everything but weights. Returns the names of what is left out because it is not true any more."""
    untrue = {"certificate.json", RECORD}
    if (base / "certificate.json").is_file():
        untrue.add("README.md")  # an export's: it states how closely these weights agree with the training model
    left_out = []
    for path in sorted(base.rglob("*")):
        inside = path.relative_to(base)
        if (
            path.is_dir()
            or path.suffix in NOT_COPIED
            or path.name == INDEX
            or any(p.startswith(".") for p in inside.parts)
        ):
            continue
        if str(inside) in untrue:
            left_out.append(str(inside))
            continue
        (new / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, new / inside)
    return left_out


def _record(base: Path, adapter: Path, changed: int, dtype: str) -> dict[str, Any]:
    return {
        "base": str(base.resolve()),
        "adapter": str(adapter.resolve()),
        "adapter_sha256": {name: sha256_of(adapter / name) for name in (CONFIG, WEIGHTS)},
        "tensors_changed": changed,
        "dtype": dtype,
    }


def _read_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; give a Hugging Face model folder") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
