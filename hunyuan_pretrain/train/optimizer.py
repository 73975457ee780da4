"""AdamW through megatron-core, with the routed experts in parameter groups of their own learning rate.

Expert-specific learning rate (arXiv 2411.02265 section 2.2.1): for Adam-style optimisers the best rate at batch size B is
eps(B) = 2 eps_max / (sqrt(B_noise / B) + sqrt(B / B_noise)). A routed expert sees about B * topk / E tokens of a batch, everything else sees
B, so the rate of a routed expert is eps(B * topk / E) / eps(B) of the others'. The report gives "approximately 0.31" for E = 16 and says that
routed experts are scaled down; as printed there, eps(B) / eps(B / 16), the ratio 0.31 would scale them up. The inverse used here is the
reading under which its words and its number agree (B = 0.26 B_noise).
"""

from __future__ import annotations

import math

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import get_standard_config_overrides as standard_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.model.hunyuan_config import DTYPES
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel


def optimal_lr(batch_tokens: float, noise_scale_tokens: float, lr_max: float = 1.0) -> float:
    """eps(B) = 2 eps_max / (sqrt(B_noise / B) + sqrt(B / B_noise)); tokens, tokens -> the unit of lr_max."""
    ratio = batch_tokens / noise_scale_tokens
    return 2 * lr_max / (math.sqrt(1 / ratio) + math.sqrt(ratio))


def expert_lr_ratio(experiment: Experiment, global_batch_tokens: int) -> float:
    """Learning rate of routed experts over that of all other weights: the configured ratio, or eps(B * topk / E) / eps(B)."""
    optimizer, model = experiment.optimizer, experiment.model
    if optimizer.expert_lr_ratio is not None:
        return optimizer.expert_lr_ratio
    noise = optimizer.expert_lr_noise_scale_tokens
    assert noise is not None, "config.rules makes sure that one of the two is set"
    seen_tokens = global_batch_tokens * model.moe_router_topk / model.num_moe_experts
    return optimal_lr(seen_tokens, noise) / optimal_lr(global_batch_tokens, noise)


def wrap_data_parallel(model: HunyuanModel, experiment: Experiment, groups: ProcessGroupCollection) -> DistributedDataParallel:
    """Core's gradient buffers and their reduction over the data-parallel ranks."""
    parallel = experiment.parallel
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=experiment.precision.grad_reduce_in_fp32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    return DistributedDataParallel(model.config, config, model, pg_collection=groups)


def build_optimizer(model: DistributedDataParallel, experiment: Experiment, groups: ProcessGroupCollection) -> MegatronOptimizer:
    """AdamW over the wrapped model; routed experts are in groups marked `is_expert_lr`, norms have no weight decay."""
    settings = experiment.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=experiment.precision.dtype == "bf16",
        params_dtype=DTYPES[experiment.precision.dtype],
        use_distributed_optimizer=experiment.parallel.use_distributed_optimizer,
        overlap_param_gather=experiment.parallel.overlap_param_gather,
    )
    is_routed_expert = ParamPredicate(name="routed_expert", fn=lambda parameter: getattr(parameter, "is_routed_expert", False))
    overrides = standard_overrides(config) | {ParamKey(predicate=is_routed_expert): {"is_expert_lr": True}}
    optimizer = get_megatron_optimizer(config, [model], overrides, use_gloo_process_groups=False, pg_collection=groups)
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        if "fused" in group:  # torch's AdamW: one pass over memory instead of about twelve
            group["fused"], group["foreach"] = True, False
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, expert_ratio: float) -> None:
    """Set the rate of every parameter group: `lr`, and lr * expert_ratio for routed experts."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (expert_ratio if group.get("is_expert_lr") else 1.0)


def describe_groups(optimizer: MegatronOptimizer, lr: float, expert_ratio: float) -> list[str]:
    """A line for each parameter group of this rank: what is in it, how many elements, peak learning rate, weight decay."""
    lines = []
    for group in optimizer.param_groups:
        is_expert = bool(group.get("is_expert_lr"))
        what = "routed experts" if is_expert else "norms" if group["wd_mult"] == 0 else "all other weights"
        size = sum(parameter.numel() for parameter in group["params"])
        rate = lr * (expert_ratio if is_expert else 1.0)
        lines.append(f"{what}: {size:,} elements on this rank, peak learning rate {rate:.3g}, weight decay {group['weight_decay']:g}")
    return lines
