"""The table of FP8 recipes: that it is complete, and the entries that no other test reads."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from hunyuan_pretrain.config.recipe import RECIPES, Hardware, RecipeName
from hunyuan_pretrain.config.schema import PrecisionConfig


def test_every_recipe_name_has_an_entry() -> None:
    assert set(RECIPES) == set(get_args(RecipeName))
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_without_settings_a_recipe_equals_its_entry(name: RecipeName) -> None:
    assert PrecisionConfig(fp8_recipe=name).recipe == RECIPES[name]


def test_settings_of_the_delayed_recipe_are_applied() -> None:
    found = PrecisionConfig(
        fp8_recipe="delayed", fp8_format="e4m3", fp8_margin=2, fp8_amax_compute_algo="most_recent"
    ).recipe
    expected = {"backward_format": "e4m3", "margin": 2, "history_steps": 1, "takes_max": False}
    assert found == dataclasses.replace(RECIPES["delayed"], **expected)


@pytest.mark.parametrize(
    ("operand", "along_rows", "blocks"),
    [
        ("x", False, {"blockwise": (1, 128), "mxfp8": (1, 32)}),
        ("dy", True, {"blockwise": (128, 1), "mxfp8": (32, 1)}),
        ("w", False, {"blockwise": (128, 128), "mxfp8": (1, 32)}),
        ("w", True, {"blockwise": (128, 128), "mxfp8": (32, 1)}),
    ],
)
def test_blocks_lie_along_the_summed_dimension(operand: str, along_rows: bool, blocks: dict[str, object]) -> None:
    found = {name: recipe.block_shape(operand, along_rows) for name, recipe in RECIPES.items()}
    assert found == {"delayed": None, "tensorwise": None} | blocks


def test_a_recipe_without_kernels_runs_on_no_gpu() -> None:
    recipe = dataclasses.replace(RECIPES["blockwise"], hardware=())
    assert recipe.missing((10, 0), (13, 0)) == "kernels, and Transformer Engine has none for it"


@pytest.mark.parametrize(
    ("hardware", "text"),
    [
        (Hardware((9, 0)), "9.0 or more"),
        (Hardware((9, 0), cuda=(12, 9)), "9.0 or more, and CUDA 12.9 or more"),
        (Hardware((10, 0), below=(12, 0)), "10.0 or more, and less than 12.0"),
        (Hardware((8, 9), below=(8, 10), cuda=(12, 1)), "8.9 and CUDA 12.1 or more"),
    ],
)
def test_hardware_as_errors_name_it(hardware: Hardware, text: str) -> None:
    assert str(hardware) == text
