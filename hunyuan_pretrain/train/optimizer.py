"""AdamW through megatron-core, with separate parameter groups and learning rate for the routed experts.

The ratio of the two rates comes from config.derived.expert_lr_ratio, which cites its source.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer import get_standard_config_overrides as standard_overrides
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.config.derived import Overlaps, overlaps
from hunyuan_pretrain.config.schema import Experiment
from hunyuan_pretrain.model.hunyuan_config import DTYPES
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel
from hunyuan_pretrain.runtime.cpu_megatron import weights_count_as_on_a_device
from hunyuan_pretrain.runtime.handover import handed_over
from hunyuan_pretrain.train.precision_aware_adam import PrecisionAwareAdamW
from hunyuan_pretrain.train.weight_average import averages_of, follow, keep_average


def wrap_data_parallel(
    chunks: list[HunyuanModel], experiment: Experiment, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Wrap each model chunk in core's DDP: gradient buffers, reduced over the data-parallel ranks."""
    parallel = experiment.parallel
    overlapped = _overlaps(experiment, groups)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=experiment.precision.grad_reduce_in_fp32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=overlapped.grad_reduce,
        overlap_param_gather=overlapped.param_gather,
        fp8_param_gather=_has_fp8_parameters(chunks[0]),
    )
    wrapped = [DistributedDataParallel(model.config, config, model, pg_collection=groups) for model in chunks]
    if overlapped.grad_reduce:
        # core counts the gradients of a step to know when to reduce; without this it would learn the count from the
        # first stage's steps and reduce too early in a stage with more micro-batches
        no_sync = [model.no_sync for model in wrapped]
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], experiment: Experiment, groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """AdamW over the wrapped chunks. Groups of routed experts are marked `is_expert_lr`; norms have no weight decay.

    With optimizer.cpu_offload_fraction, the inner optimizer of each part is core's HybridDeviceOptimizer. With
    optimizer.use_precision_aware_optimizer it is Transformer Engine's FusedAdam on a GPU, PrecisionAwareAdamW on a CPU.
    """
    settings = experiment.optimizer
    is_offloaded = settings.cpu_offload_fraction > 0
    config = _core_settings(experiment, _has_fp8_parameters(chunks[0].module))
    config.overlap_param_gather = _overlaps(experiment, groups).param_gather
    is_without_kernels = settings.use_precision_aware_optimizer and not config.use_precision_aware_optimizer
    if is_offloaded or is_without_kernels:
        # The inner optimizer then also keeps the fp32 main weights; otherwise the distributed optimizer would hold
        # a second copy on the device. Set here because OptimizerConfig allows it only with certain Transformer Engine
        # versions, and Transformer Engine is not involved
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    is_routed_expert = ParamPredicate(
        name="routed_expert", fn=lambda parameter: getattr(parameter, "is_routed_expert", False)
    )
    overrides = standard_overrides(config) | {ParamKey(predicate=is_routed_expert): {"is_expert_lr": True}}
    # no_grad: core's shards of fp32 weights (such as routers) would otherwise be non-leaf views, which torch optimizers
    # reject
    with torch.no_grad(), weights_count_as_on_a_device() if is_offloaded else nullcontext():
        optimizer = get_megatron_optimizer(
            config, chunks, overrides, use_gloo_process_groups=False, pg_collection=groups
        )
        if is_without_kernels:
            for part in optimizer.chained_optimizers:
                part.optimizer = _with_split_weights(part.optimizer, experiment)
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        if "fused" in group:  # torch's AdamW: one pass over memory instead of about twelve
            group["fused"], group["foreach"] = True, False
    for part in optimizer.chained_optimizers[:-1] if experiment.parallel.use_distributed_optimizer else []:
        # each part of core's optimizer gathers the weights of all parts after its update; only the last one has to
        part.ddp_config = dataclasses.replace(part.ddp_config, overlap_param_gather=True)
    if settings.ema_decay is not None:
        keep_average(chunks, settings.ema_decay)
    return optimizer


def _overlaps(experiment: Experiment, groups: ProcessGroupCollection) -> Overlaps:
    most_copies = max(groups.dp_cp.size(), groups.expt_dp.size())
    return overlaps(experiment.parallel, most_copies, experiment.runtime.cuda_graphs)


def _core_settings(experiment: Experiment, has_fp8_parameters: bool) -> OptimizerConfig:
    """Core's settings of the optimizer. Its precision-aware optimizer is left out where only torch's Adam is
    available."""
    settings, precision = experiment.optimizer, experiment.precision
    is_offloaded = settings.cpu_offload_fraction > 0
    formats = {}
    if settings.use_precision_aware_optimizer and not USING_PYTORCH_OPTIMIZER:
        formats = {"use_precision_aware_optimizer": True} | _moment_formats(experiment)
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=precision.dtype == "bf16",
        params_dtype=DTYPES[precision.dtype],
        use_distributed_optimizer=experiment.parallel.use_distributed_optimizer,
        optimizer_cpu_offload=is_offloaded,
        optimizer_offload_fraction=settings.cpu_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=is_offloaded,
        fp8_recipe=precision.fp8_recipe if has_fp8_parameters else None,
        **formats,
    )


def _moment_formats(experiment: Experiment) -> dict[str, torch.dtype]:
    """Core's names of the moments' formats -> formats."""
    settings = experiment.optimizer
    return {"exp_avg_dtype": DTYPES[settings.exp_avg_dtype], "exp_avg_sq_dtype": DTYPES[settings.exp_avg_sq_dtype]}


def _with_split_weights(adam: torch.optim.AdamW | None, experiment: Experiment) -> PrecisionAwareAdamW | None:
    """PrecisionAwareAdamW for the parameter groups of torch's AdamW; None for a part without weights on this rank."""
    if adam is None:
        return None
    used = {"params", "lr", "betas", "eps", "weight_decay"}
    groups = [
        {key: value for key, value in group.items() if key in used or key not in adam.defaults}
        for group in adam.param_groups
    ]
    formats = _moment_formats(experiment)
    return PrecisionAwareAdamW(groups, {name.removesuffix("_dtype"): dtype for name, dtype in formats.items()})


def _has_fp8_parameters(model: HunyuanModel) -> bool:
    """Whether weights are stored only in FP8. Emulation stores them in the run's dtype and only computes as if."""
    return model.config.uses_transformer_engine and model.config.precision.fp8_parameters


def complete_gradients(chunks: list[DistributedDataParallel]) -> None:
    """All-gather the reduced gradients; the distributed optimizer leaves each rank only a shard.

    Communicates: data-parallel groups, with the distributed optimizer only.
    """
    for model in chunks:
        if not model.ddp_config.use_distributed_optimizer:
            continue
        for buffer in model.buffers + model.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                handed_over("all_gather", bucket.grad_data, shard, is_written=True)
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


ROW = 4096
"""Elements per fp32 sum."""


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """fp64 sum of squares of all elements, on the tensors' device; accurate to about 1e-6 however they are sharded or
    ordered.

    Only one number per ROW elements, or per tensor, is converted to fp64.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if tensors[0].device.type != "cpu":
        # one launch for all of a format; each thread adds a few hundred numbers, the rest is a tree reduction
        norms = [x for same in _by_format(tensors) for x in torch._foreach_norm(same, 2, dtype=torch.float32)]
        return torch.stack(norms).double().square().sum()
    # on CPU torch accumulates sequentially in a few lanes: squares of small elements are lost in a long sum, 2e-3 of it
    # over 4 million elements
    found = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        whole = flat.numel() // ROW * ROW
        for rows in (flat[:whole].view(-1, ROW), flat[None, whole:]):
            found += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square().sum()
    return found


def _by_format(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors by dtype: torch launches a kernel for each tensor of a list that mixes dtypes, as bf16 gradients and
    fp32 ones of routers."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def gradient_norm(optimizer: MegatronOptimizer) -> Tensor:
    """fp64 () L2 norm of the whole model's gradient, on the device. Each element counts once, whichever ranks hold
    copies or shards of it.

    Core selects the tensors and ranks, so that one of several copies counts. Its own sum is not used: on CPU it depends
    on how weights are sharded, where Transformer Engine or Apex can be imported it calls theirs, which run only on a
    GPU, and it makes the host wait for the result. Communicates: all groups of the optimizer.
    """
    parts: dict[dist.ProcessGroup, list[Tensor]] = {}
    for part in optimizer.chained_optimizers:
        parts.setdefault(part.get_grad_stats_parallel_group(), []).extend(counted_gradients(part))
    total: Tensor | None = None
    for group, gradients in parts.items():
        device = device_of(group)
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for tensors in _by_device(gradients).values():
            squares += sum_of_squares(tensors).to(device)
        dist.all_reduce(squares, group=group)
        total = squares if total is None else total + squares
    assert total is not None, "an optimizer without parts"
    return total.sqrt()


def counted_gradients(part: MegatronOptimizer) -> list[Tensor]:
    """Core's choice of the gradients that this rank adds to a norm: of several copies one counts."""
    # get_main_grads_for_grad_norm is the name in core 0.16
    gradients_of = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    found: list[Tensor] = gradients_of()
    return found


def device_of(group: dist.ProcessGroup) -> torch.device | str:
    """Device of the tensors that a group reduces."""
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def optimizer_step(optimizer: MegatronOptimizer) -> Tensor:
    """`prepare`, then `update`. Returns the norm before clipping."""
    norm = prepare(optimizer)
    update(optimizer, norm)
    return norm


def prepare(optimizer: MegatronOptimizer) -> Tensor:
    """Hand the reduced gradients to the optimizer, and return their global norm, fp64 () on the device. Communicates:
    all groups of the optimizer."""
    optimizer.prepare_grads()
    return gradient_norm(optimizer)


def clip_divisor(optimizer: MegatronOptimizer, norm: Tensor) -> Tensor | None:
    """fp32 () by which gradients of this norm are divided; None without clipping."""
    clip_grad = optimizer.config.clip_grad
    return ((norm + 1e-6) / clip_grad).clamp(min=1.0).float() if clip_grad > 0 else None


def update(optimizer: MegatronOptimizer, norm: Tensor) -> None:
    """Clip by the global norm, from `prepare`, and update; then move the average of the weights, if there is one.

    If the norm is not finite, torch's AdamW and an offloaded optimizer update no weight. Other optimizers make weights
    NaN, and all but the offloaded one move the average. So the caller must save neither.

    The host does not wait for the norm, except with an offloaded optimizer, whose update on the host needs all
    gradients there anyway. torch's fused AdamW kernel scales the gradients in the pass that reads them. Transformer
    Engine's kernels have no such factor, or write the scaled gradients as well (docs/benchmarks.md, "Bytes of the
    optimizer"), so with them every step rewrites the gradients first, if it may clip. Communicates: all groups of the
    optimizer.
    """
    divisor = clip_divisor(optimizer, norm)
    if any(isinstance(part.optimizer, HybridDeviceOptimizer) for part in optimizer.chained_optimizers):
        if not math.isfinite(norm.item()):
            return
        if divisor is not None and divisor.item() == 1.0:
            divisor = None
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if type(inner) is torch.optim.AdamW:
            # the attributes through which torch's own gradient scaler hands these to fused kernels
            inner.grad_scale = divisor  # type: ignore[attr-defined]
            inner.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        elif divisor is not None:
            _divide(_gradients(part), divisor)
        if isinstance(inner, HybridDeviceOptimizer):
            _hand_over_fp32_gradients(inner)
    averages = averages_of(optimizer)
    optimizer.step_with_ready_grads()
    follow(averages)


def _divide(gradients: list[Tensor], divisor: Tensor) -> None:
    """Divide in place, in fp32, by an fp32 () tensor."""
    for device, tensors in _by_device(gradients).items():
        by = divisor.to(device)
        wide = [tensor for tensor in tensors if tensor.dtype == torch.float32]
        if wide:
            torch._foreach_div_(wide, by)
        for tensor in tensors:
            if tensor.dtype != torch.float32:  # a divisor of no dimensions would be rounded to the tensor's dtype
                tensor.div_(by.view(1))


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    """An offloaded optimizer keeps some gradients on the host."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found


def _gradients(part: MegatronOptimizer) -> list[Tensor]:
    """The gradients that this part's update reads."""
    found = (gradient_of(part, parameter) for parameter in part.get_parameters())
    return [gradient for gradient in found if gradient is not None]


def gradient_of(part: MegatronOptimizer, weight: Tensor) -> Tensor | None:
    """The gradient of a weight of this part that its update reads."""
    name = "decoupled_grad" if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    found: Tensor | None = getattr(weight, name, None)
    return found


def _hand_over_fp32_gradients(optimizer: HybridDeviceOptimizer) -> None:
    """Set the gradient that the update reads on fp32 weights that stay on the device. Core passes on gradients only for
    offloaded and bf16 weights, and would silently leave these weights unchanged."""
    for weight, updated in optimizer.param_to_inner_param.items():
        if updated is weight:
            weight.grad = weight.decoupled_grad


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Gather this rank's weights now, where overlap_param_gather leaves the gather to the next forward pass.

    Call this before reading weights between two steps: until then the rank has stale values in the other data-parallel
    ranks' shards. Communicates: data-parallel groups of the parameters.
    """
    for model in chunks:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)
            # core does this only after waiting for an asynchronous gather, not after a forced one: backward passes
            # would read stale values
            if in_fp8 := [parameter for parameter in model.parameters() if is_float8tensor(parameter)]:
                post_all_gather_processing(in_fp8)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, expert_ratio: float) -> None:
    """Set the learning rate of every parameter group: lr * expert_ratio for routed experts, `lr` for the others."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (expert_ratio if group.get("is_expert_lr") else 1.0)


def describe_groups(optimizer: MegatronOptimizer, lr: float, expert_ratio: float) -> list[str]:
    """One line per parameter group of this rank: contents, number of elements, peak learning rate, weight decay."""
    lines = []
    for group in optimizer.param_groups:
        is_expert = bool(group.get("is_expert_lr"))
        what = "routed experts" if is_expert else "norms" if group["wd_mult"] == 0 else "all other weights"
        size = sum(parameter.numel() for parameter in group["params"])
        rate = lr * (expert_ratio if is_expert else 1.0)
        lines.append(
            f"{what}: {size:,} elements on this rank, peak learning rate {rate:.3g}, weight decay "
            f"{group['weight_decay']:g}"
        )
    return lines
