"""The model: embedding -> CLA groups of layers -> final norm -> loss or logits.

Shapes: T tokens of this rank (all sequences of a micro-batch, concatenated), B = 1 (core's batch dim), D hidden, V
padded vocabulary, L layers of a CLA group, X numbers of packed router statistics (model.routing.RouterStatistics).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hunyuan_pretrain.config.derived import offloaded_layers, rope_base
from hunyuan_pretrain.config.tuning import ADAPTER, is_trained
from hunyuan_pretrain.model.attention import attention_plan
from hunyuan_pretrain.model.cross_entropy import Accumulation, linear_cross_entropy, token_cross_entropies
from hunyuan_pretrain.model.dropout import EMBEDDING, Dropout, dropout_of
from hunyuan_pretrain.model.engines import choose_spec
from hunyuan_pretrain.model.fp8.parameters import unquantised, write
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.model.layer import TransformerLayer, run_cla_group
from hunyuan_pretrain.model.lora import add_adapters, is_zero_at_first
from hunyuan_pretrain.model.norm import rope_table
from hunyuan_pretrain.model.offload import Offload
from hunyuan_pretrain.model.routing import RouterStatistics
from hunyuan_pretrain.model.spec import Spec
from hunyuan_pretrain.parallel.sharding import Placement, mark_sharded, placement_of, sharded_tensor

SpecChoice = Callable[[HunyuanConfig, int], Spec]
"""(config, layer) -> spec of that layer, counted from 0 over the whole model."""


class TokenEmbedding(VocabParallelEmbedding):
    """Core's embedding. Called without tokens, it returns its weight (V / ranks, D), for the output layer.

    When the all-gather of updated weights overlaps the forward pass, core waits for a module's weights when that module
    is called. So read a weight only by calling its module.
    """

    adds_rows = False
    """Whether the backward pass adds the rows of the tokens to main_grad, where that is on a GPU. torch's own gradient
    has a row for each id of the vocabulary."""

    def forward(self, tokens: Tensor | None = None) -> Tensor:
        if tokens is None:
            return self.weight
        is_added = self.adds_rows and self.tp_group.size() == 1 and hasattr(self.weight, "main_grad")
        if is_added and _adds_on(self.weight.device):
            return _RowsAddedToMainGrad.apply(self.weight, tokens)
        return super().forward(tokens)


def _adds_on(device: torch.device) -> bool:
    """On a CPU the sum of a token's rows keeps its order: first among themselves, then with main_grad."""
    return device.type != "cpu"


class _RowsAddedToMainGrad(torch.autograd.Function):
    """weight_VD[tokens]; the gradient goes into weight_VD.main_grad in fp32, in the order of the tokens."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Any, tokens: Tensor) -> Tensor:
        ctx.weight = weight_VD
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        main_grad = ctx.weight.main_grad
        # index_put_, which sorts: index_add_ adds with atomics unless deterministic algorithms are on, and in many rows
        # of the same token these wait for each other
        main_grad.index_put_((tokens.flatten(),), grad.flatten(0, -2).to(main_grad.dtype), accumulate=True)
        # core's hook then skips its own addition; the returned tensor is never read
        ctx.weight.grad_added_to_main_grad = True
        return torch.empty_like(ctx.weight), None


class Embedding(torch.nn.Module):
    """Token embedding; also the output weight if the two are tied."""

    def __init__(self, config: HunyuanConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.word_embeddings = TokenEmbedding(
            config.model.padded_vocab_size,
            config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=groups.tp,
        )
        self.word_embeddings.adds_rows = config.gradient_accumulation_fusion
        mark_sharded(self.word_embeddings.weight, 0)

    def forward(self, tokens_T: Tensor) -> Tensor:
        # with reduce_scatter_embeddings core takes (B, T) and returns (T, B, D); B is 1 here
        if self.word_embeddings.reduce_scatter_embeddings:
            return self.word_embeddings(tokens_T[None])[:, 0]
        return self.word_embeddings(tokens_T)


class Layers(torch.nn.Module):
    """The layers of a stage, each registered under its number in the whole model."""

    def __init__(self, layers: Iterable[TransformerLayer]) -> None:
        super().__init__()
        for layer in layers:
            self.add_module(str(layer.layer), layer)

    def __iter__(self) -> Iterator[TransformerLayer]:
        return cast("Iterator[TransformerLayer]", self.children())

    def __getitem__(self, number: int) -> TransformerLayer:
        return cast("TransformerLayer", self.get_submodule(str(number)))


class Decoder(torch.nn.Module):
    """The layers of this stage, and on the last stage the final norm."""

    def __init__(
        self,
        config: HunyuanConfig,
        spec: SpecChoice,
        groups: ProcessGroupCollection,
        layers: range,
        has_final_norm: bool,
    ) -> None:
        super().__init__()
        self.layers = Layers(TransformerLayer(config, layer, spec(config, layer), groups) for layer in layers)
        if has_final_norm:
            self.final_layernorm = spec(config, layers[-1]).norm(config, config.hidden_size)


class OutputLayer(torch.nn.Module):
    """Output weight (V, D) of a model with untied embeddings, sharded along V over the tensor-parallel ranks."""

    def __init__(self, config: HunyuanConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        shape = (config.model.padded_vocab_size // groups.tp.size(), config.hidden_size)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=weight_device(config)))
        mark_sharded(self.weight, 0)

    def forward(self) -> Tensor:
        """The complete weight; see TokenEmbedding."""
        return self.weight


class HunyuanModel(MegatronModule):
    """One pipeline stage of Hunyuan for pretraining; the whole model if there is only one stage.

    Weights are uninitialised until `initialize_weights` or a checkpoint writes them. With tied embeddings, the last of
    several stages has a copy of the embedding under the same name.
    """

    def __init__(
        self, config: HunyuanConfig, groups: ProcessGroupCollection, chunk: int = 0, spec: SpecChoice = choose_spec
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.groups = groups
        stage = chunk * groups.pp.size() + groups.pp.rank()
        # read by core's schedules and gradient finalisation
        self.pre_process, self.post_process = stage == 0, stage == len(config.stages) - 1
        self.vp_stage = chunk if config.virtual_pipeline_model_parallel_size else None
        self.share_embeddings_and_output_weights = config.model.share_embeddings_and_output_weights  # read by core
        self.input_TBD: Tensor | None = None
        offloaded = offloaded_layers(config.model, config.parallel, stage)
        self.offload = Offload(len(offloaded) // config.model.cla_share_factor)
        # weights are registered in forward order: core gathers them in this order and reduces gradients in reverse
        if self.pre_process:
            self.embedding = self._build_embedding()
        self.decoder = Decoder(config, spec, groups, config.stages[stage], self.post_process)
        if self.post_process:
            self.chunk_loss = spec(config, config.stages[stage][-1]).functions.chunk_loss
        if self.post_process and not self.share_embeddings_and_output_weights:
            self.output_layer = OutputLayer(config, groups)
        elif self.post_process and not self.pre_process:
            self.embedding = self._build_embedding()

    def _build_embedding(self) -> Embedding:
        embedding = Embedding(self.config, self.groups)
        weight: Any = embedding.word_embeddings.weight
        # the gradient norm counts the weight on the first stage only
        weight.shared = not self.pre_process
        # a separate bucket in core's buffers: the distributed optimizer then shards both copies the same way, so the
        # ranks of the first and last stage that sum their gradients hold the same, fully reduced elements
        weight.shared_embedding = self.share_embeddings_and_output_weights and len(self.config.stages) > 1
        return embedding

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by core's schedules with the activations (T, 1, D) of the previous stage; the first stage has none."""
        self.input_TBD = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The output layer's weight, (V / ranks, D); with tied embeddings, the embedding's."""
        return (
            self.embedding.word_embeddings.weight
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )

    def _output_weight(self) -> Tensor:
        """The same, complete, for the forward pass; see TokenEmbedding."""
        return self.embedding.word_embeddings() if self.share_embeddings_and_output_weights else self.output_layer()

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Returns (output, packed router statistics (all layers, X), zero for layers of other stages).

        The output of the last stage is the loss sum_t loss_weight_T[t] * cross_entropy[t] (of pairs: see `_loss`), or
        without labels the logits
        (T, V / tensor-parallel ranks), or what `inputs.read_out` returns. That of any other stage is activations
        (T, 1, D).

        T here is the tokens of this context-parallel rank. With sequence parallelism, activations between layers and
        their router statistics cover only this tensor-parallel rank's share of them.
        """
        rank, size = (self.groups.tp.rank(), self.groups.tp.size()) if self.config.sequence_parallel else (0, 1)
        group_tokens = self.config.model.moe_routing_group_tokens
        dropout = dropout_of(inputs.routing, inputs.dropout, group_tokens, rank, size)
        # not held here meanwhile: it may be offloaded
        hidden_TD, statistics = self._through_layers(self._stage_input(inputs, dropout), inputs, dropout)
        if not self.post_process:
            return hidden_TD[:, None], statistics
        hidden_TD, _ = self.decoder.final_layernorm(hidden_TD)
        if inputs.read_out is not None:
            return inputs.read_out(self._of_all_tokens(hidden_TD), self._output_weight()), statistics
        return (self._logits(hidden_TD) if inputs.labels_T is None else self._loss(hidden_TD, inputs)), statistics

    def _stage_input(self, inputs: ModelInputs, dropout: Dropout | None) -> Tensor:
        if self.pre_process:
            hidden_TD = self.embedding(inputs.tokens_T)
            if dropout is not None:
                hidden_TD = dropout.hidden(hidden_TD, 0, EMBEDDING)
            if torch.is_grad_enabled() and not hidden_TD.requires_grad:
                # of a frozen embedding: recomputed layers are skipped by the backward pass if no input needs a gradient
                hidden_TD.requires_grad_()
            return hidden_TD
        assert self.input_TBD is not None, "a later stage needs the activations of the one before"
        return self.input_TBD.squeeze(1)

    def _through_layers(
        self, hidden_TD: Tensor, inputs: ModelInputs, dropout: Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """(T, D) after this stage's CLA groups, and packed router statistics (all layers, X)."""
        config, tp, routing = self.config, self.groups.tp, inputs.routing
        if config.sequence_parallel:
            routing = routing.share(tp.rank(), tp.size())
        base = rope_base(config.model.rotary_base, inputs.rope_alpha, config.kv_channels)
        table = rope_table(inputs.positions_T, base, config.kv_channels)
        plan = attention_plan(table, inputs.cu_seqlens, inputs.context)
        layers, recompute = list(self.decoder.layers), config.parallel.recompute == "cla_group"
        size = RouterStatistics.packed_size(config.num_moe_experts)
        statistics = hidden_TD.new_zeros(config.num_layers, size, dtype=torch.float32)
        offloaded = None
        for number, start in enumerate(range(0, len(layers), config.model.cla_share_factor)):
            group = layers[start : start + config.model.cla_share_factor]
            maker_of_input = hidden_TD.grad_fn
            hidden_TD, statistics_LX = run_cla_group(group, hidden_TD, plan, routing, recompute, dropout)
            offloaded = self.offload.after_group(number, maker_of_input, hidden_TD, group, offloaded)
            statistics[group[0].layer : group[-1].layer + 1] = statistics_LX.detach()
        return hidden_TD, statistics

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        """fp32 (T, V / tensor-parallel ranks)."""
        return F.linear(self._of_all_tokens(hidden_TD), self._output_weight()).float()

    def _of_all_tokens(self, hidden_TD: Tensor) -> Tensor:
        """With sequence parallelism, from the tokens of this tensor-parallel rank to those of all."""
        if not self.config.sequence_parallel:
            return hidden_TD
        return gather_from_sequence_parallel_region(hidden_TD, group=self.groups.tp)

    def _loss(self, hidden_TD: Tensor, inputs: ModelInputs) -> Tensor:
        """The weighted sum of cross-entropies, in nats; of pairs, fp64 (2 + fields of PairSums,): a sum with the
        gradient of their loss, and `Pairs.weights`, or only log-probabilities."""
        labels_T, loss_weight_T, pairs = inputs.labels_T, inputs.loss_weight_T, inputs.pairs
        assert labels_T is not None
        assert loss_weight_T is not None
        weight_VD = self._output_weight()
        if pairs is None:
            return self._weighted_loss(hidden_TD, weight_VD, labels_T, loss_weight_T)
        loss_T = token_cross_entropies(hidden_TD, weight_VD, labels_T, self.groups.tp)
        log_probability_A = pairs.log_probabilities(loss_T, loss_weight_T, self.groups.cp)
        if pairs.loss is None:
            return log_probability_A
        weight_T, numbers = pairs.weights(log_probability_A, loss_weight_T, self.groups.cp)
        return torch.cat([self._weighted_loss(hidden_TD, weight_VD, labels_T, weight_T).double()[None], numbers])

    def _weighted_loss(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, loss_weight_T: Tensor) -> Tensor:
        accumulate: Accumulation | None = None
        if self.config.gradient_accumulation_fusion and hasattr(weight_VD, "main_grad"):
            accumulate = (
                "one of two uses" if self.pre_process and self.share_embeddings_and_output_weights else "only use"
            )
        return linear_cross_entropy(
            hidden_TD, weight_VD, labels_T, loss_weight_T, self.groups.tp, accumulate, self.chunk_loss
        )

    def placements(self) -> dict[str, Placement]:
        """The placement of each of this rank's parameters in the whole one, by parameter name."""
        return {
            name: placement_of(name, parameter, self.groups, is_copy=getattr(parameter, "shared", False))
            for name, parameter in self.named_parameters()
        }

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Every parameter for megatron's distributed checkpoints: global name, this rank's part, and which replica it
        is."""
        placements = self.placements()
        return {
            prefix + name: sharded_tensor(prefix, unquantised(parameter), placements[name])
            for name, parameter in self.named_parameters()
        }


def build_model(config: HunyuanConfig, groups: ProcessGroupCollection, seed: int | None) -> list[HunyuanModel]:
    """The model chunks of this rank, one unless the pipeline is interleaved.

    With `seed` None, weights are left uninitialised (for loading, or on the meta device).
    """
    chunks = [HunyuanModel(config, groups, chunk) for chunk in range(config.virtual_pipeline_model_parallel_size or 1)]
    for model in chunks:
        if config.tuning.lora is not None:
            add_adapters(model, config.tuning.lora)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(config.tuning, name))
    for model in chunks if seed is not None else []:
        initialize_weights(model, cast("int", seed))
    return chunks


@torch.no_grad()
def initialize_weights(model: HunyuanModel, seed: int) -> None:
    """Write every weight: ones for norms, else a normal with standard deviation init_method_std, divided by sqrt(2 *
    num_layers) for projections into the residual stream. Of an adapter, B is 0 and A uniform up to 1 / sqrt(input size)
    on both sides, as PEFT draws it.

    Each whole matrix (one per expert) is drawn on the CPU from a generator keyed by (seed, global name), and each rank
    takes its part, so every layout starts from the same weights.
    """
    config = model.config

    def draw(name: str, shape: tuple[int, ...], std: float) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if ADAPTER in name:
            bound = 1 / math.sqrt(shape[-1])
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    placements = model.placements()
    for local_name, parameter in model.named_parameters():
        placement, std = placements[local_name], config.init_method_std
        values = torch.empty(placement.local_shape, dtype=parameter.dtype, device=parameter.device)
        if placement.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * config.num_layers)
        if parameter.dim() == 1:
            values.fill_(1.0)
        elif is_zero_at_first(placement.name):
            values.zero_()
        elif getattr(parameter, "is_routed_expert", False):
            first = placement.parts[0].whole[0].start
            for local, expert in enumerate(values):
                whole = draw(f"{placement.name}/{first + local}", placement.whole_shape[1:], std)
                for part in placement.parts:
                    expert[part.local[1:]] = whole[part.whole[1:]]
        else:
            whole = draw(placement.name, placement.whole_shape, std)
            for part in placement.parts:
                values[part.local] = whole[part.whole]
        write(parameter, values.view(parameter.shape))
