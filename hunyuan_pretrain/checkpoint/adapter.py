"""A LoRA adapter as PEFT saves it: what it adds to which tensor of its base.

PEFT names a tensor by the module that it belongs to: base_model.model.MODULE.lora_A.weight (r, in) and lora_B.weight
(out, r). The weight of MODULE gains scaling * B @ A, where scaling is lora_alpha / r, or lora_alpha / sqrt(r) with
use_rslora. rank_pattern and alpha_pattern give other values to modules whose names end in a pattern.

With target_parameters, PEFT adapts the fused experts of transformers' hunyuan_v1_moe, gate_up_proj (E, 2 F, D) and
down_proj (E, D, F). Both belong to the module `experts`: the adapter of the first in that order lies inside the other
one's (experts.base_layer.lora_A). A is (E * r, in) with the expert as its slowest index, B (out, r * E) with the expert
as its fastest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.checkpoint.tensor_files import StoredTensors, TensorSpec

__all__ = ["CERTIFICATE", "CONFIG", "WEIGHTS", "Adapter", "Change", "system_prompt_of_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CERTIFICATE = "certificate.json"
"""Only of this project's own adapters."""
PREFIX = "base_model.model."
FUSED = ("gate_up_proj", "down_proj")
"""Parameters of the module `experts`, in the order in which PEFT wraps them."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

NOTHING: tuple[Any, ...] = (None, False, {}, [], "")
UNDERSTOOD = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save",
}  # fmt: skip
IRRELEVANT = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type",
    "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
"""Of training, or said by the tensors themselves."""
KINDS = {"rank_pattern": dict, "alpha_pattern": dict, "target_parameters": list, "modules_to_save": list}
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # the others change the base before training
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}


class Change(NamedTuple):
    """What happens to one tensor of the base."""

    a: str
    """Name in the adapter of A, or of the tensor that replaces the base's."""
    b: str | None = None
    """Name of B; None: replaced."""
    scaling: float = 1.0
    is_embedding: bool = False
    """The base holds the transpose."""
    expert: tuple[int, int] | None = None
    """(number, count): one expert of a fused adapter. (-1, count): all of them, the base's tensor is fused too."""
    rows: tuple[int, int] | None = None
    """The rows of the product that the base's tensor has."""


class Adapter:
    """An adapter folder. `changes` finds its place in a base."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError: no adapter, a kind that is not understood, a damaged file."""
        self.folder = folder
        self.config = _read_config(folder)
        if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{folder}: adapter_model.bin is a pickle, which could run code; save it as safetensors"
            )
        self.tensors = StoredTensors(folder, WEIGHTS)

    def factors(self, change: Change, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a change, in fp32; of one expert for a fused adapter."""
        assert change.b is not None
        if change.expert is None:
            a, b = self.tensors[change.a], self.tensors[change.b]
        else:
            number, count = change.expert
            number = number if expert is None else expert
            rank = self.tensors.spec(change.a).shape[0] // count
            a = self.tensors.rows(change.a, number * rank, (number + 1) * rank)
            b = self.tensors[change.b].unflatten(1, (rank, count))[:, :, number]
        a, b = a.float(), b.float()
        if change.rows is not None:
            b = b[slice(*change.rows)]
        return a, b

    def changes(self, base: Mapping[str, TensorSpec]) -> dict[str, Change]:
        """Name of a tensor of the base -> its change. base: all its tensors. Raises CheckpointError unless every tensor
        of the adapter has its place and the right shape."""
        found: dict[str, Change] = {}
        problems: list[str] = []
        used: set[str] = set()
        for name in self.tensors:
            if name in used:
                continue
            try:
                for target, change in self._place(name, base):
                    if target in found:
                        raise CheckpointError(f"{name}: {target} is changed twice")
                    found[target] = change
                    used |= {change.a} | ({change.b} if change.b else set())
                used.add(name)
            except CheckpointError as error:
                problems.append(str(error))
        if not problems and not found:
            problems.append("it has no tensors")
        if problems:
            more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise CheckpointError(
                f"{self.folder}: an adapter of another base, or not understood:\n  " + "\n  ".join(problems[:10] + more)
            )
        return found

    def _place(self, name: str, base: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Change]]:
        """Where a tensor of the adapter, with its partner, belongs."""
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{name}: does not begin with {PREFIX}")
        inner = name.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", inner):
            yield from self._low_rank(match[1], name, base)
        elif match := re.fullmatch(r"(.+)\.lora_embedding_([AB])", inner):
            yield self._embedding(match[1], name, base)
        elif match := re.fullmatch(r"(.+)\.base_layer\.weight", inner):
            self._check_copy(name, f"{match[1]}.weight", base)
        elif inner.rpartition(".")[0].rpartition(".")[2] in (self.config.get("modules_to_save") or ()):
            yield self._replacement(inner, name, base)
        else:
            raise CheckpointError(f"{name}: neither lora_A, lora_B nor a module of modules_to_save")

    def _low_rank(self, module: str, name: str, base: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Change]]:
        a, b = (f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB")
        self._refuse_alone(name, a, b)
        target = f"{module}.weight"
        if target in base:
            self._refuse_tied(target, base)
            self._refuse_shape(a, b, module, base[target].shape)
            yield target, Change(a, b, self._scaling(module))
            return
        if re.fullmatch(r".*\.mlp\.experts(\.base_layer)*", module) and self.config.get("target_parameters"):
            yield from self._fused(module, a, b, base)
            return
        if target == HEAD and EMBEDDING in base:
            self._refuse_tied(target, base)
        raise CheckpointError(f"{name}: the base has no {target}")

    def _fused(self, module: str, a: str, b: str, base: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Change]]:
        prefix = module.partition(".base_layer")[0]
        depth = module.count(".base_layer")
        targets = [name for name in FUSED if self._targets(f"{prefix}.{name}")]
        if depth >= len(targets):
            raise CheckpointError(f"{a}: target_parameters of {CONFIG} does not name a parameter of {prefix} for it")
        kind = targets[-1 - depth]
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
        scaling = self._scaling(f"{prefix}.{kind}")
        if (fused := base.get(f"{prefix}.{kind}")) is not None:
            experts, out, width = fused.shape
            self._refuse_shape(a, b, f"{prefix}.{kind}", (out, width), experts)
            yield f"{prefix}.{kind}", Change(a, b, scaling, expert=(-1, experts))
            return
        experts = 0
        while f"{prefix}.{experts}.{names[0]}.weight" in base:
            experts += 1
        if experts == 0:
            raise CheckpointError(f"{a}: the base has neither {prefix}.{kind} nor {prefix}.0.{names[0]}.weight")
        height, width = base[f"{prefix}.0.{names[0]}.weight"].shape
        self._refuse_shape(a, b, f"{prefix}.{kind}", (height * len(names), width), experts)
        for expert in range(experts):
            for half, part in enumerate(names):
                rows = (half * height, (half + 1) * height)
                yield f"{prefix}.{expert}.{part}.weight", Change(a, b, scaling, expert=(expert, experts), rows=rows)

    def _embedding(self, module: str, name: str, base: Mapping[str, TensorSpec]) -> tuple[str, Change]:
        a, b = (f"{PREFIX}{module}.lora_embedding_{letter}" for letter in "AB")
        self._refuse_alone(name, a, b)
        target = f"{module}.weight"
        if target not in base:
            raise CheckpointError(f"{name}: the base has no {target}")
        self._refuse_tied(target, base)
        rows, width = base[target].shape
        self._refuse_shape(a, b, module, (width, rows))
        return target, Change(a, b, self._scaling(module), is_embedding=True)

    def _replacement(self, target: str, name: str, base: Mapping[str, TensorSpec]) -> tuple[str, Change]:
        self._refuse_tied(target, base)
        if target not in base:
            raise CheckpointError(f"{name}: the base has no {target}")
        if self.tensors.spec(name).shape != base[target].shape:
            raise CheckpointError(
                f"{name}: shape {self.tensors.spec(name).shape}, but the base's {target} has {base[target].shape}"
            )
        return target, Change(name)

    def _check_copy(self, name: str, target: str, base: Mapping[str, TensorSpec]) -> None:
        """PEFT stores a copy of the base's embedding beside its adapter. lora_merge compares it."""
        if target not in base or self.tensors.spec(name).shape != base[target].shape:
            raise CheckpointError(f"{name}: a copy of {target}, which the base does not have in this shape")

    def copies(self) -> dict[str, str]:
        """Tensors of the adapter that are copies of tensors of its base -> these."""
        end = ".base_layer.weight"
        return {
            name: name.removeprefix(PREFIX).removesuffix(end) + ".weight" for name in self.tensors if name.endswith(end)
        }

    def _refuse_alone(self, name: str, a: str, b: str) -> None:
        for partner in (a, b):
            if partner not in self.tensors:
                raise CheckpointError(f"{name}: its partner {partner} is missing")

    def _refuse_shape(self, a: str, b: str, key: str, shape: tuple[int, ...], experts: int = 1) -> None:
        rank = self._rank(key) * experts
        wanted = ((rank, shape[1]), (shape[0], rank)) if len(shape) == 2 else ()
        given = tuple(self.tensors.spec(name).shape for name in (a, b))
        if given != wanted:
            raise CheckpointError(
                f"{a}: shapes {given[0]} and {given[1]} with r={self._rank(key)} do not fit {key}, {tuple(shape)}"
                + (f" for each of {experts} experts" if experts > 1 else "")
            )

    def _refuse_tied(self, target: str, base: Mapping[str, TensorSpec]) -> None:
        if target in (HEAD, EMBEDDING) and HEAD not in base:
            raise CheckpointError(
                f"{target} is at once embedding and output layer of the base (tie_word_embeddings), and the adapter "
                "changed one of them: no merged folder of this base's form computes that"
            )

    def _targets(self, key: str) -> bool:
        return any(key == name or key.endswith(f".{name}") for name in self.config["target_parameters"])

    def _rank(self, key: str) -> int:
        return int(_of_pattern(self.config.get("rank_pattern"), key, self.config["r"]))

    def _scaling(self, key: str) -> float:
        alpha, rank = _of_pattern(self.config.get("alpha_pattern"), key, self.config["lora_alpha"]), self._rank(key)
        return float(alpha / math.sqrt(rank)) if self.config.get("use_rslora") else float(alpha / rank)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; give a folder that PEFT saved") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    for name, kind in KINDS.items():
        if not isinstance(config.get(name) or kind(), kind):
            raise CheckpointError(f"{path}: {name}={config[name]!r}: a {kind.__name__} is expected")
    problems = [
        f"{name}={value!r}: " + (f"only {ONLY[name][0]!r} is understood" if name in ONLY else "not understood")
        for name, value in config.items()
        if not (name in UNDERSTOOD or name in IRRELEVANT or value in ONLY.get(name, NOTHING))
    ]
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        numbers = [config.get(name), *(config.get(pattern) or {}).values()]
        if any(isinstance(one, bool) or not isinstance(one, (int, float)) or one <= 0 for one in numbers):
            problems.append(f"{name}: positive numbers are expected, here and in {pattern}: {numbers}")
    others = [one for one in config.get("target_parameters") or () if one.rpartition(".")[2] not in FUSED]
    if others:
        problems.append(f"target_parameters {others}: only {' and '.join(FUSED)} of fused experts are understood")
    if "peft_type" not in config:
        problems.append("peft_type: missing")
    if problems:
        raise CheckpointError(f"{path}: cannot be merged:\n  " + "\n  ".join(problems))
    return config


def _of_pattern(pattern: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT finds it."""
    for end, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({end})$", key):
                return value
        except re.error as error:
            raise CheckpointError(f"{CONFIG}: {end!r} is not a pattern: {error}") from None
    return default


def system_prompt_of_adapter(folder: Path) -> str | None:
    """The system prompt of the conversations that an adapter was trained on; None if its folder records none. Raises
    CheckpointError."""
    path = folder / CERTIFICATE
    if not path.is_file():
        return None  # of another program
    try:
        prompt = json.loads(path.read_text(encoding="utf-8")).get("chat", {}).get("system_prompt")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}") from None
    return prompt if isinstance(prompt, str) else None
