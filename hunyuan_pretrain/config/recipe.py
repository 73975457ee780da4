"""FP8 recipes: how scales are computed, the formats of values, and what the kernels need.

`RECIPES` has one entry per recipe. The configuration rules, the plan, the machine check, the emulation and the
Transformer Engine layers all read it. To add a recipe, add an entry; if its scales have a new form, also add a case to
`scales_of` in model/fp8/quantise.py. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

RecipeName = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Operand = Literal["x", "w", "dy"]
"""Operands of a linear y = x W^T and its gradients: inputs, weights, output gradients."""
OPERANDS: tuple[Operand, ...] = ("x", "w", "dy")
NumberFormat = Literal["e4m3", "e5m2"]
"""Exponent and mantissa bits, besides the sign. The maximum is 448 for e4m3 and 57344 for e5m2."""
ScaleForm = Literal["fp32", "fp32 power of two", "e8m0"]
"""E8M0 is an 8-bit exponent and nothing else. The inverse scale is rounded up to it."""


@dataclass(frozen=True)
class Hardware:
    """The GPUs, and torch's CUDA version, that have the kernels of a recipe."""

    first: tuple[int, int]
    """Lowest compute capability."""
    below: tuple[int, int] | None = None
    """Compute capabilities from this one on do not have the kernels."""
    cuda: tuple[int, ...] = ()
    """Lowest CUDA version."""

    def has(self, capability: tuple[int, int], cuda: tuple[int, ...]) -> bool:
        return self.first <= capability and (self.below is None or capability < self.below) and cuda >= self.cuda

    def __str__(self) -> str:
        """The text for an error: "9.0 or more, and CUDA 12.9 or more"."""
        is_one_capability = self.below == (self.first[0], self.first[1] + 1)
        conditions = [_dotted(self.first) if is_one_capability else f"{_dotted(self.first)} or more"]
        if self.below is not None and not is_one_capability:
            conditions.append(f"less than {_dotted(self.below)}")
        if self.cuda:
            conditions.append(f"CUDA {_dotted(self.cuda)} or more")
        return (" and " if is_one_capability else ", and ").join(conditions)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Recipe:
    """One FP8 recipe. `PrecisionConfig.recipe` is the experiment's, with its settings filled in."""

    name: RecipeName
    meaning: str
    """Its text in the description of precision.fp8_recipe."""
    scale_form: ScaleForm
    block: int | None
    """Number of values along the reduction dimension of a matmul that share a scale. None: one scale for the whole
    tensor, which is the tensor of one expert in routed experts."""
    engine_class: str | None = None
    """Class in transformer_engine.common.recipe; None: there is none, so the recipe can only be emulated."""
    hardware: tuple[Hardware, ...] = ()
    """Hardware with Transformer Engine's kernels; any entry is enough."""
    square_weight_blocks: bool = False
    """Weight blocks are square, so a weight is quantised once for both matmuls that read it."""
    is_delayed: bool = False
    """Scales come from the amax of earlier steps, which checkpoints store; otherwise from the tensor itself."""
    size_multiple: int = 16
    """Matrix sizes must be multiples of this on every rank."""
    gathers_whole_blocks: bool = False
    """Sequence parallelism all-gathers inputs in FP8, as whole blocks with their scales."""
    no_parameters: str | None = None
    """Why weights cannot be kept in FP8 only; None if they can."""
    forward_format: NumberFormat = "e4m3"
    """Of x and w."""
    backward_format: NumberFormat = "e4m3"
    """Of dY."""
    margin: int = 0
    """A delayed scale is divided by 2^margin."""
    history_steps: int = 1024
    """Number of steps whose amax a delayed recipe remembers."""
    takes_max: bool = True
    """A delayed scale uses the largest amax of the history; otherwise that of the last step."""

    def with_settings(
        self, number_format: str | None, margin: int | None, history_steps: int | None, algorithm: str | None
    ) -> Recipe:
        """The recipe with the settings precision.fp8_* applied. None keeps the recipe's value, except that the history
        defaults to 1 step with most_recent."""
        takes_max = algorithm != "most_recent"
        backward: dict[str | None, NumberFormat] = {"hybrid": "e5m2", "e4m3": "e4m3", None: self.backward_format}
        return replace(
            self,
            backward_format=backward[number_format],
            margin=self.margin if margin is None else margin,
            history_steps=history_steps or (self.history_steps if takes_max else 1),
            takes_max=takes_max,
        )

    @property
    def is_hybrid(self) -> bool:
        """Whether gradients have another format than inputs and weights."""
        return self.forward_format != self.backward_format

    def number_format(self, operand: Operand) -> NumberFormat:
        return self.backward_format if operand == "dy" else self.forward_format

    def block_shape(self, operand: Operand, along_rows: bool) -> tuple[int, int] | None:
        """(rows, columns) that share a scale, in a matmul that sums over columns, or over rows if `along_rows`. None:
        the whole matrix."""
        if self.block is None:
            return None
        if operand == "w" and self.square_weight_blocks:
            return self.block, self.block
        return (self.block, 1) if along_rows else (1, self.block)

    @property
    def scale_bytes_per_value(self) -> float:
        """Bytes of scales per quantised value; 0 with one scale per tensor."""
        return 0.0 if self.block is None else (1 if self.scale_form == "e8m0" else 4) / self.block

    def missing(self, capability: tuple[int, int], cuda: tuple[int, ...]) -> str | None:
        """The compute capability and CUDA version that the kernels need, if the given ones are not enough; None if they
        are."""
        if any(hardware.has(capability, cuda) for hardware in self.hardware):
            return None
        return ", or ".join(map(str, self.hardware)) or "kernels, and Transformer Engine has none for it"


_PER_TENSOR = (Hardware((9, 0)), Hardware((8, 9), below=(8, 10), cuda=(12, 1)))

RECIPES: dict[RecipeName, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "delayed",
            "one scale per tensor, from the largest values of earlier steps",
            engine_class="DelayedScaling",
            hardware=_PER_TENSOR,
            scale_form="fp32",
            block=None,
            is_delayed=True,
            backward_format="e5m2",
        ),
        Recipe(
            "tensorwise",
            "one scale per tensor, from the tensor itself",
            engine_class="Float8CurrentScaling",
            hardware=_PER_TENSOR,
            scale_form="fp32",
            block=None,
            backward_format="e5m2",
        ),
        Recipe(
            "blockwise",
            "one scale per 1 x 128 values, or per 128 x 128 of a weight",
            engine_class="Float8BlockScaling",
            hardware=(Hardware((9, 0), cuda=(12, 9)),),
            scale_form="fp32 power of two",
            block=128,
            square_weight_blocks=True,
            gathers_whole_blocks=True,
        ),
        Recipe(
            "mxfp8",
            "one power-of-two scale per 32 values",
            engine_class="MXFP8BlockScaling",
            hardware=(Hardware((10, 0), below=(12, 0)),),
            scale_form="e8m0",
            block=32,
            size_multiple=32,
            no_parameters="Transformer Engine 2.11 cannot place mxfp8 weights in the buffers that are gathered: they "
            "are quantised by rows and by columns, each from the unquantised values",
        ),
    )
}
