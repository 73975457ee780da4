"""Training in FP8 on Transformer Engine's kernels.

Scales of the delayed recipe change once per optimizer step, from the largest values of all its micro-batches. A weight
is quantised once per step. The state of an open step is Transformer Engine's process-wide state, which only
`training_step` sets, and the `open_step` of each `Fp8Module`.

Shapes: e experts of this rank (1 for a linear layer), H steps of history.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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

from hunyuan_pretrain.config.recipe import Operand, Recipe
from hunyuan_pretrain.model.fp8.parameters import unquantised
from hunyuan_pretrain.model.hunyuan_config import HunyuanConfig
from hunyuan_pretrain.runtime.handover import is_recording

# intended: parameters in FP8 only are used outside of a training step too
warnings.filterwarnings("ignore", message="You are using quantized weights without quantized compute")

SCALES: dict[Operand, tuple[str, int, int]] = {
    "x": ("scaling_fwd", 0, 3),
    "w": ("scaling_fwd", 1, 3),
    "dy": ("scaling_bwd", 0, 2),
}
"""Operand of a matmul -> which of Transformer Engine's scale tensors holds its scale, at which column, and how many
columns that tensor has per matmul."""


def te_recipe(recipe: Recipe) -> recipes.Recipe:
    """The same recipe in Transformer Engine's form."""
    options: dict[str, Any] = {"fp8_format": recipes.Format.HYBRID if recipe.is_hybrid else recipes.Format.E4M3}
    if recipe.is_delayed:
        options |= {
            "margin": recipe.margin,
            "amax_history_len": recipe.history_steps,
            "amax_compute_algo": "max" if recipe.takes_max else "most_recent",
        }
    assert recipe.engine_class is not None, f"{recipe.name} has no kernels"
    return getattr(recipes, recipe.engine_class)(**options)


@contextmanager
def training_step(models: Sequence[Any], groups: ProcessGroupCollection) -> Iterator[None]:
    """As `training_step` of model/engines.py; the model chunks may be wrapped in core's DistributedDataParallel.

    Does nothing without a recipe or inside another step. With the delayed recipe the scales of the next step are
    computed at the end: Transformer Engine's kernels record the maximum of a tensor's values over all its uses since
    the last update.
    """
    recipe = models[0].config.precision.recipe
    if recipe is None or FP8GlobalStateManager.is_fp8_enabled():
        yield
        return
    matmuls = [
        module for model in models for module in model.modules() if isinstance(module, Fp8Module) and module.is_fp8
    ]
    if is_recording():
        # Transformer Engine adds no tensor to its lists while a graph is recorded; the step before has left those of
        # the same modules
        assert not recipe.is_delayed or _tensors_to_update(), "a step is computed before it is recorded"
    else:
        _forget_last_step(matmuls)
    engine_recipe = te_recipe(recipe)
    try:
        for matmul in matmuls:
            matmul.open_step = OpenStep(engine_recipe)
        # its exit updates the scales of inputs and weights
        with te.autocast(enabled=True, recipe=engine_recipe, amax_reduction_group=groups.tp_dp_cp):
            # asked here, before any module: the first to ask would update the scales of gradients in its backward pass,
            # so with each micro-batch
            FP8GlobalStateManager.is_first_fp8_module()
            yield
    finally:
        for matmul in matmuls:
            matmul.open_step = None
    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)


def scaling_state(models: Sequence[Any]) -> dict[str, Tensor]:
    """As `scaling_state` of model/engines.py: "{module}.{operand}.history" (H, e) and ".scale" (e,).

    `module` is the name of an `Fp8Module` within its model. Row 0 of a history collects the running step and is 0
    between steps; the last row is the newest step. Returns copies.
    """
    state = {name: tensor.clone() for model in models for name, tensor in _scaling_tensors(model)}
    for name, tensor in state.items():
        if name.endswith(".history"):  # parameters in FP8 only are quantised, and recorded, before their step
            tensor[0] = 0
    return state


def load_scaling_state(models: Sequence[Any], state: dict[str, Tensor]) -> None:
    """As `load_scaling_state` of model/engines.py."""
    for model in models:
        for name, tensor in _scaling_tensors(model):
            tensor.copy_(state[name])


def scaling_tensors(models: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors that Transformer Engine reads and writes, by the names of `scaling_state`."""
    return {name: tensor for model in models for name, tensor in _scaling_tensors(model)}


def _scaling_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    recipe = model.config.precision.recipe
    if recipe is None or not recipe.is_delayed:
        return
    for module_name, matmul in model.named_modules():
        if isinstance(matmul, Fp8Module) and matmul.is_fp8:
            matmul.allocate_scales(te_recipe(recipe))
            for operand, (key, column, step) in SCALES.items():
                scales = matmul.fp8_meta[key]
                yield f"{module_name}.{operand}.history", scales.amax_history[:, column::step]
                yield f"{module_name}.{operand}.scale", scales.scale[column::step]


LISTS = ("global_amax_buffer", "global_amax_history_buffer", "global_scale_buffer")
"""Transformer Engine's lists of the tensors that an update of delayed scales reduces and writes."""


def _engine_state() -> Any:
    return getattr(FP8GlobalStateManager, "quantization_state", FP8GlobalStateManager)  # separate in newer versions


def _tensors_to_update() -> int:
    return sum(len(tensors) for tensors in _engine_state().global_amax_buffer.values())


def _forget_last_step(matmuls: Sequence[Fp8Module]) -> None:
    """Clear Transformer Engine's lists of the tensors that an update reduces; each module adds its own when it is first
    used.

    Nothing else removes them: a second model in the process would also reduce those of the first, over groups that may
    be gone.
    """
    for name in LISTS:
        getattr(_engine_state(), name).clear()
    for matmul in matmuls:
        matmul.fp8_meta.pop(FP8GlobalStateManager.get_buffer_info(), None)


def without_fp8() -> AbstractContextManager[None]:
    """Inside, computation is in the dtype of the run, even in a training step in FP8."""
    if not FP8GlobalStateManager.is_fp8_enabled():
        return nullcontext()
    return te.autocast(enabled=False, recipe=FP8GlobalStateManager.get_fp8_recipe())


def weights_in_fp8(config: HunyuanConfig, is_fp8: bool) -> AbstractContextManager[None]:
    """Modules created inside hold their weights as the configuration says: in FP8 only, or not."""
    formats = config.precision
    if not is_fp8 or not formats.fp8_parameters or formats.recipe is None:
        return nullcontext()
    return te.quantized_model_init(enabled=True, recipe=te_recipe(formats.recipe))


@dataclass
class OpenStep:
    """The open training step in FP8, as one `Fp8Module` sees it."""

    recipe: recipes.Recipe
    is_first_microbatch: bool = True
    """Whether the next forward pass is the step's first, which quantises the weight for all of them."""


class Fp8Module(TransformerEngineBaseModule):
    """What the linear layers here add to Transformer Engine's modules."""

    is_fp8: bool
    amax_group: ProcessGroup | None
    """Ranks over which the largest values are taken; None: those of the step."""
    num_matmuls = 1
    open_step: OpenStep | None

    # Transformer Engine would add its own pickled state to every state_dict
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def complete(self, config: HunyuanConfig, is_fp8: bool, amax_group: ProcessGroup | None = None) -> None:
        """Set the attributes of this class, after Transformer Engine's constructor has run."""
        self.is_fp8, self.amax_group, self.open_step = is_fp8, amax_group, None
        self.activations = config.params_dtype

    def region(self) -> AbstractContextManager[None]:
        """A context with the number formats of this module, inside `training_step` and outside."""
        if not self.is_fp8:
            return without_fp8()
        if self.open_step is None or self.amax_group is None:
            return nullcontext()
        return te.autocast(enabled=True, recipe=self.open_step.recipe, amax_reduction_group=self.amax_group)

    def allocate_scales(self, recipe: recipes.Recipe) -> None:
        """Create the scales of the delayed recipe if no forward pass has created them yet."""
        # with gradients enabled, Transformer Engine would update all scales at the end of the region
        with torch.no_grad(), te.autocast(enabled=True, recipe=recipe, amax_reduction_group=self.amax_group):
            self.init_fp8_metadata(num_gemms=self.num_matmuls)

    def _get_weight_tensors(self) -> list[Tensor]:
        """The weights that Transformer Engine multiplies by; outside of a step in FP8, weights in FP8 only are
        dequantised.

        Transformer Engine's own dequantised form lacks, in some recipes, the main_grad that its backward pass asks for,
        and in others any gradient.
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
        """Returns whether this micro-batch is the first of the step, for Transformer Engine; None outside of a step in
        FP8."""
        if self.open_step is None:
            return None
        is_first, self.open_step.is_first_microbatch = self.open_step.is_first_microbatch, False
        return is_first


class _Unquantised(torch.autograd.Function):
    """A weight in FP8 only -> its values in bf16; their gradient becomes the weight's."""

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
