"""Strict loading of a checkpoint into the vLLM model: every tensor of the checkpoint is used once, none is missing, all
have the shape that config.json implies. vLLM's own loaders accept an expert's tensor that is too small, and an expert
that is missing.

Which tensors there must be follows from the parameters that vLLM created, so quantised checkpoints need no table. This
file imports no vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig

STACKED: dict[str, dict[str, str | int]] = {
    ".qkv_proj.": {".q_proj.": "q", ".k_proj.": "k", ".v_proj.": "v"},
    ".gate_up_proj.": {".gate_proj.": 0, ".up_proj.": 1},
}
"""Name in vLLM -> the names in a checkpoint whose tensors it joins, with vLLM's name of each part."""

EXPERTS = re.compile(r"(?P<layer>.*\.mlp\.experts\.)(?:routed_experts\.)?(?P<which>w13|w2)_(?P<kind>.*)")
EXPERT_PARTS = {"w13": {"gate_proj": "w1", "up_proj": "w3"}, "w2": {"down_proj": "w2"}}
"""vLLM joins all experts of a layer, and of each expert gate and up."""

NEVER_STORED = re.compile(r".*(\.q_scale|\.prob_scale|_zero_point|g_idx|g_idx_sort_indices)")
"""Parameters that vLLM's quantisation methods create and fill themselves."""

CACHE_SCALES = (".k_scale", ".v_scale")
SHOWN = 10


class Target(NamedTuple):
    """Where a tensor of a checkpoint goes."""

    parameter: str
    part: str | int | None = None
    expert: int | None = None


def load_weights(
    model: nn.Module,
    config: HunYuanConfig,
    weights: Iterable[tuple[str, Tensor]],
    *,
    is_elsewhere: Callable[[str], bool],
    has_cache_scales: bool,
    allow_part: bool = False,
) -> set[str]:
    """Copy the checkpoint's tensors into the model, one at a time. Returns the names of the parameters that are filled.

    is_elsewhere: whether a tensor belongs to another pipeline stage. has_cache_scales: the checkpoint must bring scales
    of the key/value cache. allow_part: tensors may be missing, because the model is complete already.
    Raises ValueError with all problems.
    """
    parameters = dict(model.named_parameters())
    targets = {
        source: target
        for name in parameters
        if not _belongs_to_borrowed_cache(name, model)
        for source, target in sources_of(name, config.num_experts)
    }
    problems, seen = [], set()
    for name, tensor in weights:
        if is_elsewhere(name):
            continue
        if name not in targets:
            problem: str | None = f"{name}: not a tensor of this model"
        elif name in seen:
            problem = f"{name}: more than once"
        else:
            problem = shape_problem(name, tensor, config)
        if problem is None:
            _copy(parameters[targets[name].parameter], targets[name], tensor)
        else:
            problems.append(problem)
        seen.add(name)
    if not allow_part:
        absent = [name for name in targets if name not in seen]
        problems += [
            f"{name}: missing" for name in absent if not _may_be_absent(name, targets[name], model, has_cache_scales)
        ]
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n  ".join(problems[:SHOWN] + more)
        raise ValueError(f"the checkpoint does not fit its config.json, {len(problems)} problems:\n  {lines}")
    _share_cache_scales(model)
    return {targets[name].parameter for name in seen} if allow_part else set(parameters)


def sources_of(parameter: str, num_experts: int) -> Iterator[tuple[str, Target]]:
    """The tensors of a checkpoint that fill a parameter of the vLLM model."""
    if found := EXPERTS.fullmatch(parameter):
        for expert in range(num_experts):
            for name, part in EXPERT_PARTS[found["which"]].items():
                yield f"{found['layer']}{expert}.{name}.{found['kind']}", Target(parameter, part, expert)
        return
    for stacked, parts in STACKED.items():
        if stacked in parameter:
            for name in parts:
                yield parameter.replace(stacked, name), Target(parameter, parts[name])
            return
    name = parameter.replace(".mlp.gate.", ".mlp.gate.wg.").replace(".self_attn.attn.", ".self_attn.")
    yield name, Target(parameter)


def shape_problem(name: str, tensor: Tensor, config: HunYuanConfig) -> str | None:
    """What is wrong with the shape of a whole, unsharded tensor; None if nothing is, or if this file knows no rule."""
    module, _, kind = name.rpartition(".")
    shape, full = tuple(tensor.shape), full_shape(module, config)
    expected: Any = full
    if kind == "weight_shape":
        shape = tuple(tensor.tolist())
    elif kind == "weight_packed":  # int32, of four 8-bit or eight 4-bit numbers
        packed = [(full[0], -(-full[-1] // numbers)) for numbers in (4, 8)]
        expected = shape if shape in packed else f"{packed[0]} or {packed[1]}"
    elif kind == "weight_scale":  # of the whole tensor, or of each row
        expected = shape if tensor.numel() == 1 or shape[0] == full[0] else f"one scale, or {full[0]} rows"
    elif kind != "weight":
        return None
    return None if shape == expected else f"{name}: shape {shape}, but this model has {expected}"


def full_shape(module: str, config: HunYuanConfig) -> tuple[int, ...]:
    """Shape of the weight of a module of the checkpoint; the table with Megatron's names is in
    checkpoint/weight_map.py."""
    hidden = config.hidden_size
    width = config.moe_intermediate_size if ".experts." in module else config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "query_layernorm": (config.head_dim,),
        "key_layernorm": (config.head_dim,),
        "wg": (config.num_experts, hidden),
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    return shapes.get(module.rpartition(".")[2], (hidden,))  # the other norms


def _copy(parameter: nn.Parameter, target: Target, tensor: Tensor) -> None:
    load: Callable[..., Any] | None = getattr(parameter, "weight_loader", None)
    if load is None:
        parameter.data.copy_(tensor.reshape(parameter.shape))
    elif target.expert is not None:  # vLLM ignores another rank's expert
        load(parameter, tensor, target.parameter, shard_id=target.part, expert_id=target.expert)
    elif target.part is not None:
        load(parameter, tensor, target.part)
    else:
        load(parameter, tensor)


def _may_be_absent(name: str, target: Target, model: nn.Module, has_cache_scales: bool) -> bool:
    """Whether a checkpoint may lack a tensor: vLLM fills it itself, or it is another rank's."""
    if target.expert is not None:
        here = getattr(_module_of(target.parameter, model), "expert_map", None)
        # vLLM may read no expert from disk but this rank's.
        return NEVER_STORED.fullmatch(name) is not None or (here is not None and int(here[target.expert]) < 0)
    return NEVER_STORED.fullmatch(name) is not None or (name.endswith(CACHE_SCALES) and not has_cache_scales)


def _belongs_to_borrowed_cache(parameter: str, model: nn.Module) -> bool:
    """Whether a parameter is a scale of a cache in a layer that has none."""
    return ".self_attn.attn." in parameter and bool(_module_of(parameter, model).kv_sharing_target_layer_name)


def _share_cache_scales(model: nn.Module) -> None:
    """Give each borrowing layer the scales of its owner, whose quantised cache it reads."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "kv_sharing_target_layer_name")]
    layers = {module.layer_name: module for module in modules}
    for layer in layers.values():
        owner = layers.get(layer.kv_sharing_target_layer_name)
        for scale in ("k_scale", "v_scale"):
            if owner is not None and isinstance(getattr(layer, scale, None), Tensor):
                getattr(layer, scale).data.copy_(getattr(owner, scale).data)


def _module_of(parameter: str, model: nn.Module) -> Any:
    return model.get_submodule(parameter.rpartition(".")[0])
