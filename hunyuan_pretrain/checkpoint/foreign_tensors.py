"""The weights of a Hugging Face folder under the names of `weight_map`, however the folder names, fuses or quantises
them; each is read when it is asked for.

What is understood besides one tensor for each name:
    self_attn.qkv_proj           of Tencent's releases: for each key/value head its query heads, its key and its value
    gate_and_up_proj             of Tencent's releases: the rows of up_proj, then those of gate_proj
    experts.gate_up_proj         of transformers' hunyuan_v1_moe: (E, 2 Fe, D), gate first; and experts.down_proj
                                 (E, D, Fe)
    weight in float8_e4m3fn      times weight_scale: one number, or one for each row (compressed-tensors
                                 float-quantized, and vLLM's fp8). De-quantised in fp32

Shape letters as in weight_map: D hidden size, G key/value heads, H head dimension, F and Fe SwiGLU width of the shared
and of a routed expert, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors
from hunyuan_pretrain.checkpoint.weight_map import Shape, refuse_other_tensors, weight_map
from hunyuan_pretrain.config.schema import ModelConfig

__all__ = ["ForeignTensors", "refuse_unknown_quantization"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
SCALE = "weight_scale"
ACTIVATION_SCALES = ("input_scale", "k_scale", "v_scale", "q_scale", "kv_scale", "output_scale")
"""Of an FP8 release: of no use in training."""
COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tensors that loaders compute themselves; some programs store them."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class _Source(NamedTuple):
    """Where a weight is stored: rows begin to end of a stored tensor, and what of these."""

    stored: str
    shape: Shape
    """That the whole stored tensor must have."""
    begin: int
    end: int
    pick: Callable[[Tensor], Tensor] = lambda rows: rows


class ForeignTensors(Mapping[str, Tensor]):
    """Hugging Face name -> tensor, for every name of `weight_map(model)`. A de-quantised tensor is fp32."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Reads the headers of all shards, and the scales of an FP8 release. Raises CheckpointError, before any weight
        is read: a damaged shard; a tensor that is missing, unknown or of another shape; a number format that is not
        understood."""
        self.files = StoredTensors(folder)
        self.notes: list[str] = []
        """What was left out, for the user."""
        self._scales = self._read_scales()
        shapes = {
            name: shape for row in weight_map(model) for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
        }
        found = {name: self._find(name, shape, model) for name, shape in shapes.items()}
        self._sources = {name: source for name, source in found.items() if source is not None}
        used = {source.stored for source in self._sources.values()}
        extra = self.files.keys() - used - {f"{name.removesuffix('weight')}{SCALE}" for name in self._scales}
        extra = self._without_ignored(extra, model)
        refuse_other_tensors(model, self._sources.keys() | extra, f"{folder}: its tensors")
        self._refuse_other_shapes_and_formats()

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError, CheckpointError."""
        source = self._sources[name]
        rows = self.files.rows(source.stored, source.begin, source.end)
        if source.stored in self._scales:
            scale = self._scales[source.stored]
            rows = rows.float() * (scale if scale.numel() == 1 else scale[source.begin : source.end])
        return source.pick(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def stored_names(self) -> set[str]:
        """The names in the folder that weights come from."""
        return {source.stored for source in self._sources.values()}

    def stored_dtype(self, name: str) -> torch.dtype:
        """Number format of a weight in the folder."""
        return self.files.spec(self._sources[name].stored).dtype

    def _find(self, name: str, shape: Shape, model: ModelConfig) -> _Source | None:
        for source in _candidates(name, shape, model):
            if source.stored in self.files:
                return source
        return None

    def _read_scales(self) -> dict[str, Tensor]:
        """Stored FP8 weight -> its scale: one number, or (rows, 1)."""
        scales = {}
        for name in self.files:
            if self.files.spec(name).dtype != FP8:
                continue
            where = f"{name.removesuffix('weight')}{SCALE}" if name.endswith(".weight") else ""
            if where not in self.files:
                raise CheckpointError(
                    f"{self.files.folder}: {name} is {FP8}, and there is no {SCALE} for it; other forms of FP8, such "
                    "as scales of blocks, are not understood"
                )
            rows, scale = self.files.spec(name).shape[0], self.files[where]
            if tuple(scale.shape) not in ((), (1,), (rows,), (rows, 1)) or scale.dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.files.folder}: {where} is {scale.dtype} {tuple(scale.shape)}; one scale for the tensor or "
                    f"one for each of its {rows} rows is understood"
                )
            scale = scale.float()
            if not bool((scale > 0).all() and scale.isfinite().all()):
                raise CheckpointError(f"{self.files.folder}: {where}: a scale is zero, negative or not finite")
            scales[name] = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
        return scales

    def _without_ignored(self, extra: set[str], model: ModelConfig) -> set[str]:
        """The unused tensors that are not known to be superfluous. Raises CheckpointError if an output layer that
        config.json ties to the embedding differs from it."""
        computed = {name for name in extra if COMPUTED.search(name)}
        activation = {name for name in extra if name.rpartition(".")[2] in ACTIVATION_SCALES} if self._scales else set()
        tied = {HEAD} & extra if model.share_embeddings_and_output_weights and EMBEDDING in self.files else set()
        if tied and not _is_equal(self.files, HEAD, EMBEDDING):
            raise CheckpointError(
                f"{self.files.folder}: {HEAD} differs from {EMBEDDING}, to which config.json ties it "
                "(tie_word_embeddings); correct one of them"
            )
        for names, what in ((computed, "computed by every loader"), (activation, "scales of activations, of no use")):
            if names:
                self.notes.append(f"{len(names)} tensors {what}, such as {min(names)}")
        if tied:
            self.notes.append(f"{HEAD}, a copy of {EMBEDDING}")
        return extra - computed - activation - tied

    def _refuse_other_shapes_and_formats(self) -> None:
        problems = []
        for source in {source.stored: source for source in self._sources.values()}.values():
            spec = self.files.spec(source.stored)
            if spec.shape != source.shape:
                problems.append(f"{source.stored}: shape {spec.shape}, but config.json gives {source.shape}")
            elif spec.dtype not in FLOATS and source.stored not in self._scales:
                problems.append(f"{source.stored}: {spec.dtype}, which is not a number format of weights")
        if problems:
            more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise CheckpointError(
                f"{self.files.folder}: its tensors do not fit config.json:\n  " + "\n  ".join(problems[:10] + more)
            )


def refuse_unknown_quantization(folder: Path, config: dict[str, Any] | None) -> None:
    """Raise CheckpointError for a `quantization_config` other than FP8 weights with a scale for each tensor or row."""
    if not config:
        return
    try:
        _check_quantization(folder, config)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder}: quantization_config is not as any known program writes it: {error}") from None


def _check_quantization(folder: Path, config: dict[str, Any]) -> None:
    method = config.get("quant_method")
    if method == "fp8":
        if config.get("weight_block_size"):
            raise CheckpointError(f"{folder}: quantization_config.weight_block_size: scales of blocks are not read")
        return
    if method != "compressed-tensors" or config.get("format") not in ("float-quantized", "naive-quantized"):
        raise CheckpointError(
            f"{folder}: quantization_config: quant_method {method!r}, format {config.get('format')!r}; only FP8 is "
            "read: compressed-tensors float-quantized, and fp8"
        )
    for name, group in config.get("config_groups", {}).items():
        weights = group.get("weights") or {}
        kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
        if kind not in ((8, "float", "tensor"), (8, "float", "channel")) or not weights.get("symmetric", True):
            raise CheckpointError(
                f"{folder}: quantization_config.config_groups.{name}: weights of {kind[0]} bits, type {kind[1]!r}, "
                f"strategy {kind[2]!r}; only symmetric 8-bit floats with strategy tensor or channel are read"
            )


def _candidates(name: str, shape: Shape, model: ModelConfig) -> Iterator[_Source]:
    """Where a weight may be stored, the usual place first."""
    yield _Source(name, shape, 0, shape[0])
    prefix, _, kind = name.removesuffix(".weight").rpartition(".")
    kind = kind.removesuffix("_proj")
    if kind in ("q", "k", "v"):
        yield _fused_attention(f"{prefix}.qkv_proj.weight", "qkv".index(kind), model)
    elif kind in ("gate", "up"):
        rows, columns = shape
        first = rows if kind == "gate" else 0
        yield _Source(f"{prefix}.gate_and_up_proj.weight", (2 * rows, columns), first, first + rows)
    if match := re.fullmatch(r"(.*\.experts)\.(\d+)", prefix):
        yield _fused_expert(match[1], int(match[2]), kind, shape, model)


def _fused_attention(stored: str, part: int, model: ModelConfig) -> _Source:
    G, H, D = model.num_query_groups, model.head_dim, model.hidden_size
    queries = model.num_attention_heads // G
    heads = (slice(queries), slice(queries, -1), slice(-1, None))[part]

    def pick(rows: Tensor) -> Tensor:
        return rows.view(G, queries + 2, H, D)[:, heads].reshape(-1, D)

    rows = G * (queries + 2) * H
    return _Source(stored, (rows, D), 0, rows, pick)


def _fused_expert(prefix: str, expert: int, kind: str, shape: Shape, model: ModelConfig) -> _Source:
    E = model.num_moe_experts
    if kind == "down":
        return _Source(f"{prefix}.down_proj", (E, *shape), expert, expert + 1, lambda rows: rows[0])
    width, columns = shape
    first = width if kind == "up" else 0
    return _Source(
        f"{prefix}.gate_up_proj",
        (E, 2 * width, columns),
        expert,
        expert + 1,
        lambda rows: rows[0, first : first + width],
    )


def _is_equal(files: StoredTensors, one: str, other: str) -> bool:
    """Whether two stored matrices have the same values; compared in parts."""
    specs = files.spec(one), files.spec(other)
    if specs[0] != specs[1]:
        return False
    rows, step = specs[0].shape[0], 8192
    return all(
        torch.equal(files.rows(one, begin, end), files.rows(other, begin, end))
        for begin, end in ((begin, min(begin + step, rows)) for begin in range(0, rows, step))
    )
