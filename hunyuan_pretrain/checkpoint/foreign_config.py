"""config.json of a Hugging Face folder as a model of this project, for `import`.

Every field that changes what the weights mean is carried over or refused by name; the notes say what was ignored.
Field names: Tencent's releases (Hunyuan-Large, Hunyuan-A13B) and transformers' hunyuan_v1_moe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from hunyuan_pretrain.checkpoint import CheckpointError
from hunyuan_pretrain.config.model_rules import MODEL_RULES
from hunyuan_pretrain.config.schema import ModelConfig

__all__ = ["ForeignModel", "read_config"]

NATIVE = "hunyuan_v1_moe"
ROPE_KEYS = {"type", "rope_type", "alpha", "factor", "rope_theta"}
UNUSED_ROPE_KEYS = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
"""Of other scalings; loaders do not read them when there is an alpha."""

MOST_EXPERTS = 1_000_000
"""Of all layers: a damaged number must not make a table that fills the memory."""

OFF = (False, None, 0)
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": OFF,
    "mlp_bias": OFF,
    "use_mixed_mlp_moe": (True,),
    "use_rotary_pos_emb": (True, None),
    "position_embedding_xdrope": OFF,
    "use_mla": OFF,
    "kv_lora_rank": OFF,
    "q_lora_rank": OFF,
    "qk_nope_head_dim": OFF,
    "qk_rope_head_dim": OFF,
    "v_head_dim": OFF,
    "group_limited_greedy": OFF,
    "n_group": (*OFF, 1),
    "topk_group": (*OFF, 1),
    "norm_topk_prob": (True, None),
    "routed_scaling_factor": (*OFF, 1),
    "moe_layer_num_skipped": OFF,
    "first_k_dense_replace": OFF,
    "sliding_window": OFF,
    "logit_scale": (1, None),
    "add_classification_head": OFF,
    "norm_type": ("rms", "hf_rms", None),  # others are LayerNorm
}
"""Fields that change the computation, and the only values for which it is this project's."""

CARRIED = {
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "attention_head_dim", "num_experts", "num_shared_expert",
    "moe_topk", "use_cla", "cla_share_factor", "use_qk_norm", "capacity_factor", "moe_drop_tokens",
    "moe_random_routing_dropped_token", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "max_position_embeddings", "initializer_range",
}  # fmt: skip
WITHOUT_MEANING = {
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "pretraining_tp", "_name_or_path", "quantization_config", "org_vocab_size", "attention_dropout",
}  # fmt: skip
"""Handled elsewhere, or of no effect on the weights."""


class ForeignModel(NamedTuple):
    """What config.json says."""

    model: ModelConfig
    rope_alpha: float
    max_position_embeddings: int
    model_type: str
    quantization: dict[str, Any] | None
    token_ids: dict[str, Any]
    """bos_token_id and the like."""
    notes: tuple[str, ...]
    """What is ignored or read in a way that a user should know."""


def read_config(folder: Path, tensor_names: Collection[str]) -> ForeignModel:
    """The model of a folder. tensor_names: of its stored tensors; they decide where a field is left out.

    Raises CheckpointError with all problems: not a Hunyuan model, a field that is missing, of the wrong type, or with a
    meaning that this project does not implement.
    """
    path = folder / "config.json"
    fields = _parse(path)
    problems: list[str] = []
    model_type = fields.get("model_type")
    if model_type not in ("hunyuan", NATIVE):
        raise CheckpointError(f"{path}: model_type {model_type!r} is not a model of this project: hunyuan or {NATIVE}")
    reader = _Reader(fields, problems)
    alpha, theta = _rope(fields, problems)
    values = _architecture(reader, set(tensor_names), str(model_type)) | {"rotary_base": theta}
    positions = reader.number("max_position_embeddings", needed=True)
    for name, allowed in ONLY.items():
        if name in fields and fields[name] not in allowed:
            problems.append(f"{name}={fields[name]!r}: this project computes it only as {allowed[0]!r}")
    if model_type == NATIVE and values["moe_router_topk"] == 1:
        problems.append(
            "moe_topk=1: transformers' hunyuan_v1_moe renormalises the weight of the only expert to 1, this project "
            "and the release (model_type hunyuan) use its probability"
        )
    model = None if problems else _checked(values, problems)
    if model is None:
        raise CheckpointError(f"{path}: cannot be imported, {len(problems)} problems:\n  " + "\n  ".join(problems))
    return ForeignModel(
        model,
        alpha,
        positions,
        str(model_type),
        fields.get("quantization_config"),
        {name: value for name, value in fields.items() if name.endswith("token_id") and value is not None},
        tuple(_notes(fields, model)),
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; give a Hugging Face model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return fields


class _Reader:
    """Reads fields and collects what is wrong with them."""

    def __init__(self, fields: dict[str, Any], problems: list[str]) -> None:
        self.fields, self.problems = fields, problems

    def get(self, name: str, default: Any = None, needed: bool = False) -> Any:
        """The field, or the common value of a per-layer list, which releases write for some fields."""
        value = self.fields.get(name)
        if isinstance(value, list):
            if len({json.dumps(one) for one in value}) != 1:
                self.problems.append(f"{name}={value}: a different value for each layer is not implemented")
                return default
            value = value[0]
        if value is None and needed:
            self.problems.append(f"{name}: missing")
        return default if value is None else value

    def number(self, name: str, default: int | None = None, needed: bool = False) -> int:
        """A positive integer; 1 where there is a problem."""
        value = self.get(name, default, needed)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            self.problems.append(f"{name}={value!r}: must be a positive integer")
            return 1
        return 1 if value is None else value


def _architecture(reader: _Reader, names: set[str], model_type: str) -> dict[str, Any]:
    number, get = reader.number, reader.get
    heads = number("num_attention_heads", needed=True)
    width = number("intermediate_size", needed=True)
    # the release's shared expert is one SwiGLU of this total width
    shared = width * number("num_shared_expert", 1)
    expert = number("moe_intermediate_size", width)
    head_dim = get("head_dim") or get("attention_head_dim")
    has_norms = any(name.endswith(".self_attn.query_layernorm.weight") for name in names)
    drops, recycles = bool(get("moe_drop_tokens", False)), bool(get("moe_random_routing_dropped_token", False))
    share = number("cla_share_factor", 1) if get("use_cla", False) else 1
    return {
        "num_layers": number("num_hidden_layers", needed=True),
        "hidden_size": number("hidden_size", needed=True),
        "num_attention_heads": heads,
        "num_query_groups": number("num_key_value_heads", heads),
        "kv_channels": head_dim,
        "ffn_hidden_size": shared,
        "moe_ffn_hidden_size": None if expert == shared else expert,
        "num_moe_experts": number("num_experts", needed=True),
        "moe_router_topk": number("moe_topk", 1),
        "moe_expert_capacity_factor": get("capacity_factor", 1.0) if drops or recycles else None,
        "recycle_routing": recycles,
        "cla_share_factor": share,
        "qk_layernorm": bool(get("use_qk_norm", has_norms or model_type == NATIVE)),
        "layernorm_epsilon": get("rms_norm_eps", 1e-5),
        "padded_vocab_size": number("vocab_size", needed=True),
        "share_embeddings_and_output_weights": bool(get("tie_word_embeddings", "lm_head.weight" not in names)),
        "init_method_std": get("initializer_range", 0.02),
    }


def _rope(fields: dict[str, Any], problems: list[str]) -> tuple[float, float]:
    """(alpha, base before alpha)."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = fields.get("rope_theta")
    if not isinstance(scaling, dict):
        problems.append(f"rope_scaling={scaling!r}: a JSON object is expected")
        return 1.0, 1e4
    theta = scaling.get("rope_theta", 1e4 if theta is None else theta)
    kind, alpha = scaling.get("rope_type", scaling.get("type", "default")), scaling.get("alpha", 1.0)
    is_plain = kind == "default" and alpha == 1.0
    is_ntk_alpha = kind == "dynamic" and "alpha" in scaling and scaling.get("factor") in (None, 1.0)
    unknown = sorted(scaling.keys() - ROPE_KEYS - UNUSED_ROPE_KEYS)
    if unknown or not (is_plain or is_ntk_alpha):
        problems.append(
            f"rope_scaling={scaling}: only null or {{'type': 'dynamic', 'alpha': a, 'factor': 1.0}} is implemented"
        )
    for name, value in (("alpha", alpha), ("rope_theta", theta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            problems.append(f"{name}={value!r} of the RoPE: must be a positive number")
            return 1.0, 1e4
    return float(alpha), float(theta)


def _checked(values: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    try:
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        problems += [f"model.{'.'.join(map(str, one['loc']))}={one['input']!r}: {one['msg']}" for one in error.errors()]
        return None
    rules: tuple[Callable[[ModelConfig], Any], ...] = MODEL_RULES
    problems += [str(problem) for rule in rules for problem in rule(model)]
    if (experts := model.num_layers * model.num_moe_experts) > MOST_EXPERTS:
        problems.append(f"num_hidden_layers x num_experts = {experts:,}: more than {MOST_EXPERTS:,}")
    return None if problems else model


def _notes(fields: dict[str, Any], model: ModelConfig) -> list[str]:
    notes = []
    if fields.get("attention_dropout"):
        notes.append(f"attention_dropout={fields['attention_dropout']}: this project trains without dropout")
    if model.moe_expert_capacity_factor is None:
        notes.append(
            "config.json limits no expert's capacity, so training would not either (moe_expert_capacity_factor: null). "
            "Hunyuan-Large was pretrained with a capacity and recycle routing: moe_expert_capacity_factor: 1.0, "
            "recycle_routing: true"
        )
    if not fields.get("rope_scaling") and not fields.get("rope_parameters") and fields["model_type"] == "hunyuan":
        notes.append(
            "without rope_scaling the release's code rounds RoPE's frequencies to bf16; this project does not, so "
            "logits differ slightly from the release's code"
        )
    known = CARRIED | WITHOUT_MEANING | ONLY.keys()
    others = [name for name, value in fields.items() if name not in known and not name.endswith(("token_id", "_id"))]
    shown = [f"{name}={json.dumps(fields[name])[:40]}" for name in sorted(others) if fields[name] not in OFF]
    if shown:
        notes.append(f"fields of config.json that this project does not know, ignored: {', '.join(shown)}")
    return notes
