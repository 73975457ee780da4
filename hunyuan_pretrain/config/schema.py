"""The typed experiment: every key of an experiment YAML, with its meaning, unit and default.

`config.load.load_experiment` returns an `Experiment`: frozen, with every default filled in. Names follow megatron-core,
or the Hunyuan-Large report (arXiv 2411.02265) for settings that core lacks. Rules that span several fields are in
`config/rules.py`. This module must stay cheap to import: no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from hunyuan_pretrain.config.attention import BACKENDS, BackendName
from hunyuan_pretrain.config.recipe import RECIPES, Recipe, RecipeName

__all__ = [
    "AlarmsConfig",
    "CheckpointConfig",
    "DataSource",
    "EvaluationConfig",
    "EvaluationSet",
    "Experiment",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RuntimeConfig",
    "StageConfig",
    "TuningConfig",
]


def setting(
    description: str,
    default: Any = ...,
    *,
    unit: str = "",
    typical: str = "",
    min_length: int | None = None,
    is_path: bool = False,
) -> Any:
    """A schema field, with what `hunyuan-pretrain explain` prints about it. Unit "tokens" accepts suffixes
    (config/values.py)."""
    extra: dict[str, Any] = {"unit": unit, "typical": typical} | ({"is_path": True} if is_path else {})
    return Field(default, description=description, min_length=min_length, json_schema_extra=extra)


Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, and values are frozen after loading."""

    # defer_build, and default_factory in Experiment: validators are built at first use, which keeps the import below
    # 200 ms.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class ModelConfig(Section):
    """Architecture. Every setting here changes what the weights mean; none depends on the machine."""

    num_layers: PositiveInt = setting(
        "Transformer layers; each is attention followed by a mixture-of-experts FFN.", unit="layers", typical="64"
    )
    hidden_size: PositiveInt = setting("Width of the residual stream.", unit="channels", typical="6400")
    num_attention_heads: PositiveInt = setting("Query heads per layer.", unit="heads", typical="80")
    num_query_groups: PositiveInt = setting(
        "Key/value heads per layer (grouped-query attention).", unit="heads", typical="8"
    )
    kv_channels: PositiveInt | None = setting(
        "Width of one head; null means hidden_size / num_attention_heads.", None, unit="channels", typical="80"
    )
    ffn_hidden_size: PositiveInt = setting("SwiGLU width of the shared expert.", unit="channels", typical="18304")
    moe_ffn_hidden_size: PositiveInt | None = setting(
        "SwiGLU width of each routed expert; null means ffn_hidden_size.", None, unit="channels", typical="18304"
    )
    num_moe_experts: PositiveInt = setting("Routed experts per layer.", unit="experts", typical="16")
    moe_router_topk: PositiveInt = setting(
        "Routed experts per token. With 1, the combine weight is the raw softmax probability; with more, the weights "
        "are renormalised to sum to 1.",
        1,
        unit="experts",
        typical="1",
    )
    moe_expert_capacity_factor: PositiveFloat | None = setting(
        "Sets the capacity of an expert in training: ceil(factor * tokens * topk / experts) slots per routing group. "
        "null: no limit (dropless); recycle_routing must then be false. Evaluation and export never limit. The value "
        "used to pretrain Hunyuan-Large is unpublished.",
        1.0,
        unit="ratio",
        typical="1.0",
    )
    recycle_routing: bool = setting(
        "Send a token whose expert is full to a random free slot of another expert instead of dropping it.",
        True,
        typical="true",
    )
    moe_routing_group_tokens: PositiveInt = setting(
        "Size of a routing group: consecutive tokens of one sequence that share the experts' capacity and form one "
        "term of the balance loss. Must divide sequence_length of every stage. With small groups, a rank holds whole "
        "groups under every parallel layout.",
        512,
        unit="tokens",
        typical="512 to 4096",
    )
    moe_aux_loss_coeff: NonNegativeFloat = setting(
        "Coefficient of the balance loss E * sum_e mean(p_e) * mean(chosen_e), computed on the router's choices "
        "before recycling. Unpublished.",
        0.001,
        unit="ratio",
        typical="0.001 to 0.01",
    )
    moe_z_loss_coeff: NonNegativeFloat = setting(
        "Coefficient of the router z-loss mean(logsumexp(logits)^2).", 0.0, unit="ratio", typical="0 or 0.001"
    )
    cla_share_factor: PositiveInt = setting(
        "Cross-layer attention: number of consecutive layers that share one key and value projection. The first "
        "layer of each group owns it. 1 turns it off.",
        2,
        unit="layers",
        typical="2",
    )
    qk_layernorm: bool = setting("RMSNorm of each query and key head, after RoPE.", True, typical="true")
    layernorm_epsilon: PositiveFloat = setting("Epsilon of every RMSNorm.", 1e-5, typical="1e-5")
    rotary_base: PositiveFloat = setting(
        "RoPE base before the stage's NTK-alpha scaling (rope_alpha).", 10000.0, typical="10000"
    )
    padded_vocab_size: PositiveInt = setting(
        "Rows of the embedding: the tokenizer's vocabulary plus padding.", unit="tokens", typical="128512"
    )
    share_embeddings_and_output_weights: bool = setting("Tie the output layer to the embedding.", True, typical="true")
    init_method_std: PositiveFloat = setting("Standard deviation of the initial weights.", 0.02, typical="0.02")

    @property
    def head_dim(self) -> int:
        """Width of one attention head, channels."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def expert_ffn_size(self) -> int:
        """SwiGLU width of one routed expert, channels."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size


Recompute = Literal["none", "swiglu", "norms", "swiglu+norms", "selective", "selective+norms", "cla_group"]
"""Values of parallel.recompute."""


class ParallelConfig(Section):
    """How the ranks split the work. The data-parallel size is the rest of the world size."""

    world_size: PositiveInt | None = setting(
        "Number of ranks that the job must have; null accepts any number that fits the layout.", None, unit="ranks"
    )
    tensor_model_parallel_size: PositiveInt = setting(
        "Ranks over which each weight matrix is sharded.", 1, unit="ranks", typical="1 to 8"
    )
    sequence_parallel: bool = setting(
        "Also split norms, residuals and experts' tokens over the tensor-parallel ranks: if and only if several.", False
    )
    pipeline_model_parallel_size: PositiveInt = setting("Pipeline-parallel ranks.", 1, unit="ranks", typical="1 to 16")
    virtual_pipeline_model_parallel_size: PositiveInt = setting(
        "Model chunks per pipeline rank; above 1 selects the interleaved schedule.", 1, unit="chunks", typical="1 to 4"
    )
    pipeline_layout: tuple[PositiveInt, ...] | None = setting(
        "Number of layers in each stage, in the order in which a token passes them; stage i is on pipeline rank i % "
        "pipeline_model_parallel_size. No stage may split a CLA group. null splits the layers evenly.",
        None,
        unit="layers",
        typical="[14, 16, 16, 18]",
    )
    context_parallel_size: PositiveInt = setting(
        "Ranks over which each sequence is split.", 1, unit="ranks", typical="1 to 8"
    )
    context_parallel_method: Literal["all_gather", "all_to_all"] = setting(
        "How attention sees the whole sequence: all_gather or all_to_all (Ulysses). all_gather collects keys and "
        "values, once per CLA group, and works with any number of ranks. all_to_all trades tokens for heads; the "
        "key/value heads of a tensor-parallel rank must divide evenly among the context-parallel ranks.",
        "all_gather",
    )
    expert_model_parallel_size: PositiveInt = setting(
        "Ranks over which the routed experts of each layer are distributed.", 1, unit="ranks", typical="8 to 16"
    )
    expert_tensor_parallel_size: PositiveInt = setting(
        "Ranks over which each routed expert is sharded.", 1, unit="ranks", typical="1"
    )
    use_distributed_optimizer: bool = setting("Shard the optimizer state over the data-parallel ranks (ZeRO-1).", True)
    overlap_grad_reduce: bool | None = setting(
        "Reduce gradients during the backward pass. null: where several ranks hold the same weights or experts.", None
    )
    overlap_param_gather: bool | None = setting(
        "Gather weights in forward passes. null: where the distributed optimizer shards them and gradients overlap.",
        None,
    )
    overlap_shared_expert: bool = setting("On a GPU, run the shared expert beside the routed rows' exchange.", False)
    recompute: Recompute = setting(
        "Which activations the backward pass recomputes instead of keeping them. none: keep all. swiglu: recompute the "
        "output of SwiGLU, the input of an expert's second matrix. norms: recompute the outputs of a layer's two "
        "RMSNorms. Neither repeats a matmul or a message. selective: recompute everything inside the experts, shared "
        "and routed. cla_group: keep only the input of each CLA group (full recompute).",
        "none",
    )
    cpu_offloading_num_layers: NonNegativeInt = setting(
        "Layers of each pipeline stage, from its first, whose activations wait in host memory between their forward "
        "and their backward pass, in whole CLA groups. The last CLA group of the model always stays on the device: "
        "its backward pass comes at once. Copies overlap with computation where that takes longer. 0: none.",
        0,
        unit="layers",
    )

    @property
    def recomputed_parts(self) -> frozenset[str]:
        """The parts that `recompute` names."""
        return frozenset(self.recompute.split("+")) - {"none"}


class PrecisionConfig(Section):
    """Number formats of training."""

    dtype: Literal["bf16", "fp32"] = setting(
        "Format of weights and activations; with bf16 the optimizer keeps fp32 main weights.", "bf16", typical="bf16"
    )
    grad_reduce_in_fp32: bool = setting("Accumulate and reduce gradients in fp32.", True, typical="true")
    fp8_recipe: RecipeName | None = setting(
        "Quantise the operands of the linear layers and experts to FP8. "
        + "; ".join(f"{recipe.name}: {recipe.meaning}" for recipe in RECIPES.values())
        + ". The router, norms, embedding, output layer and attention itself are not quantised. Runs on Transformer "
        "Engine's kernels, or emulated: see runtime.transformer_engine. null: no FP8.",
        None,
        typical="blockwise on Hopper, mxfp8 on Blackwell",
    )
    fp8_format: Literal["e4m3", "hybrid"] | None = setting(
        "Format of the quantised values. e4m3: E4M3 for all of them. hybrid: E4M3 for inputs and weights, and E5M2, "
        "with more range and less precision, for gradients. null: Transformer Engine's default for the recipe, which "
        "is hybrid for delayed and tensorwise, e4m3 for the others.",
        None,
    )
    fp8_margin: int | None = setting(
        "Headroom of fp8_recipe=delayed: scales are divided by 2^margin, so that values can grow. null: 0.",
        None,
        unit="powers of two",
        typical="0",
    )
    fp8_amax_history_len: PositiveInt | None = setting(
        "Number of steps whose amax (largest absolute value) fp8_recipe=delayed remembers. null: 1024, or 1 with "
        "fp8_amax_compute_algo=most_recent.",
        None,
        unit="steps",
        typical="16 to 1024",
    )
    fp8_amax_compute_algo: Literal["max", "most_recent"] | None = setting(
        "What fp8_recipe=delayed takes from its amax history: max, the largest value; most_recent, the value of the "
        "last step. null: max.",
        None,
    )
    fp8_parameters: bool = setting(
        "Keep the weights of FP8 layers in FP8 only, without a bf16 copy, and all-gather them in FP8 over the "
        "data-parallel ranks. The optimizer keeps its fp32 main weights, so training gives the same numbers. "
        "Validation multiplies by the FP8 weights. Checkpoints and exports have bf16 weights, rounded from the main "
        "weights.",
        False,
        typical="true if memory is short",
    )
    num_layers_at_start_in_bf16: NonNegativeInt = setting(
        "Layers at the input whose linear layers and experts are not quantised.", 0, unit="layers", typical="0 to 2"
    )
    num_layers_at_end_in_bf16: NonNegativeInt = setting(
        "Layers at the output whose linear layers and experts are not quantised.", 0, unit="layers", typical="0 to 2"
    )

    def is_fp8_layer(self, layer: int, num_layers: int) -> bool:
        """Whether layer `layer`, counted from 0 over the whole model, computes in FP8."""
        return (
            self.fp8_recipe is not None
            and self.num_layers_at_start_in_bf16 <= layer < num_layers - self.num_layers_at_end_in_bf16
        )

    @property
    def layers_in_bf16(self) -> tuple[int, int]:
        """(layers at the input, layers at the output) that are not quantised."""
        return self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16

    @property
    def recipe(self) -> Recipe | None:
        """The recipe with the other fp8_* settings applied and Transformer Engine's defaults filled in, or None."""
        if self.fp8_recipe is None:
            return None
        return RECIPES[self.fp8_recipe].with_settings(
            self.fp8_format, self.fp8_margin, self.fp8_amax_history_len, self.fp8_amax_compute_algo
        )


class OptimizerConfig(Section):
    """AdamW, and the learning rate of the routed experts relative to everything else."""

    lr: PositiveFloat = setting(
        "Peak learning rate; stages set theirs as a fraction of it. Unpublished for Hunyuan-Large.",
        unit="1/step",
        typical="1e-4 to 1e-3",
    )
    adam_beta1: float = setting("Decay of the first moment.", 0.9, typical="0.9")
    adam_beta2: float = setting("Decay of the second moment.", 0.95, typical="0.95")
    adam_eps: PositiveFloat = setting("Added to the square root of the second moment.", 1e-8, typical="1e-8")
    weight_decay: NonNegativeFloat = setting(
        "Decoupled weight decay of the weight matrices; norm weights are not decayed.", 0.1, typical="0.1"
    )
    clip_grad: NonNegativeFloat = setting(
        "Global gradient norm above which gradients are clipped; 0 turns clipping off.", 1.0, typical="1.0"
    )
    cpu_offload_fraction: NonNegativeFloat = setting(
        "Fraction of a rank's optimizer state (both moments and the fp32 main weights) that is kept in host memory "
        "and updated by the CPU, from 0 to 1. Whole tensors are offloaded, so the actual fraction is slightly "
        "higher. Gradients and new weights are copied between device and host in every step.",
        0.0,
        unit="fraction of the elements",
        typical="0, or 1 if GPU memory is short",
    )
    use_precision_aware_optimizer: bool = setting(
        "Keep only what the bf16 weights lack of their fp32 main weights: 2 bytes per weight instead of 4, the same "
        "value. The update reads gradients as they were reduced, without an fp32 copy, and the moments may be bf16. "
        "Needs precision.dtype=bf16, the distributed optimizer and, on a GPU, Transformer Engine.",
        False,
        typical="true if memory is short",
    )
    exp_avg_dtype: Literal["fp32", "bf16"] = setting(
        "Format in which the first moment is stored. Updates are computed in fp32; bf16 is rounded to nearest, and "
        "needs use_precision_aware_optimizer.",
        "fp32",
        typical="fp32, or bf16 if memory is short",
    )
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = setting(
        "Format in which the second moment is stored, as exp_avg_dtype. In bf16 a change below 2^-9 to 2^-8 of its "
        "value is lost.",
        "fp32",
        typical="fp32, or bf16 if memory is short",
    )
    ema_decay: float | None = setting(
        "Keep an exponential moving average of the trained weights beside them, in fp32: after each update, average = "
        "ema_decay * average + (1 - ema_decay) * weight. It begins with the weights before the first update that it "
        "follows. It is in checkpoints, `hunyuan-pretrain export --weights ema` writes it, and training does not read "
        "it. 4 bytes per trained weight, sharded as the optimizer state is. null: none.",
        None,
        typical="0.99 to 0.9999 for task=dpo; null otherwise",
    )
    expert_lr_ratio: PositiveFloat | None = setting(
        "Learning rate of the routed experts divided by that of all other weights. null: computed from "
        "expert_lr_noise_scale_tokens.",
        0.31,
        unit="ratio",
        typical="0.31",
    )
    expert_lr_noise_scale_tokens: PositiveFloat | Literal["measured"] | None = setting(
        "Gradient noise scale B_noise. If it is set, and expert_lr_ratio is null, the ratio is eps(B*topk/E) / "
        "eps(B) with eps(B) = 2 eps_max / (sqrt(B_noise/B) + sqrt(B/B_noise)), where B is the number of tokens in a "
        "global batch. measured: each stage uses what was measured before it, from its first step to its last, with a "
        "ratio of at most 1; a stage with fewer than 10 measurements before it uses expert_lr_ratio.",
        None,
        unit="tokens",
        typical="1e6 to 1e8",
    )
    measure_noise_scale_every_steps: PositiveInt | None = setting(
        "Measure the gradient noise scale in every such step, from the gradients of the first micro-batch and of the "
        "whole batch, and log it as noise_scale_tokens. A measured step reads the gradients two more times. null: "
        "never.",
        None,
        unit="steps",
        typical="10",
    )


class DataSource(Section):
    """One packed dataset and its share of a stage."""

    path: str = setting("Folder written by `hunyuan-data pack`.", is_path=True)
    weight: PositiveFloat = setting(
        "Share of the stage's tokens (padding not counted), relative to the stage's other sources, or with "
        "tier_weights to those of the same tier.",
        1.0,
        unit="ratio",
        typical="0.1 to 1; leave out a source that should not be read",
    )
    max_epochs: PositiveFloat | None = setting(
        "Limit on how often the source's documents may have been read, on average, by the end of the stage. Earlier "
        "stages count, and so do other sources with the same documents: packs of two lengths made from one tokenized "
        "folder count together. A mixture that needs more is refused.",
        None,
        unit="epochs",
        typical="1 for web text, 4 for books",
    )
    tier: str | None = setting("Quality tier; the stage's tier_weights sets its share.", None, typical="high, medium")


class StageConfig(Section):
    """One phase of training: its length, data, RoPE scaling and learning rate."""

    name: str = setting("Name in logs and reports.", typical="warmup, decay, anneal, long_32k")
    task: Literal["pretrain", "sft", "dpo"] = setting(
        "What is trained on. pretrain: every token of packed texts. sft: the answers of packed conversations "
        "(`hunyuan-data tokenize --chat`); packed texts may be mixed in. dpo: pairs of answers (`hunyuan-data tokenize "
        "--pairs`), compared with the weights of checkpoint.init_from.",
        "pretrain",
    )
    dpo_beta: PositiveFloat = setting(
        "With task=dpo: factor of the difference between the model's and the reference's log-probability ratios.",
        0.1,
        typical="0.05 to 0.5",
    )
    dpo_sft_weight: NonNegativeFloat = setting(
        "With task=dpo: factor of the mean cross-entropy of the chosen answers, which is added to the loss so that "
        "their probability does not fall.",
        0.0,
        typical="0 to 0.5",
    )
    tokens: PositiveInt | None = setting(
        "Length of the stage, rounded up to whole steps. Either this or epochs is given.", None, unit="tokens"
    )
    epochs: PositiveFloat | None = setting(
        "Length of the stage in passes over all its packed data, in place of tokens, which is derived from the data "
        "when the experiment is loaded, and recorded. Several sources are mixed in proportion to their size: each is "
        "read that often, and none has a weight. Rounded up to whole steps, so the last step may read a few sequences "
        "once more.",
        None,
        unit="epochs",
        typical="3 in the report's fine-tuning",
    )
    sequence_length: PositiveInt = setting(
        "Length of a packed sequence; the stage's data must be packed to this length.",
        unit="tokens",
        typical="4096, 32768, 262144",
    )
    global_batch_sequences: PositiveInt = setting("Sequences per step, over all ranks.", unit="sequences")
    micro_batch_sequences: PositiveInt = setting(
        "Sequences per micro-batch on each data-parallel rank.", 1, unit="sequences", typical="1"
    )
    rope_alpha: PositiveFloat = setting(
        "NTK-alpha of this stage: the RoPE base becomes rotary_base * alpha^(d/(d-2)), where d is the head width.",
        1.0,
        typical="1 at 4K, 1e5 at 256K",
    )
    lr_end: NonNegativeFloat = setting(
        "Learning rate at the end of the stage, as a fraction of optimizer.lr. A stage starts at the end value of "
        "the stage before; the first starts at 0.",
        unit="fraction of optimizer.lr",
        typical="1.0 after warmup, 0.1 after anneal",
    )
    lr_shape: Literal["linear", "cosine", "constant"] = setting(
        "Shape of the learning rate curve up to lr_end; constant stays at lr_end from the first step.", "cosine"
    )
    loss_average: Literal["tokens", "conversations"] = setting(
        "The loss of a step is the mean over all target tokens of the global batch, or over its conversations of the "
        "mean over each one's target tokens, so that long answers do not count more.",
        "tokens",
    )
    routing: Literal["model", "dropless"] | None = setting(
        "model: capacity, recycling and router losses as in the section model. dropless: every token goes to the "
        "experts it chose, there are no router losses, and padding is left out of the routing statistics. null: model "
        "for pretrain, dropless for sft and dpo.",
        None,
    )
    attention_dropout: Probability = setting(
        "Probability with which a probability of attention is dropped in training. Drawn as hidden_dropout. Flash "
        "kernels cannot repeat such a draw: attention is then computed by torch's operations, which are slower on a "
        "GPU, whatever runtime.attention_backend says; that is used in validation.",
        0.0,
        typical="0; 0.1 in the report's fine-tuning",
    )
    hidden_dropout: Probability = setting(
        "Probability with which an element of a hidden state is dropped in training: of the embedding's output, and of "
        "attention's and the experts' outputs before each is added to the residual, as in megatron-core. Drawn anew "
        "from the seed, the step and the token's place in the global batch, so it is the same under every layout and "
        "when layers are recomputed.",
        0.0,
        typical="0; 0.2 in the report's fine-tuning",
    )
    data: tuple[DataSource, ...] = setting("Packed datasets of the stage, mixed by weight.", min_length=1)
    tier_weights: dict[str, PositiveFloat] | None = setting(
        "Share of the stage's tokens per tier; the sources' weights split it within a tier. null: only the sources' "
        "weights count.",
        None,
        unit="ratio",
        typical="{high: 0.7, medium: 0.3} while annealing",
    )
    balance_attention: Literal["off", "deal", "group"] = setting(
        "Equalise attention work across ranks, because all of them wait for the slowest. deal: assign the sequences "
        "of a batch to ranks by cost. group: in addition, fill batches with groups of balance_group_sequences "
        "sequences of nearly equal cost. Batches then differ from those without it and are less varied.",
        "off",
        typical="deal at 32K, group at 256K",
    )
    balance_group_sequences: PositiveInt | None = setting(
        "Sequences per group with balance_attention=group; keep it for the whole run. null: global_batch_sequences.",
        None,
        unit="sequences",
        typical="data-parallel size x micro_batch_sequences",
    )
    skip_data_steps: tuple[tuple[PositiveInt, PositiveInt], ...] = setting(
        "Ranges [first, last] of the stage's data that are not trained on, in steps counted from 1 as `hunyuan-data "
        "where` prints them. The length of the stage does not change: it reads as much additional data beyond its "
        "own. Later stages continue after that data.",
        (),
        unit="steps",
    )

    @property
    def is_dropless(self) -> bool:
        """Whether the stage routes without the model's capacity and router losses."""
        return (self.routing or ("model" if self.task == "pretrain" else "dropless")) == "dropless"

    @property
    def global_batch_tokens(self) -> int:
        """Tokens per step, over all ranks."""
        return self.global_batch_sequences * self.sequence_length

    @property
    def num_tokens(self) -> int:
        """Length of the stage, as given or derived."""
        assert self.tokens is not None, "config.load turns epochs into tokens"
        return self.tokens

    @property
    def num_steps(self) -> int:
        """Steps of the stage: num_tokens / global_batch_tokens, rounded up."""
        return -(-self.num_tokens // self.global_batch_tokens)


class EvaluationSet(Section):
    """A named validation set."""

    name: str = setting("Name in logs: the loss is validation/<name>/loss.", typical="code, books, zh")
    path: str = setting("Folder written by `hunyuan-data pack` that no stage trains on.", is_path=True)
    max_sequences: PositiveInt | None = setting(
        "Sequences per validation; null: evaluation.max_sequences.", None, unit="sequences", typical="256"
    )


class EvaluationConfig(Section):
    """Validation during training: dropless, as the exported model will run."""

    data: str | None = setting(
        "Packed dataset that no stage trains on; its loss is validation_loss. null: validate only on sets, if there "
        "are any.",
        None,
        is_path=True,
    )
    sets: tuple[EvaluationSet, ...] = setting("More validation sets, each with its own name and losses.", ())
    every_steps: PositiveInt = setting(
        "Steps between validations; the last step is always validated.", 100, unit="steps"
    )
    max_sequences: PositiveInt | None = setting("Sequences per validation; null: all.", None, unit="sequences")
    micro_batch_sequences: PositiveInt = setting(
        "Sequences per micro-batch on each data-parallel rank.", 1, unit="sequences"
    )
    tasks: tuple[str, ...] = setting(
        "Benchmarks to run, as the command evaluate names them, such as hunyuan-base or piqa; each metric is logged as "
        "tasks/<task>/<metric>. Needs lm-eval, and benchmark files, where rank 0 is.",
        (),
        typical="piqa, arc_challenge",
    )
    tasks_every_steps: PositiveInt | None = setting(
        "Steps between runs of tasks; null: only after the last step, which always has one.", None, unit="steps"
    )
    tasks_data: str | None = setting(
        "Folder with the files of the benchmarks, as evaluate --data. null: the tasks name files of their own.",
        None,
        is_path=True,
    )
    tasks_limit: PositiveInt | None = setting(
        "Items of each task, the first ones; null: all.", None, unit="items", typical="200"
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """Every packed dataset that validation reads."""
        return (*((self.data,) if self.data is not None else ()), *(one.path for one in self.sets))

    def of_nothing(self) -> EvaluationConfig:
        """The same settings, but there is nothing to measure."""
        nothing = {"data": None, "sets": (), "tasks": ()}
        return self.model_copy(update=nothing | dict.fromkeys(("tasks_every_steps", "tasks_data", "tasks_limit")))


class CheckpointConfig(Section):
    """Saving and resuming. Checkpoints are in <run_dir>/checkpoints/step_NNNNNNN."""

    save_every_steps: PositiveInt | None = setting(
        "Steps between checkpoints; null saves only at the end, or when the job is told to stop.", None, unit="steps"
    )
    keep_last: PositiveInt | None = setting(
        "Number of complete checkpoints to keep; older ones are removed once a newer one is complete, except those of "
        "keep_every_steps and those named by `checkpoints RUN keep`. null keeps all.",
        None,
    )
    keep_every_steps: PositiveInt | None = setting(
        "Keep each checkpoint after a multiple of this many steps for ever, beside the newest keep_last.",
        None,
        unit="steps",
        typical="10 or 20 times save_every_steps",
    )
    async_save: bool = setting(
        "Write checkpoints while training goes on: it waits only for the copy of the state to the host's memory, which "
        "stays allocated. At most one is written at a time: a save waits for the one before. The last save of a job is "
        "always waited for. false: training waits for every save, and the memory is freed after it.",
        True,
    )
    resume: bool = setting(
        "Continue from the newest complete checkpoint of run_dir, if there is one. false: refuse a run_dir that has "
        "one.",
        True,
    )
    resume_from: PositiveInt | str | None = setting(
        "Branch off from this checkpoint of run_dir, a step or a folder, instead of continuing from the newest. "
        "Later checkpoints are moved to <run_dir>/abandoned/NNN, which is itself a run directory. With a folder of "
        "another run, run_dir starts as a branch of that run. Starting again with the same setting continues the "
        "branch. null: the newest.",
        None,
        unit="steps",
        typical="the step before a loss spike",
        is_path=True,
    )
    init_from: str | None = setting(
        "Checkpoint, or run directory (its newest checkpoint), whose weights a new run starts from. Its optimizer "
        "state, step and data position are not used.",
        None,
        is_path=True,
    )


class AlarmsConfig(Section):
    """What is reported while a run goes on: in log.txt, events.jsonl and at the webhook. Looked at in logged steps."""

    after_steps: PositiveInt = setting(
        "Steps that something must last before it is reported, and between two reports of a jump.", 100, unit="steps"
    )
    dead_experts: bool = setting("Experts that are chosen less than 1% as often as an even share.", True)
    expert_load_above: PositiveFloat | None = setting(
        "Choices of the busiest expert over an even share. null: off.", None, typical="4"
    )
    loss_jump_above: PositiveFloat | None = setting(
        "How far a loss is above the mean of about the last 10 records, over the usual distance (root mean square over "
        "about 50). null: off.",
        6.0,
        typical="6",
    )
    data_wait_share_above: PositiveFloat | None = setting(
        "Share of a step for which some rank waits for its batch. null: off.", 0.1, typical="0.1"
    )
    slow_rank_above: PositiveFloat | None = setting(
        "Seconds in which the slowest rank's host launches a step, over the median of all ranks. null: off.",
        2.0,
        typical="2",
    )


class LoggingConfig(Section):
    """Where metrics go. <run_dir>/metrics.jsonl is always written."""

    log_every_steps: PositiveInt = setting("Steps between lines in the log and in metrics.jsonl.", 1, unit="steps")
    tensorboard: bool = setting("Write TensorBoard events to <run_dir>/tensorboard, if tensorboard is installed.", True)
    wandb: Literal["disabled", "offline", "online"] = setting(
        "Weights & Biases; offline writes to <run_dir>/wandb and sends nothing. A resumed run continues the same W&B "
        "run, whose id is in <run_dir>/wandb_id. online needs `wandb login` first.",
        "offline",
    )
    wandb_project: str = setting("Project name in Weights & Biases.", "hunyuan-pretrain")
    mlflow: bool = setting(
        "Write to the MLflow server that the environment variable MLFLOW_TRACKING_URI names, if mlflow is installed. A "
        "resumed run continues the same MLflow run, whose id is in <run_dir>/mlflow_id.",
        False,
    )
    mlflow_experiment: str = setting("Experiment name in MLflow.", "hunyuan-pretrain")
    peak_flops_per_s: PositiveFloat | None = setting(
        "Peak dense bf16 matmul speed of one rank's device; `mfu` is relative to it, with FP8 too. null: looked up "
        "by the GPU's name. For unknown GPUs and on CPU there is no `mfu`.",
        None,
        unit="FLOP/s",
        typical="989e12 for an H100 SXM",
    )
    sink_timeout_s: PositiveInt = setting(
        "Time limit for TensorBoard, Weights & Biases or MLflow to open, and to finish after the run. One that takes "
        "longer, or fails, is dropped with a warning. They never end the run.",
        60,
        unit="seconds",
        typical="60",
    )
    webhook_url_env: str | None = setting(
        "Name of the environment variable of rank 0 that holds an http or https address: alarms, failed saves and the "
        "failure of the run are posted there as JSON. null: none.",
        None,
        typical="ALARM_WEBHOOK",
    )
    alarms: AlarmsConfig = Field(default_factory=AlarmsConfig)


class RuntimeConfig(Section):
    """The machine: device, kernels, threads, and checks at the start."""

    device: Literal["auto", "cuda", "cpu"] = setting(
        "auto uses CUDA if it is available; cuda is an error if it is not.", "auto"
    )
    transformer_engine: Literal["auto", "required", "never"] = setting(
        "Whether to use Transformer Engine's layers, with its FP8 kernels. auto: where it is installed and there is "
        "a CUDA device; elsewhere, and with dtype=fp32, the local layers, which emulate FP8 recipes. "
        "required: an error where it cannot be used. never: the local layers everywhere.",
        "auto",
    )
    kernels: Literal["auto", "never"] = setting(
        "Whether the functions between the matmuls (norms, RoPE, SwiGLU, router, permutation and combination of "
        "tokens, cross-entropy) run as this project's Triton kernels. auto: on a CUDA device where triton is "
        "installed, as it is with torch for CUDA. never: as torch operations.",
        "auto",
    )
    attention_backend: Literal["auto", BackendName] = setting(
        "What computes attention on a CUDA device. auto: the fastest that is right, of those that this machine has; "
        "before the first step each is compared with another implementation and timed on the first micro-batch. The "
        "choice is recorded and kept when the run resumes, or the run stops. A name: that one, or an error. "
        + "; ".join(f"{backend.name}: {backend.meaning}" for backend in BACKENDS.values())
        + ". Those for sequences of one length compute the micro-batches whose documents all have one length; the "
        "others are computed as with auto. On a CPU it is per_document.",
        "auto",
        typical="auto; the name in the log, to repeat a run bit by bit",
    )
    cuda_graphs: bool = setting(
        "Record forward and backward passes of a step as one CUDA graph and replay it in the later steps of the stage, "
        "so that the host launches one graph and not thousands of kernels. It helps where the host is the slower of "
        "the two: small models, FP8. Memory: what a step works in stays reserved, and validation needs its own.",
        False,
    )
    cpu_threads_per_rank: PositiveInt | None = setting(
        "CPU threads per rank when training on CPU; null divides the node's cores by its ranks.", None, unit="threads"
    )
    deterministic: bool = setting("Refuse operations whose results vary from run to run.", True)
    verify_data: Literal["digests", "digests_at_every_start", "sizes"] = setting(
        "How training and validation data are checked at the start. digests: every file against its SHA-256, once for "
        "a run, and again if it looks changed (length, times, inode). The ranks share the files, and each reads about "
        "1 GB/s if the file system is fast enough; if several nodes have copies on their own disks, not every copy is "
        "read. digests_at_every_start: also files that look unchanged, against disks that lose bits. sizes: all files "
        "exist and have the right length; run `hunyuan-data verify` once.",
        "digests",
    )
    probes: bool = setting(
        "Before training, check on a short synthetic micro-batch that packed documents do not see each other, and "
        "that every declared loss reaches the routers with its declared strength.",
        True,
    )
    distributed_timeout_s: PositiveInt = setting(
        "Time limit for a collective; one that waits longer ends the job.", 600, unit="seconds"
    )
    ranks_may_differ_in: tuple[Literal["clock", "code", "environment", "gpu", "packages"], ...] = setting(
        "What may differ between ranks; all else that is compared before the first step ends the start if it differs. "
        "clock: the time of day. code: the files of this project. environment: variables such as NCCL_ALGO. gpu: "
        "model, memory, driver, clocks and power limit. packages: versions of Python, torch, CUDA, NCCL, megatron-core "
        "and the like. Settings, data and tokenizer never may.",
        (),
        typical="[]; [gpu] on nodes of two kinds",
    )


class ResilienceConfig(Section):
    """What is done about steps that go wrong. Every decision is a line of <run_dir>/decisions.jsonl."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = setting(
        "When a step's loss or gradient norm is NaN or infinite. stop: end the run. skip: leave out the update; "
        "weights, moments and FP8 scales stay as they were, the data counts as read. rollback: go back to the newest "
        "checkpoint at least rollback_steps before, in the same process, and leave out the data from there to "
        "rollback_margin_steps after the step. skip and rollback, here and in on_spike, decide before the update: the "
        "host then waits for every step, so the device idles while the next one is launched.",
        "stop",
    )
    on_spike: Literal["stop", "skip", "rollback"] | None = setting(
        "When a finite loss, gradient norm or update norm is above its limit: the mean over the last good steps of the "
        "stage plus a number of standard deviations (spike_*_sigmas). What the values do is as in on_nonfinite; stop, "
        "too, leaves out the update, and makes the host wait. null: nothing.",
        None,
        typical="skip, or rollback",
    )
    spike_window_steps: Annotated[int, Field(ge=2)] = setting(
        "Steps over which the mean and the standard deviation (at least 1 % of the mean) are taken: the last good ones "
        "of the stage. There is no spike before half as many.",
        128,
        unit="steps",
        typical="128",
    )
    spike_loss_sigmas: PositiveFloat | None = setting(
        "Standard deviations above the mean that a loss may be. null: no limit.", 6.0, typical="6"
    )
    spike_grad_norm_sigmas: PositiveFloat | None = setting(
        "The same of the gradient norm, before clipping. null: no limit.", 6.0, typical="6"
    )
    spike_update_norm_sigmas: PositiveFloat | None = setting(
        "The same of the norm of Adam's update, m / (sqrt(v) + eps), before it is scaled by the learning rate and "
        "without weight decay. It is computed before the update, which reads gradients and moments once more. null: it "
        "is not computed.",
        None,
        typical="6",
    )
    max_skips_in_a_row: PositiveInt = setting("Skipped steps in a row after which the run stops.", 5, unit="steps")
    rollback_steps: PositiveInt = setting(
        "A roll-back goes to the newest checkpoint at least so many steps before the end of the bad step.",
        100,
        unit="steps",
        typical="100 (PaLM, arXiv 2204.02311, section 5.1)",
    )
    rollback_margin_steps: Annotated[int, Field(ge=0)] = setting(
        "Steps of data after the bad step that a roll-back leaves out too.", 100, unit="steps", typical="100 to 400"
    )
    max_rollbacks: PositiveInt = setting("Roll-backs of a run, after which it stops instead.", 3)
    rerun_every: PositiveInt | None = setting(
        "Compute forward and backward of every such step twice, from the same weights, data and generators, and "
        "compare each rank's own gradients, losses and router statistics bit by bit before they are reduced. If they "
        "differ, hardware computed wrongly: the ranks are named and the run stops, with nothing updated. null: never.",
        None,
        unit="steps",
        typical="100 to 1000",
    )

    @property
    def judges_steps(self) -> bool:
        """Whether a step is judged before its update."""
        return self.on_nonfinite != "stop" or self.on_spike is not None

    @property
    def rolls_back(self) -> bool:
        """Whether a roll-back may happen."""
        return "rollback" in (self.on_nonfinite, self.on_spike)


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): W x becomes W x + alpha / rank B A x, and only A and B are trained."""

    rank: PositiveInt = setting("Rank of A and B.", unit="channels", typical="8 to 64")
    alpha: PositiveFloat = setting("Scale of B A x, divided by rank.", unit="ratio", typical="2 x rank")
    dropout: Probability = setting(
        "Probability with which an element of an adapter's input is dropped in training. Drawn as hidden_dropout of a "
        "stage, for routed experts by the place of the row's token; q, k and v share a mask, and gate and up.",
        0.0,
        typical="0 to 0.1",
    )
    target_modules: tuple[str, ...] = setting(
        "Linear layers that get adapters, by the names that an export gives them: the end of a name, as PEFT compares "
        "it, or a pattern of the whole name with *. q_proj, k_proj, v_proj, o_proj: attention. gate_proj, up_proj, "
        "down_proj: shared and routed experts. model.layers.*.mlp.shared_mlp.*: the shared expert alone.",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        min_length=1,
    )
    adapter: str | None = setting(
        "Folder of an adapter in PEFT's format that a new run starts from; same rank, alpha and modules. null: "
        "A is drawn and B is 0.",
        None,
        is_path=True,
    )


class TuningConfig(Section):
    """Which weights are trained. The others are frozen: no gradients, no optimizer state, no buffers for them."""

    trainable: tuple[str, ...] | None = setting(
        "Patterns, with *, of the names of the parameters that are trained, such as '*.self_attention.*' for attention "
        "only. null: all of them.",
        None,
        min_length=1,
    )
    freeze_router: bool = setting("Do not train the routers.", False)
    lora: LoraConfig | None = setting(
        "Freeze the weights of checkpoint.init_from and train low-rank adapters beside them. Checkpoints hold the "
        "adapters and their optimizer state only. null: none.",
        None,
    )

    @property
    def is_partial(self) -> bool:
        """Whether some weights are frozen."""
        return self.trainable is not None or self.freeze_router or self.lora is not None


class Experiment(Section):
    """One training run, from the first step to the last."""

    name: str = setting("Name of the experiment in logs.")
    run_dir: str = setting("Folder for everything the run writes.", is_path=True)
    seed: Annotated[int, Field(ge=0, le=2**63)] = setting(
        "Seed for initialisation, data order, recycle routing and dropout.", 1234
    )
    tokenizer: str = setting(
        "Folder of the tokenizer that tokenized the data (`hunyuan-data train-tokenizer`).", is_path=True
    )
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig
    tuning: TuningConfig = Field(default_factory=TuningConfig)
    stages: tuple[StageConfig, ...] = setting("The phases of training, in order.", min_length=1)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)
