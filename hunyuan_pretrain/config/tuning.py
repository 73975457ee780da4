"""Which weights a run trains (section `tuning`): names of parameters and of LoRA's targets, and their rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from hunyuan_pretrain.config.derived import pipeline_stages, stages_of
from hunyuan_pretrain.config.errors import Problem
from hunyuan_pretrain.config.schema import Experiment, LoraConfig, ModelConfig, TuningConfig

ADAPTER = ".adapter."
"""In the name of every weight that LoRA adds."""
EXPERTS = "mlp.experts."
"""In the name of every weight of routed experts."""


class Linear(NamedTuple):
    """A linear layer of the model and the modules of a Hugging Face model that it holds."""

    name: str
    """Within its layer."""
    modules: tuple[str, ...]
    """Within their layer; {} stands for the number of a routed expert."""
    is_row_parallel: bool
    """Sharded along its input, not its output."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The last part of each module's name, such as q_proj."""
        return tuple(module.rpartition(".")[2] for module in self.modules)

    @property
    def is_routed(self) -> bool:
        """Of routed experts."""
        return self.name.startswith(EXPERTS)


def linears_of_layer(model: ModelConfig, layer: int) -> tuple[Linear, ...]:
    """The linear layers of a layer, in the order of the forward pass."""
    is_owner = layer % model.cla_share_factor == 0
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        Linear("self_attention.linear_qkv", qkv, False)
        if is_owner
        else Linear("self_attention.linear_q", qkv[:1], False),
        Linear("self_attention.linear_proj", ("self_attn.o_proj",), True),
        Linear("mlp.experts.linear_fc1", ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"), False),
        Linear("mlp.experts.linear_fc2", ("mlp.experts.{}.down_proj",), True),
        Linear("mlp.shared_experts.linear_fc1", ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"), False),
        Linear("mlp.shared_experts.linear_fc2", ("mlp.shared_mlp.down_proj",), True),
    )


def targets(model: ModelConfig, lora: LoraConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """Name of each linear layer that LoRA adapts in a layer -> the parts that it adapts, in their order."""
    found = {}
    for linear in linears_of_layer(model, layer):
        parts = tuple(
            part
            for part, module in zip(linear.parts, linear.modules, strict=True)
            if any(_matches(name, lora.target_modules) for name in _names(model, layer, module))
        )
        if parts:
            found[linear.name] = parts
    return found


def _names(model: ModelConfig, layer: int, module: str) -> list[str]:
    """The full names of a module; those of all experts."""
    name = f"model.layers.{layer}.{module}"
    return [name.format(expert) for expert in range(model.num_moe_experts)] if "{}" in name else [name]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module's name ends with one of the patterns, as PEFT compares them, or matches it with wildcards."""
    return any(name == one or name.endswith(f".{one}") or fnmatchcase(name, one) for one in patterns)


def adapted_sizes(model: ModelConfig, linear: Linear, part: str) -> tuple[int, int]:
    """(input size, output size) of a part of a linear layer, whole."""
    hidden, head = model.hidden_size, model.head_dim
    width = model.expert_ffn_size if linear.is_routed else model.ffn_hidden_size
    return {
        "q_proj": (hidden, model.num_attention_heads * head),
        "k_proj": (hidden, model.num_query_groups * head),
        "v_proj": (hidden, model.num_query_groups * head),
        "o_proj": (model.num_attention_heads * head, hidden),
        "gate_proj": (hidden, width),
        "up_proj": (hidden, width),
        "down_proj": (width, hidden),
    }[part]


def names_of_layer(model: ModelConfig, layer: int) -> Iterator[str]:
    """The model's own parameters in a layer, in the order in which they are registered."""
    prefix = f"decoder.layers.{layer}."
    qkv = "linear_qkv" if layer % model.cla_share_factor == 0 else "linear_q"
    names = ["input_layernorm", f"self_attention.{qkv}"]
    names += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if model.qk_layernorm else []
    names += ["self_attention.linear_proj", "pre_mlp_layernorm", "mlp.router"]
    names += ["mlp.experts.linear_fc1", "mlp.experts.linear_fc2"]
    names += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    yield from (f"{prefix}{name}.weight" for name in names)


EMBEDDING, FINAL_NORM, HEAD = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


def parameter_names(model: ModelConfig) -> list[str]:
    """All parameters of the model, without adapters."""
    layers = [name for layer in range(model.num_layers) for name in names_of_layer(model, layer)]
    head = [] if model.share_embeddings_and_output_weights else [HEAD]
    return [EMBEDDING, *layers, FINAL_NORM, *head]


def is_trained(tuning: TuningConfig, name: str) -> bool:
    """Whether a run trains the parameter of this name."""
    if tuning.lora is not None:
        return ADAPTER in name
    if tuning.freeze_router and ".mlp.router." in name:
        return False
    return tuning.trainable is None or any(fnmatchcase(name, one) for one in tuning.trainable)


# --- rules ------------------------------------------------------------------------------------------------------------


def patterns_match(experiment: Experiment) -> Iterator[Problem]:
    """Every pattern names something, and LoRA adapts all routed experts of a layer or none."""
    tuning, model = experiment.tuning, experiment.model
    names = parameter_names(model)
    for number, pattern in enumerate(tuning.trainable or ()):
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = "such as '*.self_attention.*'; names are those of a checkpoint, such as " + names[1]
            yield Problem(f"tuning.trainable.{number}", pattern, "matches no parameter of the model", hint)
    if tuning.lora is None:
        return
    modules = [
        (linear, layer, module)
        for layer in range(model.num_layers)
        for linear in linears_of_layer(model, layer)
        for module in linear.modules
    ]
    for number, pattern in enumerate(tuning.lora.target_modules):
        matched = [
            [_matches(name, (pattern,)) for name in _names(model, layer, module)] for _, layer, module in modules
        ]
        where = f"tuning.lora.target_modules.{number}"
        if not any(map(any, matched)):
            hint = "use q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj, or a pattern of full names "
            yield Problem(where, pattern, "matches no linear layer", f"{hint}such as '*.mlp.shared_mlp.*'")
        elif any(any(one) and not all(one) for one in matched):
            hint = re.sub(r"experts\.[^.]+\.", "experts.*.", pattern)
            rule = "matches some routed experts of a layer and not the others; they are adapted together"
            yield Problem(where, pattern, rule, f"use '{hint}'")


def one_way_to_choose_weights(experiment: Experiment) -> Iterator[Problem]:
    """LoRA trains its adapters only, on weights that exist."""
    tuning = experiment.tuning
    if tuning.lora is None:
        return
    if tuning.trainable is not None:
        rule = "has no effect with tuning.lora, which trains its adapters only"
        yield Problem("tuning.trainable", list(tuning.trainable), rule, "leave one of them out")
    if tuning.freeze_router:
        yield Problem("tuning.freeze_router", True, "has no effect with tuning.lora", "leave it out")
    if experiment.checkpoint.init_from is None:
        rule = "null, but an adapter needs the weights that it adapts: tuning.lora"
        yield Problem("checkpoint.init_from", None, rule, "give a checkpoint, or what `import` wrote")


def parts_of_weights_suit_the_kernels(experiment: Experiment) -> Iterator[Problem]:
    """FP8, Transformer Engine and an offloaded optimizer have not been tried with frozen weights."""
    if not experiment.tuning.is_partial:
        return
    why = "with tuning, some weights are frozen; that runs on the local layers in bf16 or fp32 only"
    if experiment.precision.fp8_recipe is not None:
        yield Problem("precision.fp8_recipe", experiment.precision.fp8_recipe, why, "set it to null")
    if experiment.runtime.transformer_engine == "required":
        yield Problem("runtime.transformer_engine", "required", why, "set it to auto")
    if experiment.runtime.cuda_graphs:
        yield Problem("runtime.cuda_graphs", True, "a step with frozen weights has never been recorded", "use false")
    if experiment.optimizer.measure_noise_scale_every_steps is not None:
        steps = experiment.optimizer.measure_noise_scale_every_steps
        rule = "the noise scale is that of all gradients; with tuning, some weights have none"
        yield Problem("optimizer.measure_noise_scale_every_steps", steps, rule, "set it to null")


def every_pipeline_rank_trains(experiment: Experiment) -> Iterator[Problem]:
    """The ranks sum gradient norms over groups that cross pipeline ranks: each needs the same kinds of weights."""
    tuning, model, parallel = experiment.tuning, experiment.model, experiment.parallel
    if not tuning.is_partial or any(True for _ in patterns_match(experiment)):
        return
    kinds = []
    for rank in range(parallel.pipeline_model_parallel_size):
        found: set[bool] = set()
        for number, layers in stages_of(model, parallel, rank).items():
            names = [name for layer in layers for name in trained_names(experiment, layer)]
            last = len(pipeline_stages(model, parallel)) - 1
            names += [EMBEDDING] if number == 0 and is_trained(tuning, EMBEDDING) else []
            names += [name for name in (FINAL_NORM, HEAD) if number == last and is_trained(tuning, name)]
            found |= {EXPERTS in name for name in names}
        kinds.append(found)
    if not all(kinds):
        rule = f"pipeline rank {kinds.index(set())} would train nothing"
        yield Problem("tuning", Problem.NO_VALUE, rule, "choose weights of every rank's layers, or fewer ranks")
    elif len(set(map(frozenset, kinds))) > 1:
        rule = "some pipeline ranks would train routed experts or other weights, and some would not"
        yield Problem("tuning", Problem.NO_VALUE, rule, "choose the same kinds in every rank's layers, or fewer ranks")


def trained_names(experiment: Experiment, layer: int) -> list[str]:
    """Names of the weights of a layer that are trained; with LoRA, of the linear layers that have adapters."""
    if (lora := experiment.tuning.lora) is not None:
        return [f"decoder.layers.{layer}.{name}" for name in targets(experiment.model, lora, layer)]
    return [name for name in names_of_layer(experiment.model, layer) if is_trained(experiment.tuning, name)]


TUNING_RULES = (
    patterns_match,
    one_way_to_choose_weights,
    parts_of_weights_suit_the_kernels,
    every_pipeline_rank_trains,
)
