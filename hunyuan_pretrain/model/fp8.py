"""FP8 recipes emulated on any machine: the operands of the matrix products that Transformer Engine runs in FP8,
quantised as it does.

A product of the forward pass and its two gradients read six quantised operands: x and w; dY and w; dY and x. Values are
rounded to FP8 and multiplied back by their inverse scales; the product itself is computed in fp32 and rounded to the
dtype of x, as the FP8 kernels accumulate in fp32. Scales and rounding follow Transformer Engine 2.11 (its recipe
kernels and their references in its tests):
  scale        fp8_max / amax in fp32; 1 where amax is 0, infinite or nan; blockwise cuts it to a power of two below
  rounding     nearest even of float(x) * scale, saturating at fp8_max (448, and 57344 in E5M2); nan stays nan
  delayed      the scale of a tensor comes from its largest values in earlier steps
  tensorwise   from the tensor, or that of one expert
  blockwise    x and dY in 1 x 128, along the summed dimension of each product; w in 128 x 128
  mxfp8        1 x 32 along the summed dimension, the inverse scale a power of two (E8M0), amax / fp8_max rounded up
Not as there: the norm that Transformer Engine fuses into a projection is rounded to bf16 before it is quantised; its
kernel for the delayed recipe leaves that rounding out.
A delayed scale changes once in an optimizer step, after its last micro-batch, from the largest value over the global
batch and all ranks that hold the tensor: it depends neither on the layout nor on how a batch is divided.

Shapes: b independent matrices (experts; 1 for a linear layer), R rows, I input, O output, e experts of this rank, H
steps of history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hunyuan_pretrain.config.recipe import OPERANDS, NumberFormat, Operand, Recipe
from hunyuan_pretrain.runtime.handover import handed_over

Watch = Callable[[str, Operand, Tensor, Tensor], None]
"""Called with (module, operand, scaled values before rounding, FP8 values) of every quantised tensor."""


DTYPES: dict[NumberFormat, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def dtype_of(recipe: Recipe, operand: Operand) -> torch.dtype:
    return DTYPES[recipe.number_format(operand)]


class Scales(NamedTuple):
    """fp32 factors before rounding, and their inverses after it."""

    scale: Tensor
    inverse: Tensor


def scale_from_amax(
    amax: Tensor, fp8_max: float, largest: float = torch.finfo(torch.float32).max, power_of_two: bool = False
) -> Tensor:
    """fp32 scale of any shape; `largest` stands for a scale that overflows."""
    scale = (
        torch.tensor(fp8_max, device=amax.device) / amax
    )  # a number over a tensor would be a product with its reciprocal
    scale = torch.where(scale.isinf(), largest, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)


def e8m0_scales(amax: Tensor, fp8_max: float) -> Scales:
    """Scales of MXFP8: the inverse is the power of two at or above amax / fp8_max, 2^-127 to 2^127, held as a biased
    exponent."""
    bits = (amax * torch.tensor(1.0 / fp8_max, dtype=torch.float32, device=amax.device)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & ((1 << 23) - 1)
    # a subnormal quotient up to 2^-127 is rounded up to that, not to 2^-126
    rounds_up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 1 << 22))
    exponent = (exponent + rounds_up).clamp(max=254).double()  # of infinity: 254
    scale = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent)).float()
    inverse = torch.where(amax.isnan(), torch.nan, torch.exp2(exponent - 127)).float()
    return Scales(scale, inverse)


def quantize(
    x_bRC: Tensor, recipe: Recipe, operand: Operand, along_rows: bool, scale_b: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x_bRC as FP8: (scaled values, their FP8 values, inverse scales), all in blocks (b, R / r, r, C / c, c), the last
    ones with zeros.

    `scale_b`: scales from earlier steps, of the delayed recipe.
    """
    b, R, C = x_bRC.shape
    rows, columns = recipe.block_shape(operand, along_rows) or (max(R, 1), max(C, 1))
    x = x_bRC.float()
    if R % rows or C % columns:
        x = torch.nn.functional.pad(x, (0, -C % columns, 0, -R % rows))
    x = x.view(b, -(-R // rows), rows, -(-C // columns), columns)
    dtype = dtype_of(recipe, operand)
    fp8_max = torch.finfo(dtype).max
    if scale_b is not None:
        scale = scale_b.view(b, 1, 1, 1, 1)
        scales = Scales(scale, scale.reciprocal())
    else:
        amax = x.abs().amax((2, 4), keepdim=True) if x.numel() else x.new_zeros(b, 1, 1, 1, 1)
        largest = min(torch.finfo(x_bRC.dtype).max, torch.finfo(torch.float32).max)
        scales = _scales(amax, recipe, fp8_max, largest)
    scaled = x * scales.scale
    return scaled, scaled.clamp(-fp8_max, fp8_max).to(dtype), scales.inverse


def to_fp32(values: Tensor) -> Tensor:
    """FP8 values as fp32; torch's own conversion of E4M3 takes three times as long on a CPU."""
    if values.dtype != torch.float8_e4m3fn:
        return values.float()
    codes = values.view(torch.int8)
    # the four bits of the exponent where fp32 has its lowest four, the mantissa's after them, the sign extended by the
    # conversion
    bits = codes.to(torch.int32).bitwise_left_shift_(20).bitwise_and_(-0x80000000 | 0x07F00000)
    result = bits.view(torch.float32).mul_(2.0 ** (127 - 7))
    is_nan = codes.bitwise_and(127) == 127
    return result.masked_fill_(is_nan, torch.nan) if is_nan.any() else result


def _scales(amax: Tensor, recipe: Recipe, fp8_max: float, largest: float) -> Scales:
    if recipe.scale_form == "e8m0":
        return e8m0_scales(amax, fp8_max)
    scale = (
        scale_from_amax(amax, fp8_max, largest, power_of_two=True)
        if recipe.scale_form == "fp32 power of two"
        else scale_from_amax(amax, fp8_max)
    )
    return Scales(scale, scale.reciprocal())


class DelayedScale(torch.nn.Module):
    """Scale of one operand of each expert, and the largest values of the steps that it comes from."""

    history_He: Tensor
    scale_e: Tensor

    def __init__(self, recipe: Recipe, operand: Operand, num_experts: int, device: torch.device | str) -> None:
        super().__init__()
        self.recipe, self.fp8_max = recipe, torch.finfo(dtype_of(recipe, operand)).max
        self.register_buffer(
            "history_He", torch.zeros(recipe.history_steps, num_experts, device=device), persistent=False
        )
        self.register_buffer("scale_e", torch.ones(num_experts, device=device), persistent=False)

    def observe(self, x_bRC: Tensor, experts: slice) -> None:
        """Let the current step know these values."""
        if x_bRC.shape[1]:
            current = self.history_He[0, experts]
            torch.maximum(current, x_bRC.abs().amax((1, 2)).float(), out=current)

    def update(self) -> None:
        """The scale of the next step; the history moves on by one. A step without values (an expert without tokens)
        changes nothing."""
        last_e = self.history_He[0].clone()
        is_seen_e = last_e != 0
        moved_He = self.history_He.roll(-1, 0)
        amax_e = moved_He.nan_to_num(nan=0.0, posinf=torch.inf).amax(0) if self.recipe.takes_max else last_e
        is_usable_e = is_seen_e & amax_e.isfinite() & (amax_e > 0)
        scale_e = scale_from_amax(amax_e, self.fp8_max * 2.0**-self.recipe.margin)
        self.scale_e.copy_(torch.where(is_usable_e, scale_e, self.scale_e))
        moved_He[0] = 0
        self.history_He.copy_(torch.where(is_seen_e, moved_He, self.history_He))


class Fp8Product(torch.nn.Module):
    """y = x W^T of one linear layer or of the experts of this rank, with quantised operands; holds no weight.

    `weight` is (O, I), or (e, O, I) with the rows of each expert in `splits`.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_experts: int,
        is_expert: bool,
        accumulate: bool,
        device: torch.device | str,
        has_fp8_parameters: bool = False,
    ) -> None:
        super().__init__()
        self.recipe, self.is_expert, self.accumulate, self.has_fp8_parameters = (
            recipe,
            is_expert,
            accumulate,
            has_fp8_parameters,
        )
        self.is_active = False
        self._weights: dict[Any, Tensor] = {}
        self.watch: Callable[[Operand, Tensor, Tensor], None] | None = None
        if recipe.is_delayed:
            self.delayed: Any = torch.nn.ModuleDict(
                {operand: DelayedScale(recipe, operand, num_experts, device) for operand in OPERANDS}
            )

    def forward(self, x_RI: Tensor, weight: Tensor, splits: int | list[int] | None = None) -> Tensor:
        """(R, I) -> (R, O), in the dtype of x. Communicates nothing."""
        rows = x_RI.shape[0] if splits is None else splits
        return _Fp8ProductFunction.apply(x_RI, weight, rows, self)

    @contextmanager
    def as_kept(self, weight: torch.nn.Parameter) -> Iterator[None]:
        """Inside, where nothing is trained, `weight` has the values that a parameter in FP8 only would hold of it."""
        if not self.has_fp8_parameters or torch.is_grad_enabled():
            yield
            return
        exact = weight.data
        weight_eOI = exact if exact.dim() == 3 else exact[None]
        weight.data = (
            self.operand(weight_eOI, "w", False, slice(0, len(weight_eOI)), False).to(exact.dtype).view_as(exact)
        )
        try:
            yield
        finally:
            weight.data = exact

    def operand(self, x_bRC: Tensor, operand: Operand, along_rows: bool, experts: slice, is_first_use: bool) -> Tensor:
        """x_bRC with the values that its FP8 numbers stand for, fp32, to be summed over columns, or (along_rows) over
        rows."""
        # weights stay the same during a step, and those of square blocks, or of one scale, in both directions
        is_same_both_ways = self.recipe.block_shape("w", False) == self.recipe.block_shape("w", True)
        key = (experts.start, along_rows and not is_same_both_ways)
        if operand == "w" and key in self._weights:
            return self._weights[key]
        scale_b = None
        if self.recipe.is_delayed:
            delayed = self.delayed[operand]
            if is_first_use:
                delayed.observe(x_bRC, experts)
            scale_b = delayed.scale_e[experts]
        scaled, values, inverse = quantize(x_bRC, self.recipe, operand, along_rows, scale_b)
        if self.watch is not None and is_first_use:
            self.watch(operand, scaled, values)
        _, R, C = x_bRC.shape
        b, num_r, r, num_c, c = values.shape
        found = to_fp32(values).mul_(inverse).view(b, num_r * r, num_c * c)[:, :R, :C]
        if operand == "w" and self.is_active:
            self._weights[key] = found
        return found

    def begin_step(self) -> None:
        """Compute in FP8 from now on."""
        self.is_active = True

    def end_step(self) -> None:
        """Compute without FP8, and forget the weights, which are about to change."""
        self.is_active = False
        self._weights.clear()


def _pieces(rows: int | list[int], num_experts: int) -> Iterator[tuple[slice, slice, int]]:
    """(experts, rows of x, matrices) that can be computed together: all experts where they have as many rows each, else
    one by one."""
    if isinstance(rows, int):
        yield slice(0, num_experts), slice(0, rows * num_experts), num_experts
        return
    start = 0
    for expert, count in enumerate(rows):
        yield slice(expert, expert + 1), slice(start, start + count), 1
        start += count


def _matrices(rows_RC: Tensor, b: int) -> Tensor:
    """The rows of b matrices one after the other, as (b, R / b, C)."""
    return rows_RC.view(b, rows_RC.shape[0] // b, rows_RC.shape[1])


class _Fp8ProductFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight: Tensor, rows: int | list[int], product: Fp8Product) -> Tensor:
        ctx.rows, ctx.product, ctx.weight = rows, product, weight
        x_RI = x_RI.contiguous()
        ctx.save_for_backward(x_RI, weight)
        weight_eOI = weight if weight.dim() == 3 else weight[None]
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_eOI.shape[1])
        for experts, part, b in _pieces(rows, len(weight_eOI)):
            x_bRI = product.operand(_matrices(x_RI[part], b), "x", False, experts, True)
            w_bOI = product.operand(weight_eOI[experts], "w", False, experts, True)
            y_RO[part] = _matmul(x_bRI, w_bOI.transpose(1, 2), x_RI.dtype).flatten(0, 1)
        return y_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RI, weight = ctx.saved_tensors
        product: Fp8Product = ctx.product
        weight_eOI = weight if weight.dim() == 3 else weight[None]
        main_grad: Tensor | None = getattr(ctx.weight, "main_grad", None) if product.accumulate else None
        target = main_grad if main_grad is not None else torch.zeros_like(weight)
        target_eOI = target if target.dim() == 3 else target[None]
        grad_RO, grad_x_RI = grad_RO.contiguous(), torch.empty_like(x_RI)
        for experts, part, b in _pieces(ctx.rows, len(weight_eOI)):
            x_bRI, grad_bRO = (_matrices(rows[part], b) for rows in (x_RI, grad_RO))
            dy_bRO = product.operand(grad_bRO, "dy", False, experts, True)
            w_bOI = product.operand(weight_eOI[experts], "w", True, experts, False)
            grad_x_RI[part] = _matmul(dy_bRO, w_bOI, x_RI.dtype).flatten(0, 1)
            dy_bRO = product.operand(grad_bRO, "dy", True, experts, False)
            x_bRI = product.operand(x_bRI, "x", True, experts, False)
            # into an fp32 main_grad the kernels add in fp32, without rounding to the dtype of x
            target_eOI[experts] += _matmul(dy_bRO.transpose(1, 2), x_bRI, target.dtype)
        if main_grad is None:
            return grad_x_RI, target, None, None
        ctx.weight.grad_added_to_main_grad = True
        return grad_x_RI, torch.empty_like(weight), None, None


def _matmul(a_bXY: Tensor, b_bYZ: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, accumulated in fp32 (wider where dtype is), rounded to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.bmm(a_bXY.to(wide), b_bYZ.to(wide)).to(dtype)


# --- a training step --------------------------------------------------------------------------------------------------


def products(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Fp8Product]]:
    """The emulated products of this rank's model chunks, by the name of the layer that has them."""
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, Fp8Product):
                yield name.rpartition(".")[0], module


def scaling_state(models: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """What the delayed recipe remembers: "layer.operand.history" (H, e) and "layer.operand.scale" (e,). Not to be
    changed."""
    if _is_on_transformer_engine(models):
        from hunyuan_pretrain.model.transformer_engine import scaling_state as state_of

        return {name: tensor for model in models for name, tensor in state_of(model).items()}
    return {
        f"{layer}.{operand}.{kind}": tensor
        for layer, product in products(models)
        if product.recipe.is_delayed
        for operand, scale in product.delayed.items()
        for kind, tensor in (("history", scale.history_He), ("scale", scale.scale_e))
    }


def load_scaling_state(models: Sequence[torch.nn.Module], state: dict[str, Tensor]) -> None:
    """Write what `scaling_state` of the same layers returned. Raises KeyError where something is missing."""
    if _is_on_transformer_engine(models):
        from hunyuan_pretrain.model.transformer_engine import load_scaling_state as load

        for model in models:
            load(model, state)
        return
    for name, tensor in scaling_state(models).items():
        tensor.copy_(state[name])


def _is_on_transformer_engine(models: Sequence[torch.nn.Module]) -> bool:
    config: Any = models[0].config
    return config.uses_transformer_engine


@contextmanager
def training_step(models: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> Iterator[None]:
    """Inside it layers with a recipe compute in FP8; outside, as in validation, in the dtype of the run. At its end
    delayed scales move on.

    Holds all micro-batches of one optimizer step, forward and backward. Communicates at the end, with the delayed
    recipe: the largest values, over tensor, context and data parallel ranks; those of experts over the ranks that hold
    the same ones.
    """
    if _is_on_transformer_engine(models):
        from hunyuan_pretrain.model.transformer_engine import training_step as on_its_kernels

        with on_its_kernels(models, groups):
            yield
        return
    found = [product for _, product in products(models)]
    for product in found:
        product.begin_step()
    try:
        yield
    finally:
        for product in found:
            product.end_step()
    _update_scales(found, groups)


def _update_scales(found: list[Fp8Product], groups: ProcessGroupCollection) -> None:
    for is_expert, shared_by in ((False, groups.tp_dp_cp), (True, groups.expt_tp_dp)):
        mine = [product for product in found if product.is_expert == is_expert and product.recipe.is_delayed]
        delayed: list[Any] = [scale for product in mine for scale in product.delayed.values()]
        if not delayed:
            continue
        current = torch.cat([scale.history_He[0] for scale in delayed])
        if shared_by.size() > 1:
            handed_over("all_reduce", current, is_written=True)
            dist.all_reduce(current, op=dist.ReduceOp.MAX, group=shared_by)
        for scale, amax_e in zip(delayed, current.split([scale.scale_e.numel() for scale in delayed]), strict=True):
            scale.history_He[0] = amax_e
            scale.update()
