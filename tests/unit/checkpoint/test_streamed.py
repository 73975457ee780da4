"""Modules whose weights stay on disk: read when they are called, freed after, and the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hunyuan_pretrain.checkpoint.streamed import stream


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.experts[expert](self.first(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        for block in self.blocks:
            x = block(x, expert)
        return x


def held(model: nn.Module) -> set[str]:
    """Names of the parameters that take their memory."""
    return {
        name for name, p in model.named_parameters() if p.untyped_storage().nbytes() == p.numel() * p.element_size()
    }


def streamed(real: nn.Module, log: list[str]) -> Any:
    values = dict(real.named_parameters())
    with torch.device("meta"):
        model = type(real)()

    def read(name: str) -> Tensor:
        log.append(name)
        return values[name].detach().clone()

    parts = [part for block in model.blocks for part in (block, *block.experts)]
    stream(model, lambda name: values[name].dtype, read, parts)
    return model


def test_the_result_is_the_same_and_only_what_is_called_is_read() -> None:
    real, log = Model(), []
    model = streamed(real, log)
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert torch.equal(model(x, 1), real(x, 1))
    wanted = [(block, part) for block in range(2) for part in ("first", "experts.1")]
    assert log == [f"blocks.{block}.{part}.{kind}" for block, part in wanted for kind in ("weight", "bias")]


def test_one_outermost_part_is_in_memory_at_a_time() -> None:
    model, seen = streamed(Model(), []), []
    assert held(model) == set()
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(held(model)), prepend=True)
    with torch.no_grad():
        model(torch.randn(2, 8), 2)
    assert [{name.split(".")[1] for name in names} for names in seen] == [{"0"}, {"1"}]
    assert held(model) == set()


def test_between_calls_parameters_have_their_shape_dtype_and_device() -> None:
    model = streamed(Model().to(torch.bfloat16), [])
    weight = model.blocks[0].first.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((8, 8), torch.bfloat16, "cpu")


def test_a_part_that_returns_its_weight_gives_it_to_the_caller() -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 2))

        def forward(self) -> Tensor:
            return self.weight

    with torch.device("meta"):
        model = nn.Sequential(Output())
    stream(model, lambda _: torch.float32, lambda _: torch.full((3, 2), 7.0), [model[0]])
    assert model[0]().tolist() == [[7.0, 7.0]] * 3
    assert held(model) == set()


def test_refuses_parameters_that_no_part_reads_and_buffers() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"no part holds blocks\.1\.first\.weight"):
        stream(model, lambda _: torch.float32, lambda _: torch.empty(0), [model.blocks[0]])
    with torch.device("meta"):
        norm = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"buffers are not on disk: 0\.running_mean"):
        stream(norm, lambda _: torch.float32, lambda _: torch.empty(0), [norm[0]])
