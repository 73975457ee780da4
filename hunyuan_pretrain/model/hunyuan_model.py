"""The model: embedding -> CLA groups of layers -> final norm -> loss or logits.

Shapes: T tokens of this rank (all sequences of a micro-batch, one after the other), D hidden, V padded vocabulary, n routing
groups, L layers of this rank, X router statistics.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hunyuan_pretrain.config.schema import rope_base
from hunyuan_pretrain.model.attention import PackedSequences
from hunyuan_pretrain.model.cross_entropy import linear_cross_entropy
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.layer import TransformerLayer, run_cla_group
from hunyuan_pretrain.model.norm import RMSNorm, rope_table
from hunyuan_pretrain.model.router import RoutingKey
from hunyuan_pretrain.model.spec import Spec, local_spec


class Embedding(torch.nn.Module):
    """Token embedding, and the output weight where the two are tied."""

    def __init__(self, config: HunyuanConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            config.padded_vocab_size, config.hidden_size, init_method=config.init_method, config=config, tp_group=groups.tp
        )

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.word_embeddings(tokens_T)


class Decoder(torch.nn.Module):
    """The layers of this rank and the final norm."""

    def __init__(self, config: HunyuanConfig, spec: Spec, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(TransformerLayer(config, layer, spec, groups) for layer in range(config.num_layers))
        self.final_layernorm = RMSNorm(config, config.hidden_size)


class OutputLayer(torch.nn.Module):
    """Output weight (V, D) of a model that does not tie it to the embedding."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        shape = (config.padded_vocab_size, config.hidden_size)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=weight_device(config)))


class HunyuanModel(MegatronModule):
    """Hunyuan for pretraining. Weights are uninitialised until `initialize_weights` or a checkpoint writes them."""

    def __init__(self, config: HunyuanConfig, groups: ProcessGroupCollection, spec: Spec | None = None) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.groups = groups
        # read by core's schedules and gradient finalisation
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        self.embedding = Embedding(config, groups)
        self.decoder = Decoder(config, spec or local_spec(), groups)
        if not config.share_embeddings_and_output_weights:
            self.output_layer = OutputLayer(config)

    def set_input_tensor(self, input_tensor: object) -> None:
        """Called by core's schedules with the activations of the stage before; a model of one stage has none."""

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Weight of the output layer, (V, D)."""
        return self.embedding.word_embeddings.weight if self.share_embeddings_and_output_weights else self.output_layer.weight

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        borders: list[int],
        rope_alpha: float,
        label_T: Tensor | None = None,
        loss_weight_T: Tensor | None = None,
        key: RoutingKey | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss sum_t loss_weight_T[t] * cross_entropy[t], or logits (T, V) where no labels are given; and router statistics (L, X).

        borders: cu_seqlens of the documents as Python ints; positions restart at each. With `key` (training) experts
        have their capacity and the router its losses, without (evaluation) routing is dropless.
        """
        config = self.config
        table = rope_table(positions_T, rope_base(config.rotary_base, rope_alpha, config.kv_channels), config.kv_channels)
        packed = PackedSequences(table, borders)
        hidden_TD = self.embedding(tokens_T)
        statistics = []
        for start in range(0, len(self.decoder.layers), config.cla_share_factor):
            layers = cast("Sequence[TransformerLayer]", self.decoder.layers[start : start + config.cla_share_factor])
            hidden_TD, statistics_LX = run_cla_group(layers, hidden_TD, packed, key, config.recompute_cla_groups)
            statistics.append(statistics_LX)
        hidden_TD = self.decoder.final_layernorm(hidden_TD)
        weight_VD = self.shared_embedding_or_output_weight()
        if label_T is None:
            output = F.linear(hidden_TD, weight_VD).float()
        else:
            assert loss_weight_T is not None
            accumulate = (
                config.gradient_accumulation_fusion and config.share_embeddings_and_output_weights and hasattr(weight_VD, "main_grad")
            )
            output = linear_cross_entropy(hidden_TD, weight_VD, label_T, loss_weight_T, accumulate)
        return output, torch.cat(statistics)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> ShardedStateDict:
        """Every parameter as a ShardedTensor: its global name, this rank's part, and which replica of it this is."""
        dp_rank = self.groups.dp_cp.rank()
        result = {}
        offsets: tuple[tuple[int, int, int], ...]
        for name, parameter in self.named_parameters():
            if getattr(parameter, "is_routed_expert", False):
                offsets = ((0, self.groups.ep.rank(), self.groups.ep.size()),)
                replica = (0, 0, self.groups.expt_dp.rank())
            else:
                offsets, replica = (), (0, 0, dp_rank)
            result[prefix + name] = ShardedTensor.from_rank_offsets(prefix + name, parameter, *offsets, replica_id=replica)
        return result


def build_model(config: HunyuanConfig, groups: ProcessGroupCollection, seed: int | None) -> HunyuanModel:
    """The model of this rank; with `seed` None its weights are left uninitialised (for loading, or on the meta device)."""
    model = HunyuanModel(config, groups)
    if seed is not None:
        initialize_weights(model, seed)
    return model


@torch.no_grad()
def initialize_weights(model: HunyuanModel, seed: int) -> None:
    """Write every weight: ones for norms, else a normal of init_method_std, over sqrt(2 * num_layers) where a layer writes its residual.

    Each matrix (each expert's its own) is drawn on the CPU from a generator keyed by (seed, its global name), so every layout starts
    from the same weights.
    """
    config = model.config
    first_expert = model.groups.ep.rank() * (config.num_moe_experts // model.groups.ep.size())

    def draw(name: str, shape: torch.Size, std: float) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    for name, parameter in model.named_parameters():
        std = config.init_method_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * config.num_layers)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif getattr(parameter, "is_routed_expert", False):
            for local, expert in enumerate(parameter, start=first_expert):
                expert.copy_(draw(f"{name}/{local}", expert.shape, std))
        else:
            parameter.copy_(draw(name, parameter.shape, std))
