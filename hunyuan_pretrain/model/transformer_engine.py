"""The model's norms and matrix products by Transformer Engine's kernels, and training in FP8 on them.

Every parameter has the name, shape and marks that the local spec gives it, so checkpoints and exports are the same
under both:
- the RMSNorm before the attention is fused into the projection that reads it; its weight stays that of
  `input_layernorm`, which passes its input through. `pre_mlp_layernorm` feeds router, shared and routed experts and
  stays a norm of its own;
- the experts of a rank are one (e, O, I) parameter, of which the grouped product gets e views; with parameters in FP8
  only, which Transformer Engine keeps as one tensor for each expert, they are e parameters (O, I), and one in
  checkpoints (parallel/sharding.py);
- nothing of Transformer Engine's own state goes into a state_dict.

Not taken from Transformer Engine: its RoPE numbers the positions of a document from 0, which the tokens of a
context-parallel rank are not, and writes bf16 before the norm of the heads that follows here; its permutation has no
empty slots, which capacity leaves, and a gather by index is one kernel already.

FP8 (`training_step`): scales of the delayed recipe change once for each optimizer step, from the largest values of all
its micro-batches, and a weight is quantised once for each.

What is handed to its kernels is contiguous and of the dtype of the run (runtime/handover.py): they have a pointer and a
shape.

Tests run it with CPU stand-ins for the kernels, which read memory as those do and prove the wiring and no kernel; with
those that quantise, FP8 steps are those of model/fp8.py bit by bit. tests/gpu runs the kernels.

Shapes: T tokens, R rows of experts, D hidden, I input and O output of a product, e experts of this rank; L steps of a
history.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from hunyuan_pretrain.config.recipe import Recipe
from hunyuan_pretrain.model.experts import Splits, grouped_shape, grouped_weight, mark_experts
from hunyuan_pretrain.model.fp8_parameters import unquantised
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig, weight_device
from hunyuan_pretrain.model.spec import Spec
from hunyuan_pretrain.model.transformer_engine_attention import core_attention, without_fp8
from hunyuan_pretrain.parallel.sharding import mark_divided
from hunyuan_pretrain.runtime.handover import handed_over

# parameters in FP8 only, outside of a training step: meant so
warnings.filterwarnings("ignore", message="You are using quantized weights without quantized compute")

OPERANDS = {"x": ("scaling_fwd", 0, 3), "w": ("scaling_fwd", 1, 3), "dy": ("scaling_bwd", 0, 2)}
"""Operand of a product -> which of Transformer Engine's tensors of scales has its own, at which column, of how many for
each product."""


def transformer_engine_spec(config: HunyuanConfig, layer: int) -> Spec:
    """The spec of one layer, counted from 0 over the whole model."""
    recipe = config.number_formats.recipe
    is_fp8 = config.number_formats.is_fp8_layer(layer, config.num_layers)
    return Spec(
        column_parallel_linear=partial(ColumnParallelLinear, is_fp8=is_fp8),
        row_parallel_linear=partial(RowParallelLinear, is_fp8=is_fp8),
        column_parallel_grouped_linear=partial(GroupedLinear, partition_dim=1, is_fp8=is_fp8),
        row_parallel_grouped_linear=partial(GroupedLinear, partition_dim=2, is_fp8=is_fp8),
        norm=RMSNorm,
        input_norm=FusedNorm,
        column_parallel_linear_after_norm=partial(NormAndColumnParallelLinear, is_fp8=is_fp8),
        core_attention=core_attention,
        row_multiple=partial(_row_multiple, recipe.size_multiple if recipe is not None and is_fp8 else 1),
    )


# --- FP8 --------------------------------------------------------------------------------------------------------------


def te_recipe(recipe: Recipe) -> recipes.Recipe:
    """The same recipe as Transformer Engine has it."""
    options: dict[str, Any] = {"fp8_format": recipes.Format.HYBRID if recipe.is_hybrid else recipes.Format.E4M3}
    if recipe.is_delayed:
        options |= {
            "margin": recipe.margin,
            "amax_history_len": recipe.history_steps,
            "amax_compute_algo": "max" if recipe.takes_max else "most_recent",
        }
    return getattr(recipes, recipe.engine_class)(**options)


@contextmanager
def training_step(models: Sequence[Any], groups: ProcessGroupCollection) -> Iterator[None]:
    """One optimizer step in FP8: forward and backward passes of all its micro-batches through the model chunks of this
    rank, in core's DistributedDataParallel or not.

    Without a recipe, and inside another one, nothing happens. With the delayed recipe the scales of the next step are
    computed at the
    end: Transformer Engine's kernels take the maximum of a tensor's values over all its uses since the last update.

    Communicates at the end, with the delayed recipe: each operand's largest value over the tensor-, context- and
    data-parallel ranks of the stage; those of routed experts over the ranks that hold the same experts only.
    """
    recipe = models[0].config.number_formats.recipe
    if recipe is None or FP8GlobalStateManager.is_fp8_enabled():
        yield
        return
    products = [
        module for model in models for module in model.modules() if isinstance(module, _Product) and module.is_fp8
    ]
    _forget_last_step(products)
    try:
        for product in products:
            product.is_first_microbatch = True
        # leaving it updates the scales of inputs and weights
        with te.autocast(enabled=True, recipe=te_recipe(recipe), amax_reduction_group=groups.tp_dp_cp):
            # the first module to ask would update the scales of gradients in its backward pass, which is that of one
            # micro-batch
            FP8GlobalStateManager.is_first_fp8_module()
            yield
    finally:
        for product in products:
            product.is_first_microbatch = None
    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


def scaling_state(model: Any) -> dict[str, Tensor]:
    """Scales of the delayed recipe: "{module}.{operand}.history" (L, e) and ".scale" (e,), fp32, of the operands x, w
    and dy.

    `module` is the name of a product within `model`, e its experts on this rank, or 1. Row 0 of a history collects the
    running step and is 0 between steps; the last row is the newest step. Copies; {} under other recipes.
    """
    state = {name: tensor.clone() for name, tensor in _scaling_tensors(model)}
    for name, tensor in state.items():
        if name.endswith(".history"):  # parameters in FP8 only are quantised, and seen, before the step that uses them
            tensor[0] = 0
    return state


def load_scaling_state(model: Any, state: dict[str, Tensor]) -> None:
    """Write what `scaling_state` of a model with the same parts on this rank returned. Raises KeyError where something
    is missing."""
    for name, tensor in _scaling_tensors(model):
        tensor.copy_(state[name])


def _scaling_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    recipe = model.config.number_formats.recipe
    if recipe is None or not recipe.is_delayed:
        return
    for module_name, product in model.named_modules():
        if isinstance(product, _Product) and product.is_fp8:
            product.allocate_scales(te_recipe(recipe))
            for operand, (key, column, step) in OPERANDS.items():
                scales = product.fp8_meta[key]
                yield f"{module_name}.{operand}.history", scales.amax_history[:, column::step]
                yield f"{module_name}.{operand}.scale", scales.scale[column::step]


def _forget_last_step(products: Sequence[_Product]) -> None:
    """Empty Transformer Engine's lists of the tensors that an update reduces, into which each product puts its own when
    it is first used.

    Nothing else ever takes one out: a second model in the process would reduce those of the first too, over groups that
    may be gone.
    """
    state = getattr(FP8GlobalStateManager, "quantization_state", FP8GlobalStateManager)  # of its own in newer versions
    for lists in ("global_amax_buffer", "global_amax_history_buffer", "global_scale_buffer"):
        getattr(state, lists).clear()
    for product in products:
        product.fp8_meta.pop(FP8GlobalStateManager.get_buffer_info(), None)


class _Product(TransformerEngineBaseModule):
    """What every matrix product adds to Transformer Engine's module of its kind."""

    is_fp8: bool
    amax_group: ProcessGroup | None
    """Over which ranks to take the largest values; None: those of the step."""
    num_products = 1
    is_first_microbatch: bool | None
    """Whether the next forward pass is the first of a step in FP8: it quantises the weight, for the later ones too.
    None: no such step."""

    # Transformer Engine would add its own pickled state to every state_dict
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def _begin(self, config: HunyuanConfig, is_fp8: bool, amax_group: ProcessGroup | None = None) -> None:
        self.is_fp8, self.amax_group, self.is_first_microbatch = is_fp8, amax_group, None
        self.activations = config.params_dtype

    def region(self) -> AbstractContextManager[None]:
        """The number formats of this product, inside `training_step` and outside."""
        if not self.is_fp8:
            return without_fp8()
        if not FP8GlobalStateManager.is_fp8_enabled() or self.amax_group is None:
            return nullcontext()
        return te.autocast(
            enabled=True, recipe=FP8GlobalStateManager.get_fp8_recipe(), amax_reduction_group=self.amax_group
        )

    def allocate_scales(self, recipe: recipes.Recipe) -> None:
        """Make the scales of the delayed recipe if no forward pass has made them yet."""
        # Transformer Engine updates all scales where a region ends that may have a backward pass
        with torch.no_grad(), te.autocast(enabled=True, recipe=recipe, amax_reduction_group=self.amax_group):
            self.init_fp8_metadata(num_gemms=self.num_products)

    def _get_weight_tensors(self) -> list[Tensor]:
        """What Transformer Engine multiplies by; outside of a step in FP8 the values of weights in FP8 only.

        Its own form of those has no main_grad in some recipes, which its backward pass asks for, and in others no
        gradient at all.
        """
        weights: list[Any] = [weight for weight in self.parameters() if is_float8tensor(weight)]
        if self.fp8 or not weights:
            return super()._get_weight_tensors()
        if not torch.is_grad_enabled():
            return [unquantised(weight) for weight in weights]
        values = [_Unquantised.apply(weight, self.fuse_wgrad_accumulation) for weight in weights]
        for weight, value in zip(weights, values, strict=True):
            if self.fuse_wgrad_accumulation:
                value.main_grad = weight.main_grad
        return values

    def take_turn(self) -> bool | None:
        """What to tell Transformer Engine of the micro-batch."""
        is_first = self.is_first_microbatch if self.is_fp8 else None
        if is_first:
            self.is_first_microbatch = False
        return is_first


class _Unquantised(torch.autograd.Function):
    """A weight in FP8 only -> its values in bf16, whose gradient is its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, is_in_main_grad: bool) -> Tensor:
        ctx.weight, ctx.is_in_main_grad = weight, is_in_main_grad
        ctx.set_materialize_grads(False)
        return unquantised(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if ctx.is_in_main_grad:
            # core's hook then skips its own addition; the returned tensor is never read
            ctx.weight.grad_added_to_main_grad = True
            return torch.empty(ctx.weight.shape, dtype=ctx.weight.dtype, device=ctx.weight.device), None
        return grad, None


# --- dense products ---------------------------------------------------------------------------------------------------


def _weights_in_fp8(config: HunyuanConfig, is_fp8: bool) -> AbstractContextManager[None]:
    """Modules made inside keep their weights as the configuration says: in FP8 only, or not."""
    formats = config.number_formats
    if not is_fp8 or not formats.fp8_parameters or formats.recipe is None:
        return nullcontext()
    return te.quantized_model_init(enabled=True, recipe=te_recipe(formats.recipe))


class _DenseProduct(_Product):
    def forward(self, x_TI: Tensor) -> tuple[Tensor, None]:
        """(T, I) -> ((T, O), None), as core's linears return a bias that they have not added."""
        (x_TI,) = handed_over("Transformer Engine's linear", x_TI, dtype=self.activations)
        with self.region():
            return super().forward(x_TI, is_first_microbatch=self.take_turn()), None


class ColumnParallelLinear(_DenseProduct, te.Linear):
    """y = x W^T with W divided over the tensor-parallel ranks along its output; gathers the sequence first where that
    is divided too."""

    def __init__(
        self, config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, is_fp8: bool
    ) -> None:
        with _weights_in_fp8(config, is_fp8):
            super().__init__(input_size, output_size, parallel_mode="column", **_options(config, groups))
        self._begin(config, is_fp8)
        mark_divided(self.weight, 0)


class RowParallelLinear(_DenseProduct, te.Linear):
    """y = x W^T with W divided over the tensor-parallel ranks along its input; sums the results over them."""

    def __init__(
        self, config: HunyuanConfig, input_size: int, output_size: int, groups: ProcessGroupCollection, is_fp8: bool
    ) -> None:
        with _weights_in_fp8(config, is_fp8):
            super().__init__(input_size, output_size, parallel_mode="row", **_options(config, groups))
        self._begin(config, is_fp8)
        mark_divided(self.weight, 1)


class NormAndColumnParallelLinear(_DenseProduct, te.LayerNormLinear):
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
        with _weights_in_fp8(config, is_fp8):
            super().__init__(
                input_size,
                output_size,
                eps=config.layernorm_epsilon,
                normalization="RMSNorm",
                parallel_mode="column",
                **_options(config, groups),
            )
        self._begin(config, is_fp8)
        mark_divided(self.weight, 0)
        del self.layer_norm_weight
        # not registered here: it is one parameter, under the name of the norm
        object.__setattr__(self, "layer_norm_weight", norm.weight)


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
    """What writes new weights before `initialize_weights` or a checkpoint does, which do not depend on the layout:
    nothing, or zeros where weights are quantised at once, which is no good for whatever was in the memory."""
    return torch.nn.init.zeros_ if config.number_formats.fp8_parameters else _leave_as_it_is


def _leave_as_it_is(weight: Tensor) -> None:
    pass


def _device(config: HunyuanConfig) -> torch.device | str:
    """Where modules make their weights; Transformer Engine recognises the meta device by its name only."""
    device = torch.device(weight_device(config))
    return "meta" if device.type == "meta" else device


# --- norms ------------------------------------------------------------------------------------------------------------


class RMSNorm(te.RMSNorm):
    """x / rms(x) * weight over the last dim; core sums the weight's gradient over the tensor-parallel ranks that divide
    the sequence."""

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def __init__(self, config: HunyuanConfig, size: int) -> None:
        super().__init__(size, eps=config.layernorm_epsilon, dtype=config.params_dtype, device=_device(config))
        self.weight.sequence_parallel = config.sequence_parallel


class FusedNorm(torch.nn.Module):
    """The weight of a norm that the next product computes."""

    def __init__(self, config: HunyuanConfig, size: int) -> None:
        super().__init__()
        weight: Any = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=weight_device(config)))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD


# --- experts ----------------------------------------------------------------------------------------------------------


class GroupedLinear(_Product, te.GroupedLinear):
    """y = x W_i^T for the rows of each local expert; W is one (e, O, I) parameter, or, in FP8 only, e parameters (O,
    I)."""

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
        is_one = not (is_fp8 and config.number_formats.fp8_parameters)
        with _weights_in_fp8(config, is_fp8):
            super().__init__(
                e,
                columns,
                rows,
                bias=False,
                init_method=_init_method(config),
                params_dtype=config.params_dtype,
                # of one parameter for all, its own weights are never made: on the meta device they take no memory
                device="meta" if is_one else _device(config),
            )
        self._begin(config, is_fp8, groups.expt_tp_dp)
        self.num_products = e
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

    def forward(self, x_RI: Tensor, splits: Splits) -> Tensor:
        """(R, I) -> (R, O), rows sorted by expert; in FP8 each expert has a multiple of `Recipe.size_multiple` rows."""
        rows_e = [splits] * self.num_products if isinstance(splits, int) else splits
        assert sum(rows_e) == x_RI.shape[0], f"{sum(rows_e)} rows of experts, {x_RI.shape[0]} are there"
        (x_RI,) = handed_over("Transformer Engine's grouped linear", x_RI, dtype=self.activations)
        self.fuse_wgrad_accumulation = self.accumulate and hasattr(next(self.parameters()), "main_grad")
        with self.region():
            return super().forward(x_RI, rows_e, is_first_microbatch=self.take_turn())

    def _get_weight_tensors(self) -> list[Tensor]:
        """What Transformer Engine multiplies by: of one parameter the e views, each with its part of main_grad where
        gradients are added into that."""
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
    """(e, O, I) -> e views (O, I), whose gradients become one."""

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
    """What the rows of each expert must now be multiples of."""
    return alignment if FP8GlobalStateManager.is_fp8_enabled() else 1
