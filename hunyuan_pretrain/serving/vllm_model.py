"""Hunyuan-Large for vLLM, with one key/value cache per CLA group.

Only the layers that own keys and values have a cache: a borrowing layer names its owner's (kv_sharing_target_layer_name
of vLLM's Attention). `attention_inputs` says why one cache is enough although every layer has its own key norm. The
router runs in fp32 whatever the dtype of the model. Linear layers, experts, attention, quantisation and tensor, expert
and pipeline parallelism are vLLM's. Needs vLLM 0.28 or newer; docs/guide/serving.md lists the versions that were run.

T tokens, D hidden size, N query heads, G key/value heads, H head width. Heads are those of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from hunyuan_pretrain.checkpoint.configuration_hunyuan import HunYuanConfig
from hunyuan_pretrain.serving import attention_inputs
from hunyuan_pretrain.serving.vllm_weights import load_weights

try:
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
except ImportError as error:
    from vllm import __version__ as vllm_version

    raise ImportError(f"hunyuan_pretrain.serving needs vLLM 0.28 or newer; this is {vllm_version}") from error

KeysValues = tuple[Tensor, Tensor]
"""k_hat and v of a CLA group's new tokens, (T, G, H) and (T, G*H)."""


class NormWeight(nn.Module):
    """The weight (H,) of a head norm. `attention_inputs` applies it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)


class HunYuanAttention(nn.Module):
    """Causal grouped-query attention. An owner projects and caches keys and values for its group."""

    def __init__(self, config: HunYuanConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        tp_size = get_tensor_model_parallel_world_size()
        hidden_size, num_heads, num_groups = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim, self.eps, self.use_qk_norm = config.head_dim, config.rms_norm_eps, config.use_qk_norm
        self.num_heads, self.num_groups = num_heads // tp_size, max(1, num_groups // tp_size)
        owner = layer - layer % config.kv_share_factor
        self.is_owner = layer == owner
        if self.is_owner:
            self.qkv_proj = QKVParallelLinear(
                hidden_size,
                self.head_dim,
                num_heads,
                num_groups,
                bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
        else:
            self.q_proj = ColumnParallelLinear(
                hidden_size,
                num_heads * self.head_dim,
                bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.q_proj",
            )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        if self.use_qk_norm:
            self.query_layernorm, self.key_layernorm = NormWeight(self.head_dim), NormWeight(self.head_dim)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_groups,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=None
            if self.is_owner
            else f"{prefix}.attn".replace(f"layers.{layer}.", f"layers.{owner}."),
        )

    def forward(
        self, x_TD: Tensor, owner_kv: KeysValues | None, rope: attention_inputs.Rope
    ) -> tuple[Tensor, KeysValues]:
        """owner_kv: of the group's owner, which ignores it itself. Returns the output (T, D) and the group's keys and
        values."""
        if self.is_owner:
            sizes = [self.num_heads * self.head_dim, *[self.num_groups * self.head_dim] * 2]
            q, k, v = self.qkv_proj(x_TD)[0].split(sizes, dim=-1)
            k_TGH = k.reshape(-1, self.num_groups, self.head_dim)
            owner_kv = attention_inputs.key(k_TGH, rope, self.use_qk_norm, self.eps), v
        else:
            q = self.q_proj(x_TD)[0]
        assert owner_kv is not None
        weights = (self.query_layernorm.weight, self.key_layernorm.weight) if self.use_qk_norm else None
        q_TNH = attention_inputs.query(q.reshape(-1, self.num_heads, self.head_dim), rope, weights, self.eps)
        k_hat, v = owner_kv
        # A borrower hands over its owner's new keys and values too: vLLM reads those in the cache, and writes nothing.
        context = self.attn(q_TNH.flatten(1), k_hat.flatten(1), v)
        return self.o_proj(context)[0], owner_kv


class HunYuanMLP(nn.Module):
    """SwiGLU of the shared expert, (T, D) -> (T, D). The MoE layer adds its output to the routed experts' before it
    sums over tensor-parallel ranks."""

    def __init__(self, config: HunYuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            reduce_results=False,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMul()

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x_TD)[0]))[0]


class HunYuanMoE(nn.Module):
    """Shared expert plus the routed experts of each token, (T, D) -> (T, D). Top-1: weighted by the router's
    probability; top-k: by the probabilities renormalised to sum to 1. No token is dropped."""

    def __init__(self, config: HunYuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=f"{prefix}.gate",
        )
        self.shared_mlp = HunYuanMLP(config, vllm_config, f"{prefix}.shared_mlp")
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.moe_topk,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.moe_topk > 1,
            router_logits_dtype=torch.float32,
            shared_experts=self.shared_mlp,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.experts(hidden_states=x_TD, router_logits=self.gate(x_TD.float())[0])


class HunYuanDecoderLayer(nn.Module):
    """x += attention(norm(x)); x += experts(norm(x)). The second operand of each addition is carried along as vLLM's
    norms want it: `residual` is x without the last output."""

    def __init__(self, config: HunYuanConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = HunYuanAttention(config, layer, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = HunYuanMoE(config, vllm_config, f"{prefix}.mlp")

    def forward(
        self, x_TD: Tensor, residual: Tensor | None, owner_kv: KeysValues | None, rope: attention_inputs.Rope
    ) -> tuple[Tensor, Tensor, KeysValues]:
        if residual is None:
            residual, x_TD = x_TD, self.input_layernorm(x_TD)
        else:
            x_TD, residual = self.input_layernorm(x_TD, residual)
        x_TD, owner_kv = self.self_attn(x_TD, owner_kv, rope)
        x_TD, residual = self.post_attention_layernorm(x_TD, residual)
        return self.mlp(x_TD), residual, owner_kv


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class HunYuanModel(nn.Module):
    """Embedding, the decoder layers of this pipeline stage and the final norm."""

    inv_freq: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: HunYuanConfig = vllm_config.model_config.hf_config
        _refuse_what_would_be_wrong(config, vllm_config)
        first_or_last = get_pp_group().is_first_rank or (config.tie_word_embeddings and get_pp_group().is_last_rank)
        self.embed_tokens = (
            VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
            if first_or_last
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: HunYuanDecoderLayer(config, int(prefix.rsplit(".", 1)[-1]), vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        is_last = get_pp_group().is_last_rank
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if is_last else PPMissingLayer()
        frequencies = attention_inputs.inverse_frequencies(config.head_dim, config.rope_base)
        self.register_buffer("inv_freq", frequencies.to(torch.get_default_device()), persistent=False)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Token ids (T,), or embeddings (T, D), or the previous stage's output -> hidden states (T, D)."""
        residual: Tensor | None = None
        if get_pp_group().is_first_rank:
            x_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None
            x_TD, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        rope = attention_inputs.rope_of(positions, self.inv_freq)
        owner_kv: KeysValues | None = None
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_TD, residual, owner_kv = layer(x_TD, residual, owner_kv, rope)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_TD, "residual": residual})
        return self.norm(x_TD, residual)[0]


class HunYuanForCausalLM(nn.Module, SupportsPP):
    """HunYuanModel plus the output layer, which may be tied to the embedding."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: HunYuanConfig = vllm_config.model_config.hf_config
        self.has_cache_scales = getattr(vllm_config.quant_config, "kv_cache_scheme", None) is not None
        self.model = HunYuanModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size,
                self.config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if self.config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], self.config.hidden_size
        )
        never = _suppressed_tokens(vllm_config.model_config)
        never_emitted = torch.tensor(never, dtype=torch.long, device=torch.get_default_device())
        self.register_buffer("never_emitted", never_emitted, persistent=False)
        self.is_loaded = False

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits (T, V), -inf for `_suppressed_tokens`; None where another rank collects the logits."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else logits.index_fill_(-1, self.never_emitted, -torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See `load_weights` of vllm_weights.py. The first call must bring the whole checkpoint; a later one may update
        a part."""
        loaded = load_weights(
            self,
            self.config,
            weights,
            is_elsewhere=lambda name: is_pp_missing_parameter(name, self),
            has_cache_scales=self.has_cache_scales,
            allow_part=self.is_loaded,
        )
        self.is_loaded = True
        return loaded


def _suppressed_tokens(model_config: ModelConfig) -> list[int]:
    """Ids that generate() of transformers never returns, from the model's generation_config.json: embedding rows that
    only pad the vocabulary. vLLM does not read them, and its --generation-config may name another file."""
    try:
        config = GenerationConfig.from_pretrained(model_config.model, revision=model_config.revision)
    except OSError:  # there is none
        return []
    return config.suppress_tokens or []


def _refuse_what_would_be_wrong(config: HunYuanConfig, vllm_config: VllmConfig) -> None:
    """Raise ValueError for settings of vLLM with which a borrowing layer would read something else than its owner's
    cache."""
    factor, group = config.kv_share_factor, get_pp_group()
    start, _ = get_pp_indices(config.num_hidden_layers, group.rank_in_group, group.world_size)
    if start % factor:
        raise ValueError(
            f"pipeline stage {group.rank_in_group} of {group.world_size} begins at layer {start}, in the middle of a "
            f"CLA group: each stage must begin at a multiple of {factor}; set VLLM_PP_LAYER_PARTITION to multiples of "
            f"{factor} that add up to {config.num_hidden_layers}"
        )
    if factor == 1:
        return
    cache: Any = vllm_config.cache_config
    for option, flag in (
        ("kv_sharing_fast_prefill", "--kv-sharing-fast-prefill"),
        ("kv_cache_dtype_skip_layers", "--kv-cache-dtype-skip-layers"),
    ):
        if getattr(cache, option, None):
            raise ValueError(f"{flag} cannot be used with CLA: a borrowing layer reads its owner's cache; leave it out")
