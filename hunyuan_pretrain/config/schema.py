"""The typed experiment: every key of an experiment YAML, with its unit, its meaning and its default.

`Experiment` is what `config.load.load_experiment` returns: frozen, every default filled in. Names follow megatron-core;
what core lacks takes the name of the Hunyuan-Large report (arXiv 2411.02265). Rules that span several fields are in
`config/rules.py`. This module must stay cheap to import: no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from hunyuan_pretrain.config.recipe import RECIPES, Recipe, RecipeName

__all__ = [
    "CheckpointConfig",
    "DataSource",
    "EvaluationConfig",
    "EvaluationSet",
    "Experiment",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RuntimeConfig",
    "StageConfig",
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
    """A schema field with what `hunyuan-pretrain explain` prints beside its default. Unit "tokens" takes suffixes
    (config/values.py)."""
    extra: dict[str, Any] = {"unit": unit, "typical": typical} | ({"is_path": True} if is_path else {})
    return Field(default, description=description, min_length=min_length, json_schema_extra=extra)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values cannot be changed after loading."""

    # defer_build, and default_factory in Experiment: validators are built at first use, which keeps the import under
    # 200 ms.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class ModelConfig(Section):
    """Architecture. Everything here changes what the weights mean; nothing here depends on the machine."""

    num_layers: PositiveInt = setting(
        "Transformer layers; each is attention followed by a mixture-of-experts FFN.", unit="layers", typical="64"
    )
    hidden_size: PositiveInt = setting("Width of the residual stream.", unit="channels", typical="6400")
    num_attention_heads: PositiveInt = setting("Query heads of each layer.", unit="heads", typical="80")
    num_query_groups: PositiveInt = setting(
        "Key/value heads of each layer (grouped-query attention).", unit="heads", typical="8"
    )
    kv_channels: PositiveInt | None = setting(
        "Width of one head; null means hidden_size / num_attention_heads.", None, unit="channels", typical="80"
    )
    ffn_hidden_size: PositiveInt = setting("SwiGLU width of the shared expert.", unit="channels", typical="18304")
    moe_ffn_hidden_size: PositiveInt | None = setting(
        "SwiGLU width of each routed expert; null means ffn_hidden_size.", None, unit="channels", typical="18304"
    )
    num_moe_experts: PositiveInt = setting("Routed experts of each layer.", unit="experts", typical="16")
    moe_router_topk: PositiveInt = setting(
        "Routed experts that each token visits. With 1 the combine weight is the raw softmax probability; with "
        "more, the weights are "
        "renormalised to sum to 1.",
        1,
        unit="experts",
        typical="1",
    )
    moe_expert_capacity_factor: PositiveFloat | None = setting(
        "Slots of an expert in training: ceil(factor * tokens * topk / experts) for each routing group. null: no "
        "limit (dropless, and no "
        "recycling). Evaluation and export never limit. The pretraining value of Hunyuan-Large is unpublished.",
        1.0,
        unit="ratio",
        typical="1.0",
    )
    recycle_routing: bool = setting(
        "Give a token whose expert is full to a random free slot of another expert instead of dropping it.",
        True,
        typical="true",
    )
    moe_routing_group_tokens: PositiveInt = setting(
        "Routing group: this many consecutive tokens of one sequence share the experts' capacity and one term of "
        "the balance loss. "
        "Must divide every stage's sequence_length. Small groups let every parallel layout hold whole groups.",
        512,
        unit="tokens",
        typical="512 to 4096",
    )
    moe_aux_loss_coeff: NonNegativeFloat = setting(
        "Coefficient of the balance loss E * sum_e mean(p_e) * mean(chosen_e), on the choice before recycling. "
        "Unpublished.",
        0.001,
        unit="ratio",
        typical="0.001 to 0.01",
    )
    moe_z_loss_coeff: NonNegativeFloat = setting(
        "Coefficient of the router z-loss mean(logsumexp(logits)^2).", 0.0, unit="ratio", typical="0 or 0.001"
    )
    cla_share_factor: PositiveInt = setting(
        "Cross-layer attention: consecutive layers that share one key and value projection; the first of each "
        "group owns it. "
        "1 turns it off.",
        2,
        unit="layers",
        typical="2",
    )
    qk_layernorm: bool = setting("RMSNorm of each query and key head, after RoPE.", True, typical="true")
    layernorm_epsilon: PositiveFloat = setting("Epsilon of every RMSNorm.", 1e-5, typical="1e-5")
    rotary_base: PositiveFloat = setting(
        "RoPE base before the NTK-alpha scaling of the stage.", 10000.0, typical="10000"
    )
    padded_vocab_size: PositiveInt = setting(
        "Rows of the embedding: the tokenizer's vocabulary plus padding.", unit="tokens", typical="128512"
    )
    share_embeddings_and_output_weights: bool = setting("Tie the output layer to the embedding.", True, typical="true")
    init_method_std: PositiveFloat = setting(
        "Standard deviation of the weights at initialisation.", 0.02, typical="0.02"
    )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, channels."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def expert_ffn_size(self) -> int:
        """SwiGLU width of one routed expert, channels."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size


class ParallelConfig(Section):
    """How the ranks divide the work. The data-parallel size is what is left of the world size."""

    world_size: PositiveInt | None = setting(
        "Ranks that the job must have; null accepts every number that the layout divides.", None, unit="ranks"
    )
    tensor_model_parallel_size: PositiveInt = setting(
        "Ranks that share each weight matrix.", 1, unit="ranks", typical="1 to 8"
    )
    sequence_parallel: bool = setting(
        "Split norms, residuals and the tokens of the experts over the tensor-parallel ranks too; required with them.",
        False,
    )
    pipeline_model_parallel_size: PositiveInt = setting("Ranks of the pipeline.", 1, unit="ranks", typical="1 to 16")
    virtual_pipeline_model_parallel_size: PositiveInt = setting(
        "Model chunks of each pipeline rank: above 1, the interleaved schedule.", 1, unit="chunks", typical="1 to 4"
    )
    pipeline_layout: tuple[PositiveInt, ...] | None = setting(
        "Layers of each stage, in the order in which a token passes them; stage i is on pipeline rank i % "
        "pipeline_model_parallel_size. "
        "No stage may cut a CLA group. null divides the layers evenly.",
        None,
        unit="layers",
        typical="[14, 16, 16, 18]",
    )
    context_parallel_size: PositiveInt = setting("Ranks that share each sequence.", 1, unit="ranks", typical="1 to 8")
    context_parallel_method: Literal["all_gather", "all_to_all"] = setting(
        "How attention sees the whole sequence: all_gather collects keys and values, once for each CLA group, "
        "and works for any number of "
        "ranks; all_to_all (Ulysses) trades tokens for heads and needs at least as many key/value heads as ranks.",
        "all_gather",
    )
    expert_model_parallel_size: PositiveInt = setting(
        "Ranks that share the routed experts of each layer.", 1, unit="ranks", typical="8 to 16"
    )
    expert_tensor_parallel_size: PositiveInt = setting(
        "Ranks that share each routed expert.", 1, unit="ranks", typical="1"
    )
    use_distributed_optimizer: bool = setting("Shard the optimizer state over the data-parallel ranks (ZeRO-1).", True)
    overlap_grad_reduce: bool = setting("Reduce gradients while the backward pass still runs.", False)
    overlap_param_gather: bool = setting("Gather updated parameters while the next forward pass runs.", False)
    recompute: Literal["none", "selective", "cla_group"] = setting(
        "Activations kept for the backward pass: all of them; all but those inside the experts, shared and "
        "routed (selective); or only the "
        "input of each CLA group (full recompute). The rest is computed again.",
        "none",
    )


class PrecisionConfig(Section):
    """Number formats of training."""

    dtype: Literal["bf16", "fp32"] = setting(
        "Format of weights and activations; with bf16 the optimizer keeps fp32 main weights.", "bf16", typical="bf16"
    )
    grad_reduce_in_fp32: bool = setting("Accumulate and reduce gradients in fp32.", True, typical="true")
    fp8_recipe: RecipeName | None = setting(
        "Quantise the operands of the linear layers and experts to FP8. "
        + "; ".join(f"{recipe.name}: {recipe.meaning}" for recipe in RECIPES.values())
        + ". Router, norms, embedding, output layer and attention itself stay in dtype. Runs on Transformer Engine's "
        "kernels, or emulated, see runtime.transformer_engine. null: no FP8.",
        None,
        typical="blockwise on Hopper, mxfp8 on Blackwell",
    )
    fp8_format: Literal["e4m3", "hybrid"] | None = setting(
        "Format of the quantised values; hybrid is E4M3 for inputs and weights, and E5M2, of more range and less "
        "precision, for gradients. "
        "null: Transformer Engine's choice for the recipe, hybrid with delayed and tensorwise, e4m3 with the others.",
        None,
    )
    fp8_margin: int | None = setting(
        "Scales of fp8_recipe=delayed are divided by 2^margin, room for values to grow. null: 0.",
        None,
        unit="powers of two",
        typical="0",
    )
    fp8_amax_history_len: PositiveInt | None = setting(
        "Steps whose largest values fp8_recipe=delayed remembers. null: 1024.", None, unit="steps", typical="16 to 1024"
    )
    fp8_amax_compute_algo: Literal["max", "most_recent"] | None = setting(
        "What fp8_recipe=delayed takes of its history: the largest value, or that of the last step. null: max.", None
    )
    fp8_parameters: bool = setting(
        "Keep the weights of layers in FP8 in that format only, without a copy in bf16, and gather them so over "
        "the data-parallel ranks. "
        "The optimizer's fp32 main weights stay, and every number of the training; validation multiplies by the "
        "FP8 weights. Checkpoints "
        "and exports have bf16 weights, rounded from the main ones.",
        False,
        typical="true where memory is short",
    )
    num_layers_at_start_in_bf16: NonNegativeInt = setting(
        "Layers at the input whose linear layers and experts stay out of FP8.", 0, unit="layers", typical="0 to 2"
    )
    num_layers_at_end_in_bf16: NonNegativeInt = setting("The same at the output.", 0, unit="layers", typical="0 to 2")

    def is_fp8_layer(self, layer: int, num_layers: int) -> bool:
        """Whether layer `layer`, counted from 0 over the whole model, computes in FP8."""
        return (
            self.fp8_recipe is not None
            and self.num_layers_at_start_in_bf16 <= layer < num_layers - self.num_layers_at_end_in_bf16
        )

    @property
    def layers_in_bf16(self) -> tuple[int, int]:
        """Layers at the input and at the output that stay out of FP8."""
        return self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16

    @property
    def recipe(self) -> Recipe | None:
        """`fp8_recipe` under the other settings of FP8, Transformer Engine's defaults filled in; None: no FP8."""
        if self.fp8_recipe is None:
            return None
        return RECIPES[self.fp8_recipe].with_settings(
            self.fp8_format, self.fp8_margin, self.fp8_amax_history_len, self.fp8_amax_compute_algo
        )


class OptimizerConfig(Section):
    """AdamW, and the learning rate of the routed experts relative to everything else."""

    lr: PositiveFloat = setting(
        "Peak learning rate; each stage moves it by a fraction of this. Unpublished for Hunyuan-Large.",
        unit="1/step",
        typical="1e-4 to 1e-3",
    )
    adam_beta1: float = setting("Decay of the first moment.", 0.9, typical="0.9")
    adam_beta2: float = setting("Decay of the second moment.", 0.95, typical="0.95")
    adam_eps: PositiveFloat = setting("Added to the root of the second moment.", 1e-8, typical="1e-8")
    weight_decay: NonNegativeFloat = setting(
        "Decoupled weight decay of matrices; norm weights have none.", 0.1, typical="0.1"
    )
    clip_grad: NonNegativeFloat = setting(
        "Global gradient norm is clipped to this; 0 turns clipping off.", 1.0, typical="1.0"
    )
    cpu_offload_fraction: NonNegativeFloat = setting(
        "Share of a rank's optimizer state (both moments and the fp32 main weights) that is kept in the host's "
        "memory and updated by the "
        "CPU, from 0 to 1; whole tensors, so a little more. Gradients and new weights travel between the two in "
        "every step.",
        0.0,
        unit="fraction of the elements",
        typical="0, or 1 where the memory of the GPU does not suffice",
    )
    expert_lr_ratio: PositiveFloat | None = setting(
        "Learning rate of routed experts over that of all other weights. null: computed from "
        "expert_lr_noise_scale_tokens.",
        0.31,
        unit="ratio",
        typical="0.31",
    )
    expert_lr_noise_scale_tokens: PositiveFloat | None = setting(
        "Gradient noise scale B_noise. Given (with expert_lr_ratio null), the ratio is eps(B*topk/E) / eps(B) with "
        "eps(B) = 2 eps_max / (sqrt(B_noise/B) + sqrt(B/B_noise)), B the tokens of a global batch.",
        None,
        unit="tokens",
        typical="1e6 to 1e8",
    )


class DataSource(Section):
    """One packed dataset and its share of a stage."""

    path: str = setting("Folder written by `hunyuan-data pack`.", is_path=True)
    weight: PositiveFloat = setting(
        "Share of the stage's tokens (padding not counted), relative to the other sources of the stage, or of "
        "its tier.",
        1.0,
        unit="ratio",
        typical="0.1 to 1; a source that shall not be read is left out",
    )
    max_epochs: PositiveFloat | None = setting(
        "How often the source's documents may have been read on average when the stage ends, earlier stages "
        "included and whichever sources "
        "hold them: packs of two lengths over one tokenized folder count together. A mixture that needs more is "
        "refused.",
        None,
        unit="epochs",
        typical="1 for web text, 4 for books",
    )
    tier: str | None = setting(
        "Quality tier, whose share the stage's tier_weights gives.", None, typical="high, medium"
    )


class StageConfig(Section):
    """One phase of training: its length, its data, its positions and where it takes the learning rate."""

    name: str = setting("Name in logs and reports.", typical="warmup, decay, anneal, long_32k")
    tokens: PositiveInt = setting("Length of the stage, rounded up to whole steps.", unit="tokens")
    sequence_length: PositiveInt = setting(
        "Length of a packed sequence; the stage's data must be packed to it.",
        unit="tokens",
        typical="4096, 32768, 262144",
    )
    global_batch_sequences: PositiveInt = setting("Sequences of one step, over all ranks.", unit="sequences")
    micro_batch_sequences: PositiveInt = setting(
        "Sequences that one rank passes through the model at a time.", 1, unit="sequences", typical="1"
    )
    rope_alpha: PositiveFloat = setting(
        "NTK-alpha of this stage: the RoPE base becomes rotary_base * alpha^(d/(d-2)), d the head width.",
        1.0,
        typical="1 at 4K, 1e5 at 256K",
    )
    lr_end: NonNegativeFloat = setting(
        "Learning rate at the end of the stage, as a fraction of optimizer.lr. It starts where the stage before ended; "
        "the first starts at 0.",
        unit="fraction of optimizer.lr",
        typical="1.0 after warmup, 0.1 after anneal",
    )
    lr_shape: Literal["linear", "cosine", "constant"] = setting(
        "Path of the learning rate; constant stays at lr_end from the first step.", "cosine"
    )
    data: tuple[DataSource, ...] = setting("Packed datasets of the stage, mixed by weight.", min_length=1)
    tier_weights: dict[str, PositiveFloat] | None = setting(
        "Share of the stage's tokens by tier; within a tier the sources' weights decide. null: the weights "
        "alone decide.",
        None,
        unit="ratio",
        typical="{high: 0.7, medium: 0.3} while annealing",
    )
    balance_attention: Literal["off", "deal", "group"] = setting(
        "Equal attention work for the ranks, which wait for the slowest. deal: decide by cost which rank takes "
        "which sequence of a batch. "
        "group: besides, fill batches with groups of balance_group_sequences sequences of nearly equal cost; the "
        "batches are other ones "
        "than without, and less varied.",
        "off",
        typical="deal at 32K, group at 256K",
    )
    balance_group_sequences: PositiveInt | None = setting(
        "Sequences in a group of balance_attention=group; keep it for the whole run. null: global_batch_sequences.",
        None,
        unit="sequences",
        typical="data-parallel size x micro_batch_sequences",
    )
    skip_data_steps: tuple[tuple[PositiveInt, PositiveInt], ...] = setting(
        "Ranges [first, last] of the stage's data, in steps from 1 as `hunyuan-data where` prints them, that are "
        "not trained on. The stage "
        "is as long as without; it takes as much data beyond its own. Later stages go on after that.",
        (),
        unit="steps",
    )

    @property
    def global_batch_tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.global_batch_sequences * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Steps of the stage: tokens / global_batch_tokens, rounded up."""
        return -(-self.tokens // self.global_batch_tokens)


class EvaluationSet(Section):
    """A validation set with a name."""

    name: str = setting("Name in logs: its loss is validation/<name>/loss.", typical="code, books, zh")
    path: str = setting("Folder written by `hunyuan-data pack`, which no stage trains on.", is_path=True)
    max_sequences: PositiveInt | None = setting(
        "Sequences of one validation; null: evaluation.max_sequences.", None, unit="sequences", typical="256"
    )


class EvaluationConfig(Section):
    """Validation during training, dropless, as the exported model will run."""

    data: str | None = setting(
        "Packed dataset that no stage trains on; its loss is validation_loss. null: only those of sets, if there "
        "are any.",
        None,
        is_path=True,
    )
    sets: tuple[EvaluationSet, ...] = setting("More validation sets, each with a name and losses of its own.", ())
    every_steps: PositiveInt = setting(
        "Steps between validations; the last step is always validated.", 100, unit="steps"
    )
    max_sequences: PositiveInt | None = setting("Sequences of one validation; null takes all.", None, unit="sequences")
    micro_batch_sequences: PositiveInt = setting(
        "Sequences that one rank passes through the model at a time.", 1, unit="sequences"
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """Every packed dataset that validation reads."""
        return (*((self.data,) if self.data is not None else ()), *(one.path for one in self.sets))


class CheckpointConfig(Section):
    """Saving and resuming. Checkpoints are in <run_dir>/checkpoints/step_NNNNNNN."""

    save_every_steps: PositiveInt | None = setting(
        "Steps between checkpoints; null saves only at the end or when the job is told to stop.", None, unit="steps"
    )
    keep_last: PositiveInt | None = setting(
        "Complete checkpoints kept; older ones are removed after a newer one is complete. null keeps all.", None
    )
    resume: bool = setting(
        "Go on from the newest complete checkpoint of run_dir, if there is one. false: refuse a run_dir that has one.",
        True,
    )
    resume_from: PositiveInt | str | None = setting(
        "Branch off from this checkpoint of run_dir, a step or a folder, instead of going on from the newest. "
        "What came after is moved to "
        "<run_dir>/abandoned/NNN, itself a run directory. A folder of another run begins run_dir as a branch of "
        "that run. The same start "
        "again goes on with the branch. null: the newest.",
        None,
        unit="steps",
        typical="the step before a spike of the loss",
        is_path=True,
    )
    init_from: str | None = setting(
        "Checkpoint, or run directory (its newest one), whose weights a fresh run starts from; not its "
        "optimizer, step or data position.",
        None,
        is_path=True,
    )


class LoggingConfig(Section):
    """Where metrics go. <run_dir>/metrics.jsonl is always written."""

    log_every_steps: PositiveInt = setting("Steps between lines of the log and of metrics.jsonl.", 1, unit="steps")
    tensorboard: bool = setting("Write TensorBoard events to <run_dir>/tensorboard, if tensorboard is installed.", True)
    wandb: Literal["disabled", "offline", "online"] = setting(
        "Weights & Biases; offline writes to <run_dir>/wandb and sends nothing. A run that is resumed goes on in "
        "the same one, whose id is "
        "in <run_dir>/wandb_id; online needs `wandb login` before.",
        "offline",
    )
    wandb_project: str = setting("Project name in Weights & Biases.", "hunyuan-pretrain")
    peak_flops_per_s: PositiveFloat | None = setting(
        "Peak of one rank's device in dense bf16 products, of which `mfu` is a share, under FP8 too. null: "
        "looked up by the GPU's name; "
        "where that is not known, and on CPU, there is no `mfu`.",
        None,
        unit="FLOP/s",
        typical="989e12 for an H100 SXM",
    )
    sink_timeout_s: PositiveInt = setting(
        "TensorBoard or Weights & Biases that takes longer than this to open, or to finish after the run, is "
        "given up with a warning; one "
        "that fails is too. Neither ends the run.",
        60,
        unit="seconds",
        typical="60",
    )


class RuntimeConfig(Section):
    """The machine."""

    device: Literal["auto", "cuda", "cpu"] = setting(
        "auto takes CUDA if there is one; cuda is an error where there is none.", "auto"
    )
    transformer_engine: Literal["auto", "required", "never"] = setting(
        "Layers of Transformer Engine, with its FP8 kernels. auto: where it is installed and there is a CUDA "
        "device, and elsewhere this "
        "project's own layers, which emulate FP8 recipes; required: an error where it cannot be used; never: own "
        "layers everywhere.",
        "auto",
    )
    cpu_threads_per_rank: PositiveInt | None = setting(
        "Threads of one rank on CPU; null divides the cores by the ranks of the node.", None, unit="threads"
    )
    deterministic: bool = setting("Refuse operations whose result changes from run to run.", True)
    verify_data: Literal["digests", "sizes"] = setting(
        "What is checked of the data, that of validation too, at each start. digests: every file against its "
        "SHA-256; the ranks share the "
        "files, each reading about 1 GB/s where the file system gives that, so copies on the disks of several "
        "nodes are not all read. "
        "sizes: that all files are there and as long as they should be. digests is the default because a changed "
        "token is found by nothing "
        "else; take sizes where a start would take too long, and run `hunyuan-data verify` once.",
        "digests",
    )
    probes: bool = setting(
        "Before training, check on a short synthetic micro-batch that documents of a pack do not see each other "
        "and that every declared "
        "loss reaches the routers with its declared strength.",
        True,
    )
    distributed_timeout_s: PositiveInt = setting(
        "A collective that waits longer than this ends the job.", 600, unit="seconds"
    )


class Experiment(Section):
    """One training run, from the first step to the last."""

    name: str = setting("Name of the experiment in logs.")
    run_dir: str = setting("Folder of everything the run writes.", is_path=True)
    seed: Annotated[int, Field(ge=0, le=2**63)] = setting(
        "Seed of initialisation, data order and recycle routing.", 1234
    )
    tokenizer: str = setting(
        "Folder of the tokenizer that the data was tokenized with (`hunyuan-data train-tokenizer`).", is_path=True
    )
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig
    stages: tuple[StageConfig, ...] = setting("The phases of training, in order.", min_length=1)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
