"""Configuration of Hunyuan-Large for Hugging Face transformers.

Every export of format hunyuan contains a copy of this file and of modeling_hunyuan.py. They need torch and transformers
(5.0 to 5.24) and nothing else. Field names are those of Tencent's release
(https://huggingface.co/tencent/Tencent-Hunyuan-Large), so its config.json loads here. The release's code loads our
config.json only if it can build the model: routed experts as wide as the shared expert (moe_intermediate_size equal to
intermediate_size), heads of width hidden_size / num_attention_heads, and more than one expert. `loads_in` in an
export's certificate.json says whether it can.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class HunYuanConfig(PretrainedConfig):
    """Architecture of one model; the defaults are those of Hunyuan-Large as pretrained.

    Fields that need explaining:
        intermediate_size: SwiGLU width of the shared expert.
        moe_intermediate_size: SwiGLU width of each routed expert; None means intermediate_size.
        moe_topk: routed experts per token. With 1, the combine weight is the raw softmax probability; with more, the
            weights are renormalised to sum to 1.
        use_cla, cla_share_factor: layer i owns keys and values if i % cla_share_factor == 0; the layers up to the next
            owner reuse them.
        use_qk_norm: RMSNorm of each query and key head, after RoPE.
        rope_scaling: None, or {"type": "dynamic", "alpha": a, "factor": 1.0}. The RoPE base is then
            rope_theta * a^(d / (d - 2)) at every length, where d is the head dimension.
        capacity_factor, moe_drop_tokens, moe_random_routing_dropped_token: how the model was trained. Inference never
            drops tokens.

    Raises ValueError for a setting that modeling_hunyuan.py does not implement.
    """

    model_type = "hunyuan"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    # The base class makes rope_scaling a property that renames its keys; config.json must keep the release's form.
    rope_scaling = None

    def __init__(
        self,
        vocab_size: int = 128512,
        hidden_size: int = 6400,
        intermediate_size: int = 18304,
        moe_intermediate_size: int | None = None,
        num_hidden_layers: int = 64,
        num_attention_heads: int = 80,
        num_key_value_heads: int | None = 8,
        head_dim: int | None = None,
        num_experts: int = 16,
        num_shared_expert: int = 1,
        moe_topk: int = 1,
        use_mixed_mlp_moe: bool = True,
        use_cla: bool = True,
        cla_share_factor: int = 2,
        use_qk_norm: bool = True,
        capacity_factor: float | None = 1.0,
        moe_drop_tokens: bool = False,
        moe_random_routing_dropped_token: bool = True,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        tie_word_embeddings: bool = True,
        max_position_embeddings: int = 262144,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
        pretraining_tp: int = 1,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Later transformers versions write rope_parameters when they save this config again.
        rope_parameters = kwargs.pop("rope_parameters", None)
        if rope_parameters:
            rope_theta = rope_parameters.get("rope_theta", rope_theta)
            rope_scaling = rope_scaling or (rope_parameters if "alpha" in rope_parameters else None)

        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = (
            intermediate_size
            if moe_intermediate_size is None
            else _one_value(moe_intermediate_size, "moe_intermediate_size")
        )
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or kwargs.pop("attention_head_dim", None) or hidden_size // num_attention_heads
        self.num_experts = _one_value(num_experts, "num_experts")
        self.num_shared_expert = _one_value(num_shared_expert, "num_shared_expert")
        self.moe_topk = _one_value(moe_topk, "moe_topk")
        self.use_mixed_mlp_moe = use_mixed_mlp_moe
        self.use_cla = use_cla
        self.cla_share_factor = cla_share_factor
        self.use_qk_norm = use_qk_norm
        self.capacity_factor = capacity_factor
        self.moe_drop_tokens = moe_drop_tokens
        self.moe_random_routing_dropped_token = moe_random_routing_dropped_token
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.pretraining_tp = pretraining_tp
        self.use_cache = use_cache
        super().__init__(**kwargs)
        # Set after the base class, because some versions of it overwrite these with their own defaults.
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self._refuse_what_is_not_implemented()

    @property
    def kv_share_factor(self) -> int:
        """Consecutive layers that share one set of keys and values; 1 if every layer has its own."""
        return self.cla_share_factor if self.use_cla else 1

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """One entry per layer, for transformers' cache classes: a "reuse" layer gets no storage."""
        return ["reuse" if layer % self.kv_share_factor else None for layer in range(self.num_hidden_layers)]

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies, after the NTK-alpha scaling."""
        alpha = self.rope_scaling["alpha"] if self.rope_scaling else 1.0
        return float(self.rope_theta * alpha ** (self.head_dim / (self.head_dim - 2)))

    def _refuse_what_is_not_implemented(self) -> None:
        scaling = self.rope_scaling
        if scaling and (
            scaling.get("type", scaling.get("rope_type")) != "dynamic"
            or "alpha" not in scaling
            or scaling.get("factor", 1.0) != 1.0
        ):
            raise ValueError(
                f"rope_scaling={scaling}: only null or {{'type': 'dynamic', 'alpha': a, 'factor': 1.0}} is implemented"
            )
        for name, only in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("use_mixed_mlp_moe", True),
            ("num_shared_expert", 1),
        ):
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)!r}: only {only!r} is implemented")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if not 1 <= self.moe_topk <= self.num_experts:
            raise ValueError(f"moe_topk={self.moe_topk}: must be 1 to num_experts={self.num_experts}")


def _one_value(value: Any, name: str) -> Any:
    """The value itself, or the common value of a per-layer list, which some releases write. Raises ValueError if the
    values differ."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{name}={value}: different values for different layers are not implemented")
    return value[0]
