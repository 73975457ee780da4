"""Recompute by part and offloading on one rank: the same bits as without, and the memory that `plan` counts."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from hunyuan_pretrain.config.derived import offloaded_layers
from hunyuan_pretrain.config.schema import Experiment, Recompute
from hunyuan_pretrain.model import offload, recompute
from hunyuan_pretrain.model.dropout import dropout_of, rates_of
from hunyuan_pretrain.model.engines import training_step
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import build_model
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.plan.activations import kept_by_group, kept_by_layer
from tests.helpers import tiny
from tests.helpers.kept_memory import KeptMemory
from tests.helpers.runs import experiment_fields

CHOICES = get_args(Recompute)
TOKENS = 96


class Step:
    """Forward and backward pass of one micro-batch, and the memory kept in between."""

    def __init__(
        self,
        choice: str,
        layers_offloaded: int,
        precision: dict[str, Any],
        use_kernels: bool = False,
        lengths: tuple[int, ...] = (20, 44, 7, 25),
        **changes: Any,
    ) -> None:
        self.experiment = experiment(choice, layers_offloaded, precision, **changes)
        parts = self.experiment.model, self.experiment.parallel, self.experiment.precision
        config = transformer_config(*parts, use_kernels=use_kernels, tuning=self.experiment.tuning)
        (self.model,) = build_model(config, tiny.world_of_one(), 1)
        self.model.offload.smallest_bytes = 1
        inputs, self.memory = tiny.packed_inputs(self.experiment.model, lengths), KeptMemory()
        with self.in_step(), self.memory.watching():
            self.loss, self.statistics = self.forward(inputs)
            gc.collect()  # Triton's interpreter holds the arguments of its last launch in a cycle
            self.on_device, self.on_host, self.blocks = (
                self.memory.bytes(),
                self.memory.bytes(True),
                self.memory.blocks(),
            )
            self.backward()
            self.left = self.memory.bytes(True)
        self.gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}

    def in_step(self) -> Any:
        if self.experiment.precision.recipe is None:
            return nullcontext()
        return training_step([self.model], tiny.world_of_one())

    def forward(self, inputs: ModelInputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(inputs)

    def backward(self) -> None:
        self.loss.backward()

    def equals(self, other: Step) -> bool:
        return (
            torch.equal(self.loss, other.loss)
            and torch.equal(self.statistics, other.statistics)
            and all(torch.equal(gradient, other.gradients[name]) for name, gradient in self.gradients.items())
        )


class LayersOnly(Step):
    """Forward only, without embedding and loss, so that all that is kept belongs to layers."""

    def forward(self, inputs: ModelInputs) -> tuple[torch.Tensor, torch.Tensor]:
        with self.memory_off():
            self.input = self.model.embedding(inputs.tokens_T).requires_grad_()
            rates = rates_of(self.experiment.tuning, self.experiment.stages[0])
            dropout = dropout_of(inputs.routing, rates, tiny.GROUP_TOKENS, 0, 1)
        return self.model._through_layers(self.input, inputs, dropout)

    def backward(self) -> None:
        """What is kept is already measured, and kernels are slow in Triton's interpreter."""

    @contextmanager
    def memory_off(self) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            yield


def experiment(
    choice: str, layers_offloaded: int, precision: dict[str, Any], lora: dict[str, Any] | None = None, **changes: Any
) -> Experiment:
    fields = experiment_fields(Path("corpus"), Path("run"))
    fields["tuning"] = {"lora": lora}
    fields["model"] = tiny.tiny_model(**({"num_layers": 6} | changes)).model_dump()
    fields["parallel"] = {"recompute": choice, "cpu_offloading_num_layers": layers_offloaded}
    fields["precision"] = precision
    for stage in fields["stages"]:
        stage["sequence_length"] = TOKENS
        stage["micro_batch_sequences"] = 1
    return Experiment.model_validate(fields)


MODELS: dict[str, dict[str, Any]] = {
    "recycling": {},
    "dropless, top 2": {"moe_expert_capacity_factor": None, "recycle_routing": False, "moe_router_topk": 2},
    "no CLA, dropping, no QK norm": {"cla_share_factor": 1, "moe_expert_capacity_factor": 0.75, "qk_layernorm": False},
}


@pytest.mark.parametrize(("model", "dtype"), [("recycling", "fp32"), *((model, "bf16") for model in MODELS)])
def test_no_choice_changes_a_bit(model: str, dtype: str) -> None:
    """Loss, statistics and every gradient, with everything offloaded that can be, and without."""
    reference = Step("none", 0, {"dtype": dtype}, **MODELS[model])
    for choice in CHOICES:
        for layers in (0, 4):
            step = Step(choice, layers, {"dtype": dtype}, **MODELS[model])
            assert step.equals(reference), (choice, layers)
            assert (step.on_host > 0) == (layers > 0)
            assert step.left == 0, "host memory is free after the backward pass"


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_no_choice_changes_a_bit_of_emulated_fp8(recipe: str) -> None:
    precision = {"dtype": "bf16", "fp8_recipe": recipe, "num_layers_at_end_in_bf16": 1}
    sizes = {"hidden_size": 64, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64, "num_layers": 4}
    reference = Step("none", 0, precision, **sizes)
    for choice in ("swiglu", "norms", "selective+norms", "cla_group"):
        step = Step(choice, 2, precision, **sizes)
        assert step.equals(reference), choice
        assert step.on_device + step.on_host <= reference.on_device


@pytest.mark.parametrize(("dtype", "topk"), [("fp32", 2), ("bf16", 1)])
def test_a_forward_pass_keeps_what_the_plan_counts(dtype: str, topk: int) -> None:
    """Every planned block exists. What is kept beside them is at most two numbers per row, or the RoPE table, which all
    layers share. With the kernels, as on a GPU, and one document, of which attention keeps one logsumexp."""
    pytest.importorskip("triton")
    changes: dict[str, Any] = {"moe_router_topk": topk, "recycle_routing": topk == 1, "hidden_size": 64}
    changes |= {"num_layers": 2}
    for choice in CHOICES:
        step = LayersOnly(choice, 0, {"dtype": dtype}, use_kernels=True, lengths=(TOKENS,), **changes)
        planned = Counter(blocks_of(step))
        planned[planned_input(step)] -= 1  # made by the embedding, before the watch
        found = Counter(size for size, _ in step.blocks)
        found[step.loss.untyped_storage().nbytes()] -= 1  # the output of the layers
        assert planned - found == Counter(), choice
        beside = Counter({2 * step.experiment.model.head_dim * TOKENS: 2})
        assert all(size <= 2 * 8 * TOKENS for size in found - planned - beside), choice


def blocks_of(step: Step) -> list[int]:
    model, parts = step.experiment.model, step.experiment.parallel.recomputed_parts
    layers = [kept_by_layer(step.experiment, step.experiment.stages[0], 1, layer) for layer in range(model.num_layers)]
    share = model.cla_share_factor
    return [
        size for start in range(0, len(layers), share) for size in kept_by_group(layers[start : start + share], parts)
    ]


def planned_input(step: Step) -> int:
    return kept_by_layer(step.experiment, step.experiment.stages[0], 1, 0)[0].bytes


@pytest.mark.parametrize("use_kernels", [False, True])
def test_a_choice_frees_exactly_what_the_plan_says(use_kernels: bool) -> None:
    if use_kernels:
        pytest.importorskip("triton")
    LayersOnly("none", 0, {"dtype": "bf16"}, num_layers=2)  # constants that are made once in a process
    everything = LayersOnly("none", 0, {"dtype": "bf16"}, use_kernels, num_layers=2)
    for choice in CHOICES[1:-1]:
        step = LayersOnly(choice, 0, {"dtype": "bf16"}, use_kernels, num_layers=2)
        planned = sum(blocks_of(everything)) - sum(blocks_of(step))
        assert everything.on_device - step.on_device == planned > 0, choice


def test_dropout_of_adapters_keeps_and_frees_what_the_plan_says() -> None:
    """What the plan leaves out is small, and the same for every choice: what is of rank 1, and numbers of tokens."""
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def left_out(choice: str, dropout: float) -> int:
        lora = {"rank": 1, "alpha": 8, "dropout": dropout, "target_modules": every}
        step = LayersOnly(choice, 0, {"dtype": "fp32"}, lora=lora, num_layers=2, moe_router_topk=2)
        return step.on_device - sum(blocks_of(step))

    beside = [left_out(choice, 0.3) for choice in ("none", "norms", "swiglu", "swiglu+norms")]
    assert max(beside) - min(beside) < 8 * TOKENS, beside
    without = [left_out(choice, 0.0) for choice in ("none", "norms", "swiglu")]
    assert max(without) - min(without) < 8 * TOKENS, without
    assert 0 < beside[0] - without[0] < 2 * 8 * 8 * TOKENS  # of two layers, numbers of tokens and rows in int64


def test_with_kernels_no_choice_changes_a_bit() -> None:
    """Their norm keeps a sum that it writes itself; recomputing and offloading find it too."""
    pytest.importorskip("triton")
    few: Any = {"use_kernels": True, "lengths": (20, 12), "num_layers": 4}  # kernels are slow in the interpreter
    here = Step("none", 0, {"dtype": "bf16"}, **few)
    for choice in ("none", "swiglu+norms"):
        there = Step(choice, 2, {"dtype": "bf16"}, **few)
        assert there.equals(here), choice
        if choice == "none":
            assert here.on_device == there.on_device + there.on_host
            assert there.on_host > 0.3 * here.on_device


@pytest.mark.parametrize("choice", ["none", "swiglu+norms", "selective", "cla_group"])
def test_offloading_moves_what_is_kept(choice: str) -> None:
    """What is no longer on the device is on the host, byte by byte, but for the last group on its way; the model's last
    CLA group stays."""
    here = Step(choice, 0, {"dtype": "bf16"})
    there = Step(choice, 4, {"dtype": "bf16"})
    assert offloaded_layers(here.experiment.model, there.experiment.parallel, 0) == range(4)
    assert here.on_device == there.on_device + there.on_host
    if choice != "cla_group":
        assert there.on_host > 0.5 * here.on_device


def test_at_most_one_group_is_on_its_way_to_the_host() -> None:
    """A group's device memory is free once the next group is done, not before its copy is waited for."""
    events: list[str] = []

    class Recorded(offload.Lanes):
        @contextmanager
        def copying(self, to: Any) -> Any:
            events.append(f"copy to {to}")
            yield

        def mark(self, to: Any) -> Any:
            return to

        def wait(self, mark: Any) -> None:
            if mark is not None:
                events.append(f"wait for the copy to {mark}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "Lanes", Recorded)
        Step("none", 4, {"dtype": "fp32"})
    assert events == [
        "copy to host",  # group 0, while group 1 computes
        "wait for the copy to host",  # after group 1
        "copy to host",  # group 1, while group 2 computes
        "wait for the copy to host",  # after group 2
        "copy to device",  # group 1, while group 2 is differentiated
        "copy to device",  # group 0, while group 1 is
        "wait for the copy to device",  # group 1
        "wait for the copy to device",  # group 0
    ]


def test_weights_reach_the_backward_pass_as_themselves() -> None:
    """Core finds the main_grad of a weight, and the mark that it holds the gradient, on the parameter itself."""
    seen: list[bool] = []

    class Matmul(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, weight = ctx.saved_tensors
            seen.append(hasattr(weight, "main_grad"))
            return grad @ weight.t(), x.t() @ grad

    layer = torch.nn.Linear(4, 4)
    layer.weight.main_grad = torch.zeros(4, 4)  # type: ignore[assignment]
    start = torch.randn(3, 4, requires_grad=True) * 1
    moved = offload.Offload(1, smallest_bytes=1)
    result = Matmul.apply(start * 2, layer.weight)
    moved.after_group(0, start.grad_fn, result, [layer], None)
    moved.after_group(1, start.grad_fn, result, [layer], None)
    result.sum().backward()
    assert seen == [True]


def test_an_output_is_computed_once_for_all_its_readers() -> None:
    calls: list[int] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, x[1:])
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            x, part = ctx.saved_tensors
            assert torch.equal(x[1:], part)
            return 2 * x * grad

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return Double.apply(x)

    leaf = torch.randn(5, requires_grad=True)
    x = leaf * 1
    y = double(x)
    result = Square.apply(y) + Square.apply(y)
    recompute.free_until_backward(double, x, y, result)
    memory = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
    del y
    assert memory.expired()
    result.sum().backward()
    assert len(calls) == 2, "once in each direction"
    torch.testing.assert_close(leaf.grad, 16 * leaf.detach())
    y = x * 2  # a node of torch's own keeps no input
    with pytest.raises(RuntimeError, match="does not keep its input"):
        recompute.free_until_backward(double, x, y, Square.apply(y))


def test_nothing_is_recomputed_or_moved_without_gradients() -> None:
    model = tiny.build(tiny.tiny_model(), recompute="swiglu+norms", cpu_offloading_num_layers=2)
    inputs = tiny.packed_inputs(tiny.tiny_model())
    with torch.no_grad():
        assert not model(inputs)[0].requires_grad
    assert model.offload._sending is None
