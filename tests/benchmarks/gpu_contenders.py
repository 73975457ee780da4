"""The training steps that tests/benchmarks/gpu_step.py measures: this project's, and megatron-core's GPTModel.

Both have the same shapes, tokens and AdamW, and run core's schedule and optimizer. GPTModel has no CLA and no
recycling, and drops no token. Each function builds everything anew and returns (step, active parameters).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

Step = Callable[[], float]
Built = tuple[Step, int]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batch."""

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    experts: int
    vocab: int = 32768
    length: int = 4096
    sequences: int = 4
    micro_batches: int = 2

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


BENCH = Shape(layers=4, hidden=2048, heads=16, groups=4, ffn=5632, experts=8)
LARGE = {"hidden": 6400, "heads": 80, "groups": 8, "ffn": 18304, "experts": 2}
SHAPES = {
    "large": Shape(layers=2, **LARGE),
    "bench": BENCH,
    "large4": Shape(layers=4, **LARGE),
    "long": Shape(2, 2048, 16, 4, 5632, 8, length=262_144, sequences=1, micro_batches=1),
}
"""Hunyuan-Large's width with 2 and 4 layers and 2 local experts; a small model; one sequence of 256K tokens."""
DRY = Shape(layers=2, hidden=64, heads=4, groups=2, ffn=64, experts=4, vocab=128, length=32, sequences=2)

GPT_FUSIONS: dict[str, Any] = {
    "bias_activation_fusion": True,
    "apply_rope_fusion": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
}
"""GPTModel's fused kernels that are off by default. Left out: moe_shared_expert_overlap, which needs several hardware
queues, while all contenders here run with CUDA_DEVICE_MAX_CONNECTIONS=1."""


def device() -> torch.device:
    """The GPU, or the CPU in a dry run."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def ours(
    shape: Shape,
    recipe: str | None,
    *,
    has_engine: bool = True,
    has_kernels: bool = True,
    is_deterministic: bool = False,
    is_recorded: bool = False,
) -> Built:
    """This project's step with every feature on. is_recorded: as a CUDA graph."""
    from hunyuan_pretrain.config.schema import RuntimeConfig
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from hunyuan_pretrain.parallel.groups import build_groups
    from hunyuan_pretrain.plan.counts import parameters
    from hunyuan_pretrain.runtime.device import probe
    from hunyuan_pretrain.runtime.policy import fuses_wgrad_accumulation
    from hunyuan_pretrain.train.attention_choice import choose
    from hunyuan_pretrain.train.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
    from hunyuan_pretrain.train.recorded_step import RecordedSteps
    from hunyuan_pretrain.train.run import Run
    from hunyuan_pretrain.train.step import train_step

    if is_recorded:
        torch.cuda.set_stream(torch.cuda.Stream(device()))
    experiment = _experiment(shape, recipe)
    groups = build_groups(experiment.parallel, 600)
    config = transformer_config(
        experiment.model,
        experiment.parallel,
        experiment.precision,
        fuses_wgrad_accumulation(has_engine),
        has_engine,
        use_kernels=has_kernels,
    )
    batches = _micro_batches(shape)
    if device().type == "cuda":
        runtime = RuntimeConfig(
            deterministic=is_deterministic,
            transformer_engine="auto" if has_engine else "never",
            cuda_graphs=is_recorded,
        )
        wanted = experiment.model_copy(update={"runtime": runtime})
        config.attention, _ = choose(wanted, probe(), config, batches[0], (0, 1), device(), {})
    built = build_model(config, groups, None)
    for parameter in built[0].parameters():  # the seeded weights of a run are drawn on the CPU, which takes a minute
        torch.nn.init.ones_(parameter) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, std=0.01)
    chunks = wrap_data_parallel(built, experiment, groups)
    optimizer = build_optimizer(chunks, experiment, groups)
    set_learning_rate(optimizer, 1e-4, 0.31)
    # the parts of a run that a step uses: no data on disk, no log
    order = SimpleNamespace(most_documents=lambda step: max(len(batch.sequence_ids) for batch in batches))
    loader: Any = SimpleNamespace(micro_batches=lambda step: batches, order=order)
    log: Any = SimpleNamespace(line=lambda text: None)
    recorded = RecordedSteps() if is_recorded else None
    run = Run(experiment, device(), groups, built, chunks, optimizer, loader, None, 0, log=log, recorded=recorded)
    steps = itertools.count()
    return lambda: train_step(run, experiment.stages[0], next(steps)).loss, parameters(experiment.model).active


def _experiment(shape: Shape, recipe: str | None) -> Any:
    from hunyuan_pretrain.config.schema import (
        DataSource,
        Experiment,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        StageConfig,
    )

    stage = StageConfig(
        name="bench",
        tokens=10**9,
        sequence_length=shape.length,
        global_batch_sequences=shape.sequences,
        micro_batch_sequences=shape.sequences // shape.micro_batches,
        lr_end=1.0,
        data=(DataSource(path="none"),),
    )
    model = ModelConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts,
        padded_vocab_size=shape.vocab,
        moe_routing_group_tokens=min(shape.length, 4096),
    )
    return Experiment(
        name="bench",
        run_dir="none",
        tokenizer="none",
        stages=(stage,),
        model=model,
        precision=PrecisionConfig(dtype="bf16", fp8_recipe=recipe),
        optimizer=OptimizerConfig(lr=1e-4),
    )


def _micro_batches(shape: Shape) -> list[Any]:
    from hunyuan_pretrain.data.loader import MicroBatch

    tokens, labels = sample_tokens(shape)
    rows = shape.tokens // shape.micro_batches
    return [
        MicroBatch(
            tokens_T=tokens[start : start + rows],
            labels_T=labels[start : start + rows],
            loss_mask_T=torch.ones(rows),
            positions_T=torch.arange(shape.length).repeat(rows // shape.length),
            max_seqlen=shape.length,
            sequence_ids=torch.arange(start, start + rows, shape.length) // shape.length,
            cu_seqlens=torch.arange(0, rows + 1, shape.length, dtype=torch.int32),
        )
        for start in range(0, shape.tokens, rows)
    ]


def sample_tokens(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pseudo-text for every contender: token ids with a Zipf-like distribution, and the next tokens."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(shape.tokens + 1, generator=generator)
    ids = (shape.vocab**draws).long().clamp(max=shape.vocab - 1)
    return ids[:-1].clone(), ids[1:].clone()


# --- GPTModel ---------------------------------------------------------------------------------------------------------


def gpt_model(shape: Shape, recipe: str | None, fusions: dict[str, Any]) -> Built:
    """megatron-core's GPTModel with its own Transformer Engine spec, grouped GEMMs, weight gradients accumulated in
    them, and `fusions`."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from hunyuan_pretrain.config.schema import ParallelConfig
    from hunyuan_pretrain.parallel.groups import build_groups

    groups = build_groups(ParallelConfig(), 600)
    model_parallel_cuda_manual_seed(1)
    config = _gpt_config(shape, recipe, fusions)
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=shape.experts, moe_grouped_gemm=True, qk_layernorm=True
    )
    with output_layer_without_apex():
        gpt = GPTModel(
            config,
            spec,
            vocab_size=shape.vocab,
            max_sequence_length=shape.length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
        ).to(device(), torch.bfloat16)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(config, settings, gpt)
    adam = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(adam, [model], use_gloo_process_groups=False, pg_collection=groups)
    config.finalize_model_grads_func = finalize_model_grads
    total = sum(parameter.numel() for parameter in gpt.parameters())
    active = total - shape.layers * (shape.experts - 1) * 3 * shape.hidden * shape.ffn
    return _gpt_step(shape, model, optimizer), active


def _gpt_config(shape: Shape, recipe: str | None, fusions: dict[str, Any]) -> Any:
    from megatron.core.transformer import TransformerConfig

    fields = dict(fusions)
    if recipe:
        fields |= {"fp8": "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid", "fp8_recipe": recipe}
    if recipe == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn,
        moe_shared_expert_intermediate_size=shape.ffn,
        num_moe_experts=shape.experts,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=1e-3,
        moe_router_load_balancing_type="aux_loss",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        qk_layernorm=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        moe_router_padding_for_quantization=recipe is not None,
        use_cpu_initialization=device().type == "cpu",
        **fields,
    )


def _gpt_step(shape: Shape, model: Any, optimizer: Any) -> Step:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens, labels = (x.view(shape.micro_batches, -1, shape.length).to(device()) for x in sample_tokens(shape))
    position = torch.arange(shape.length, device=device()).expand(tokens.shape[1], -1)

    def forward(numbers: Iterator[int], model: torch.nn.Module) -> tuple[Any, Any]:
        number = next(numbers)
        losses = model(tokens[number], position, None, labels=labels[number])
        return losses, lambda losses: (losses.mean(), losses.mean().detach())

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(range(shape.micro_batches)),
            model=[model],
            num_microbatches=shape.micro_batches,
            seq_length=shape.length,
            micro_batch_size=tokens.shape[1],
            forward_only=False,
        )
        optimizer.step()
        return torch.stack(losses).mean().item()

    return step


@contextmanager
def output_layer_without_apex() -> Iterator[None]:
    """GPTModel's output layer is core's own and accumulates its gradient inside the GEMM only with Apex's extension, so
    it is disabled there; GPTModel's other layers, from Transformer Engine, still accumulate."""
    from megatron.core.tensor_parallel import layers

    construct = layers.ColumnParallelLinear.__init__

    def without_fusion(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False
        construct(self, *args, config=config, **kwargs)

    with patch.object(layers.ColumnParallelLinear, "__init__", without_fusion):
        yield


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    is_gpt: bool = False
    recipe: str | None = None
    has_engine: bool = True
    has_kernels: bool = True
    is_deterministic: bool = False
    is_recorded: bool = False

    @property
    def name(self) -> str:
        precision = self.recipe or "bf16"
        if self.is_gpt:
            return f"GPTModel, {precision}"
        layers = "" if self.has_engine else "local layers, "
        kernels = f"kernels {'on' if self.has_kernels else 'off'}"
        options = ", deterministic" * self.is_deterministic + ", CUDA graph" * self.is_recorded
        return f"hunyuan-pretrain, {layers}{precision}, {kernels}{options}"

    def build(self, shape: Shape, fusions: dict[str, Any]) -> Built:
        if self.is_gpt:
            return gpt_model(shape, self.recipe, fusions)
        return ours(
            shape,
            self.recipe,
            has_engine=self.has_engine,
            has_kernels=self.has_kernels,
            is_deterministic=self.is_deterministic,
            is_recorded=self.is_recorded,
        )


def contenders(part: str, recipes: list[str], has_graphs: bool = True) -> list[Contender]:
    """Those of a part, the most important first: what a time-out cuts off is last. has_graphs: whether the device has
    CUDA graphs."""

    def of(recipe: str | None, *, both: bool = True) -> list[Contender]:
        found = [Contender(recipe=recipe), Contender(is_gpt=True, recipe=recipe)]
        if has_graphs and part in ("bench", "large") and recipe in (None, "blockwise"):
            found.append(Contender(recipe=recipe, is_recorded=True))
        return [*found, Contender(recipe=recipe, has_kernels=False)] if both else found

    if part == "long":
        return of(None)
    found = of(None)
    if "blockwise" in recipes:
        found += of("blockwise", both=part != "large4")
    if part == "large4":
        return found
    found.insert(2, Contender(is_deterministic=True))  # what runtime.deterministic costs, and which kernels differ
    for recipe in recipes:
        if recipe != "blockwise":
            found += of(recipe, both=part == "bench")
    return [*found, Contender(has_engine=False), Contender(has_engine=False, has_kernels=False)]
