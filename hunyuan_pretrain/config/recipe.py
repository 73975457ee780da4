"""FP8 recipes: where the scales of a tensor come from, in which formats its values are, and what kernels ask for.

`RECIPES` has one entry for each. The configuration's rules, the plan, the check of the machine, the emulation and
Transformer Engine's layers all read it there. A new recipe is an entry, and, where its scales are of a form that no
other recipe has, a case of `scales_of` in model/fp8/quantise.py. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

RecipeName = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Operand = Literal["x", "w", "dy"]
"""Of a matrix product y = x W^T and its gradients: inputs, weights, gradients of the output."""
OPERANDS: tuple[Operand, ...] = ("x", "w", "dy")
NumberFormat = Literal["e4m3", "e5m2"]
"""Bits of exponent and mantissa beside the sign. e4m3 reaches 448, e5m2 57344."""
ScaleForm = Literal["fp32", "fp32 power of two", "e8m0"]
"""E8M0 is an exponent of 8 bits and nothing else; it is the inverse scale that is rounded to it, upwards."""


@dataclass(frozen=True)
class Hardware:
    """GPUs, and the CUDA of torch, that have the kernels of a recipe."""

    first: tuple[int, int]
    """Lowest compute capability."""
    below: tuple[int, int] | None = None
    """Compute capabilities from here on do not have them."""
    cuda: tuple[int, ...] = ()
    """Lowest version."""

    def has(self, capability: tuple[int, int], cuda: tuple[int, ...]) -> bool:
        return self.first <= capability and (self.below is None or capability < self.below) and cuda >= self.cuda

    def __str__(self) -> str:
        """As an error names it: "9.0 or more, and CUDA 12.9 or more"."""
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
    """One FP8 recipe. `PrecisionConfig.recipe` is that of an experiment, with its settings filled in."""

    name: RecipeName
    meaning: str
    """As the documentation of precision.fp8_recipe says it."""
    scale_form: ScaleForm
    block: int | None
    """Values along the summed dimension of a product that share a scale; None: the whole tensor, of one expert."""
    engine_class: str | None = None
    """Of transformer_engine.common.recipe; None: there is none, it can be emulated only."""
    hardware: tuple[Hardware, ...] = ()
    """Any of them has Transformer Engine's kernels."""
    square_weight_blocks: bool = False
    """Blocks of a weight are as high as they are wide: it is quantised once for both products that read it."""
    is_delayed: bool = False
    """A scale comes from the largest values of earlier steps, which checkpoints hold; else from the tensor itself."""
    size_multiple: int = 16
    """What kernels want the sizes of a product to be multiples of, on every rank."""
    gathers_whole_blocks: bool = False
    """Sequence parallelism gathers the inputs in FP8, blocks with their scales, and no parts of blocks."""
    no_parameters: str | None = None
    """Why weights cannot be kept in FP8 only; None: they can."""
    forward_format: NumberFormat = "e4m3"
    """Of x and w."""
    backward_format: NumberFormat = "e4m3"
    """Of dY."""
    margin: int = 0
    """A delayed scale is divided by 2^margin."""
    history_steps: int = 1024
    """Steps of which a delayed recipe remembers the largest values."""
    takes_max: bool = True
    """A delayed scale takes the largest value of the history; else that of the last step."""

    def with_settings(
        self, number_format: str | None, margin: int | None, history_steps: int | None, algorithm: str | None
    ) -> Recipe:
        """The recipe under the settings precision.fp8_*; what is None there stays as it is here."""
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
        """Gradients are in another format than inputs and weights."""
        return self.forward_format != self.backward_format

    def number_format(self, operand: Operand) -> NumberFormat:
        return self.backward_format if operand == "dy" else self.forward_format

    def block_shape(self, operand: Operand, along_rows: bool) -> tuple[int, int] | None:
        """Rows and columns that share a scale, for a product that sums over columns, or (along_rows) over rows; None:
        the whole matrix."""
        if self.block is None:
            return None
        if operand == "w" and self.square_weight_blocks:
            return self.block, self.block
        return (self.block, 1) if along_rows else (1, self.block)

    @property
    def scale_bytes_per_value(self) -> float:
        """Bytes of scales for a quantised value; one for a whole tensor counts nothing."""
        return 0.0 if self.block is None else (1 if self.scale_form == "e8m0" else 4) / self.block

    def missing(self, capability: tuple[int, int], cuda: tuple[int, ...]) -> str | None:
        """What its kernels ask of a GPU's compute capability, and of torch's CUDA, where these do not have it."""
        if any(hardware.has(capability, cuda) for hardware in self.hardware):
            return None
        return ", or ".join(map(str, self.hardware)) or "kernels, and Transformer Engine has none for it"


_PER_TENSOR = (Hardware((9, 0)), Hardware((8, 9), below=(8, 10), cuda=(12, 1)))

RECIPES: dict[RecipeName, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "delayed",
            "one scale a tensor, from the largest values of earlier steps",
            engine_class="DelayedScaling",
            hardware=_PER_TENSOR,
            scale_form="fp32",
            block=None,
            is_delayed=True,
            backward_format="e5m2",
        ),
        Recipe(
            "tensorwise",
            "from the tensor itself",
            engine_class="Float8CurrentScaling",
            hardware=_PER_TENSOR,
            scale_form="fp32",
            block=None,
            backward_format="e5m2",
        ),
        Recipe(
            "blockwise",
            "one for 1 x 128 values, 128 x 128 of a weight",
            engine_class="Float8BlockScaling",
            hardware=(Hardware((9, 0), cuda=(12, 9)),),
            scale_form="fp32 power of two",
            block=128,
            square_weight_blocks=True,
            gathers_whole_blocks=True,
        ),
        Recipe(
            "mxfp8",
            "a power of two for 32 values",
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
