"""The shared expert beside the exchange of the routed ones: the order of work on both streams, on stand-ins that record
it, and that no number changes. tests/gpu/test_side_stream.py runs it on real streams."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.runtime import streams
from tests.helpers.tiny import build, packed_inputs, tiny_model


class Stream:
    """Records what it is given."""

    log: ClassVar[list[str]] = []
    current: ClassVar[Stream]

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    main, side = Stream("main"), Stream("side")
    Stream.log, Stream.current = [], main

    @contextmanager
    def entered(stream: Stream) -> Any:
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    monkeypatch.setattr(streams, "_side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: Stream.log.append(f"memory kept for {stream.name}")
    )
    return Stream.log


def logged(name: str) -> Any:
    return lambda *_: Stream.log.append(f"{name} on {Stream.current.name}")


def moe_of(is_overlapped: bool, **parallel: Any) -> Any:
    moe = build(tiny_model(), **parallel).decoder.layers[1].mlp
    moe.overlaps_shared_expert = is_overlapped
    return moe


def results(moe: Any) -> list[Tensor]:
    """Output and the gradients of the input and of all weights."""
    routing = packed_inputs(tiny_model()).routing
    leaf_TD = torch.randn(96, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
    hidden_TD = leaf_TD * 1.0  # autograd adds up its gradients as they arrive
    output_TD, _ = moe(hidden_TD, hidden_TD, routing)
    probe = torch.randn(output_TD.shape, generator=torch.Generator().manual_seed(6))
    weights = list(moe.parameters())
    (output_TD * probe).sum().backward()
    return [output_TD, leaf_TD.grad, *(weight.grad for weight in weights)]  # type: ignore[list-item]


def test_the_shared_expert_runs_between_two_waits_beside_the_routed_ones(log: list[str]) -> None:
    moe = moe_of(True)
    moe.shared_experts.register_forward_hook(logged("shared expert"))
    moe.experts.register_forward_hook(logged("routed experts"))
    combine = moe.combine
    moe.combine = lambda *args: logged("combine")() or combine(*args)
    results(moe)
    assert log == [
        "side waits for main",
        "shared expert on side",
        "memory kept for side",
        "routed experts on main",
        "main waits for side",
        "memory kept for main",
        "combine on main",
    ]


def test_without_the_setting_nothing_leaves_the_current_stream(log: list[str]) -> None:
    results(moe_of(False))
    assert log == []


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_place_of_the_shared_expert_changes_no_bit(log: list[str], recompute: str) -> None:
    """Before the routed experts on a side stream, or after them: gradients of the layer's input are the same sums."""
    expected = results(moe_of(False, recompute=recompute))
    actual = results(moe_of(True, recompute=recompute))
    assert log.count("side waits for main") >= 1
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_on_a_cpu_the_setting_changes_nothing() -> None:
    moe = build(tiny_model(), overlap_shared_expert=True).decoder.layers[0].mlp
    assert moe.overlaps_shared_expert is False
