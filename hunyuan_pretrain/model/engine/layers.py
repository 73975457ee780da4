"""The model's norms and linear layers on Transformer Engine's kernels.

Every parameter has the name, shape and marks that the local spec gives it, so checkpoints and exports are the same
under both:
- the RMSNorm before the attention is fused into the projection that reads it. Its weight stays in `input_layernorm`,
  which passes its input through. `pre_mlp_layernorm` feeds router, shared and routed experts, and is a separate norm.
  So is `input_layernorm` where `_fuses_norm` says so;
- the experts of a rank are one (e, O, I) parameter, and the grouped GEMM gets e views of it. Parameters in FP8 only,
  which Transformer Engine keeps as one tensor per expert, are e parameters (O, I), and one in checkpoints
  (parallel/sharding.py);
- none of Transformer Engine's own state goes into a state_dict.

Not taken from Transformer Engine:
- its RoPE numbers the positions of a document from 0, which is wrong for the tokens of a context-parallel rank. It also
  writes bf16 before the per-head norm that follows here;
- its permutation has no empty slots, which a capacity leaves. A gather by index is one kernel already.

Tensors handed to its kernels are contiguous and of the dtype of the run (runtime/handover.py): the kernels see only a
pointer and a shape.

Shapes: T tokens, R rows of experts, D hidden, I input size, O output size, e experts of this rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from hunyuan_pretrain.model.engine.fp8 import Fp8Module, weights_in_fp8
from hunyuan_pretrain.model.expert_rows import RowSplits
from hunyuan_pretrain.model.functions import plain_functions
from hunyuan_pretrain.model.grouped_linear import grouped_shape, grouped_weight, mark_experts
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.recompute import keep_input_as_given
from hunyuan_pretrain.model.spec import Spec
from hunyuan_pretrain.parallel.sharding import mark_sharded
from hunyuan_pretrain.runtime.handover import handed_over


def transformer_engine_spec(config: HunyuanConfig, layer: int) -> Spec:
    """The spec of one layer, counted from 0 over the whole model."""
    recipe = config.precision.recipe
    is_fp8 = config.precision.is_fp8_layer(layer, config.num_layers)
    is_recomputed = "norms" in config.parallel.recomputed_parts
    after_norm: Any = None
    if is_fused := _fuses_norm(config, is_fp8):
        after_norm = partial(NormAndColumnParallelLinear, is_fp8=is_fp8)
    elif is_recomputed:
        after_norm = partial(_linear_after_recomputed_norm, is_fp8=is_fp8)
    return Spec(
        column_parallel_linear=partial(ColumnParallelLinear, is_fp8=is_fp8),
        row_parallel_linear=partial(RowParallelLinear, is_fp8=is_fp8),
        column_parallel_grouped_linear=partial(GroupedLinear, partition_dim=1, is_fp8=is_fp8),
        row_parallel_grouped_linear=partial(GroupedLinear, partition_dim=2, is_fp8=is_fp8),
        norm=RMSNorm,
        input_norm=FusedNorm if is_fused else RMSNorm,
        column_parallel_linear_after_norm=after_norm,
        functions=plain_functions(),
        row_multiple=partial(_row_multiple, recipe.size_multiple if recipe is not None and is_fp8 else 1),
    )


def _fuses_norm(config: HunyuanConfig, is_fp8: bool) -> bool:
    """Whether the norm before the attention is part of the projection.

    Not where the outputs of norms are recomputed: a fused norm keeps its output inside. Nor with Triton kernels, whose
    norm adds the gradient of the residual in the same pass, unless the fused one writes FP8 at once. It does so with
    delayed scales only: with the others it writes bf16, and another kernel quantises.
    """
    recipe = config.precision.recipe
    if "norms" in config.parallel.recomputed_parts:
        return False
    return not config.uses_kernels or (is_fp8 and recipe is not None and recipe.is_delayed)


# --- dense linears ----------------------------------------------------------------------------------------------------


class _DenseLinear(Fp8Module):
    def forward(self, x_TI: Tensor) -> tuple[Tensor, None]:
        """(T, I) -> ((T, O), None), like core's linears, which also return a bias that they have not added."""
        (x_TI,) = handed_over("Transformer Engine's linear", x_TI, dtype=self.activations)
        with self.region():
            return super().forward(x_TI, is_first_microbatch=self.take_turn()), None


class ColumnParallelLinear(_DenseLinear, te.Linear):
    """y = x W^T with W sharded over the tensor-parallel ranks along its output; gathers the sequence first if that is
    sharded too."""

    def __init__(
        self, config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, is_fp8: bool
    ) -> None:
        with weights_in_fp8(config, is_fp8):
            super().__init__(input_size, output_size, parallel_mode="column", **_options(config, groups))
        self.complete(config, is_fp8)
        mark_sharded(self.weight, 0)


class RowParallelLinear(_DenseLinear, te.Linear):
    """y = x W^T with W sharded over the tensor-parallel ranks along its input; sums the results over them."""

    def __init__(
        self, config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, is_fp8: bool
    ) -> None:
        with weights_in_fp8(config, is_fp8):
            super().__init__(input_size, output_size, parallel_mode="row", **_options(config, groups))
        self.complete(config, is_fp8)
        mark_sharded(self.weight, 1)


class NormAndColumnParallelLinear(_DenseLinear, te.LayerNormLinear):
    """RMSNorm and `ColumnParallelLinear` in one; the norm's weight belongs to `norm`, a FusedNorm."""

    def __init__(
        self,
        config: HunyuanConfig,
        input_size: int,
        output_size: int,
        groups: ProcessGroupCollection,
        norm: FusedNorm,
        is_fp8: bool,
    ) -> None:
        with weights_in_fp8(config, is_fp8):
            super().__init__(
                input_size,
                output_size,
                eps=config.layernorm_epsilon,
                normalization="RMSNorm",
                parallel_mode="column",
                **_options(config, groups),
            )
        self.complete(config, is_fp8)
        mark_sharded(self.weight, 0)
        del self.layer_norm_weight
        # not registered here: the parameter is registered once, under the norm's name
        object.__setattr__(self, "layer_norm_weight", norm.weight)


def _linear_after_recomputed_norm(
    config: HunyuanConfig,
    input_size: int,
    output_size: int,
    groups: ProcessGroupCollection,
    norm: RMSNorm,
    is_fp8: bool,
) -> ColumnParallelLinear:
    linear = ColumnParallelLinear(config, input_size, output_size, groups, is_fp8)
    keep_input_as_given(linear)
    return linear


def _options(config: HunyuanConfig, groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        "bias": False,
        "init_method": _init_method(config),
        "params_dtype": config.params_dtype,
        "device": _device(config),
        "tp_group": groups.tp,
        "sequence_parallel": config.sequence_parallel,
        "fuse_wgrad_accumulation": config.gradient_accumulation_fusion,
    }


def _init_method(config: HunyuanConfig) -> Any:
    """The initialiser of new weights, which `initialize_weights` or a checkpoint then overwrites, independently of the
    layout. It does nothing, or writes zeros where weights are quantised at once: uninitialised memory must not be."""
    return torch.nn.init.zeros_ if config.precision.fp8_parameters else _leave_as_it_is


def _leave_as_it_is(weight: Tensor) -> None:
    pass


def _device(config: HunyuanConfig) -> torch.device | str:
    """Where modules create their weights; Transformer Engine recognises the meta device only by its name."""
    device = torch.device(weight_device(config))
    return "meta" if device.type == "meta" else device


# --- norms ------------------------------------------------------------------------------------------------------------


class RMSNorm(te.RMSNorm):
    """x / rms(x) * weight over the last dim; with sequence parallelism core sums the weight's gradient over the
    tensor-parallel ranks."""

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def __init__(self, config: HunyuanConfig, size: int) -> None:
        super().__init__(size, eps=config.layernorm_epsilon, dtype=config.params_dtype, device=_device(config))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_TD: Tensor, branch_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum); as model.norm.add_rms_norm."""
        sum_TD = x_TD if branch_TD is None else x_TD + branch_TD
        return super().forward(sum_TD), sum_TD


class FusedNorm(torch.nn.Module):
    """The weight of a norm that the next linear layer computes; passes its input through."""

    is_fused = True

    def __init__(self, config: HunyuanConfig, size: int) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=weight_device(config)))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return x_TD, x_TD


# --- experts ----------------------------------------------------------------------------------------------------------


class GroupedLinear(Fp8Module, te.GroupedLinear):
    """y = x W_i^T for the rows of each local expert. W is one (e, O, I) parameter, or, in FP8 only, e parameters (O,
    I)."""

    # newer versions of Transformer Engine would split the one weight of a state_dict into e
    load_state_dict = torch.nn.Module.load_state_dict
    _load_from_state_dict = torch.nn.Module._load_from_state_dict

    def __init__(
        self,
        config: HunyuanConfig,
        input_size: int,
        output_size: int,
        groups: ProcessGroupCollection,
        partition_dim: int,
        is_fp8: bool,
    ) -> None:
        e, rows, columns = grouped_shape(config, input_size, output_size, groups, partition_dim)
        is_one = not (is_fp8 and config.precision.fp8_parameters)
        with weights_in_fp8(config, is_fp8):
            super().__init__(
                e,
                columns,
                rows,
                bias=False,
                init_method=_init_method(config),
                params_dtype=config.params_dtype,
                # with one parameter for all, its own weights are unused: on the meta device they take no memory
                device="meta" if is_one else _device(config),
            )
        self.complete(config, is_fp8, groups.expt_tp_dp)
        self.num_matmuls = e
        self.accumulate = config.gradient_accumulation_fusion
        self.weight = grouped_weight(config, input_size, output_size, groups, partition_dim) if is_one else None
        for expert in range(e):
            if is_one:
                delattr(self, f"weight{expert}")
                setattr(self, f"bias{expert}", torch.empty(0, dtype=config.params_dtype, device=weight_device(config)))
                continue
            weight = getattr(self, f"weight{expert}")
            mark_experts(weight, groups, partition_dim - 1)
            weight.expert, weight.num_experts = expert, e

    def forward(self, x_RI: Tensor, splits: RowSplits) -> Tensor:
        """(R, I) -> (R, O), rows sorted by expert; in FP8 the row count of each expert is a multiple of
        `Recipe.size_multiple`."""
        assert splits.num_rows == x_RI.shape[0], f"splits for {splits.num_rows} rows, input of {x_RI.shape[0]}"
        (x_RI,) = handed_over("Transformer Engine's grouped linear", x_RI, dtype=self.activations)
        self.fuse_wgrad_accumulation = self.accumulate and hasattr(next(self.parameters()), "main_grad")
        with self.region():
            return super().forward(x_RI, list(splits.rows_e), is_first_microbatch=self.take_turn())

    def _get_weight_tensors(self) -> list[Tensor]:
        """The weights that Transformer Engine multiplies by: e views of the one parameter, each with its part of
        main_grad if gradients are accumulated there."""
        if self.weight is None:
            return super()._get_weight_tensors()
        if not torch.is_grad_enabled():
            return list(self.weight.unbind())
        views = _Experts.apply(self.weight, self.fuse_wgrad_accumulation)
        if self.fuse_wgrad_accumulation:
            for view, main_grad in zip(views, self.weight.main_grad, strict=True):
                view.main_grad = main_grad
        return list(views)


class _Experts(torch.autograd.Function):
    """(e, O, I) -> e views (O, I), whose gradients are stacked into one."""

    @staticmethod
    def forward(ctx: Any, weight_eOI: Tensor, is_in_main_grad: bool) -> tuple[Tensor, ...]:
        ctx.weight, ctx.is_in_main_grad = weight_eOI, is_in_main_grad
        ctx.set_materialize_grads(False)
        return weight_eOI.unbind()

    @staticmethod
    def backward(ctx: Any, *grads_OI: Tensor | None) -> tuple[Tensor | None, None]:
        if ctx.is_in_main_grad:
            # core's hook then skips its own addition; the returned tensor is never read
            ctx.weight.grad_added_to_main_grad = True
            return torch.empty_like(ctx.weight), None
        return torch.stack([grad for grad in grads_OI if grad is not None]), None


def _row_multiple(alignment: int) -> int:
    """The number that the row count of each expert must currently be a multiple of."""
    return alignment if FP8GlobalStateManager.is_fp8_enabled() else 1
