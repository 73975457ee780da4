"""Operations and bytes of a training step, so that a slower one is seen without a GPU: upper bounds for the plain
functions, which an improvement may lower. tests/helpers/byte_counter.py counts, and says how."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from hunyuan_pretrain.config.schema import Experiment, ModelConfig, RuntimeConfig
from hunyuan_pretrain.plan.traffic import loss_bytes, traffic
from tests.benchmarks.step_bytes import (
    HUNYUAN_LARGE,
    PER_STEP,
    add_to_main_grad,
    count_step,
    markdown,
    minimum_kb,
    table,
)
from tests.helpers.byte_counter import LINEAR, SUMS, Count, StepBytes
from tests.helpers.tiny import tiny_model

TOKENS = 8192
LARGE = ModelConfig(**HUNYUAN_LARGE)
# part -> operations forward, backward, and KB, per layer (or step) and token, of Hunyuan-Large's width on a GPU in bf16
BOUNDS = {
    "norms": (21, 30, 1267.5),
    "RoPE, head norm": (24, 26, 983.5),
    SUMS: (0, 6.5, 81),
    "router": (74, 15, 232.7),
    "permute": (1, 2, 90),
    "combine": (5, 6, 307.5),
    "SwiGLU": (4, 8, 1171.5),
    "cross-entropy": (44, 1, 5219.0),
    "embedding": (1, 2, 141.0),
}
# part -> launches forward and backward, per layer, and KB over those needed: index maps, weights, numbers per row
WITH_KERNELS = {
    "norms": (2, 4, 1.03),
    "RoPE, head norm": (1, 2, 1.05),
    "router": (7, 4, 1.08),
    "permute": (1, 1, 1.01),
    "combine": (1, 1, 1.01),
    "SwiGLU": (2, 2, 1.01),
    "cross-entropy": (22, 1, 1.3),
}

Counts = dict[tuple[str, str], Count]


@pytest.fixture(scope="module")
def counts() -> Counts:
    return count_step(LARGE, TOKENS)


def of_part(counts: Counts, part: str, layers: int, num_tokens: int) -> tuple[float, float, float]:
    """Operations forward, backward, and KB, per layer and token."""
    ways = [counts.get((part, way), Count()) for way in ("forward", "backward")]
    layers = 1 if part in PER_STEP else layers
    kb = sum(way.bytes for way in ways) / layers / num_tokens / 1000
    return ways[0].operations / layers, ways[1].operations / layers, kb


@pytest.mark.parametrize("part", BOUNDS)
def test_a_part_needs_no_more_operations_and_bytes_than_now(counts: Counts, part: str) -> None:
    found = of_part(counts, part, LARGE.num_layers, TOKENS)
    assert all(number <= bound for number, bound in zip(found, BOUNDS[part], strict=True)), f"{part}: {found}"


def test_the_kernels_move_what_they_must() -> None:
    pytest.importorskip("triton")
    counts = count_step(LARGE, TOKENS, use_kernels=True)
    least = minimum_kb(LARGE, TOKENS)
    for part, (*launches, factor) in WITH_KERNELS.items():
        *found, kb = of_part(counts, part, LARGE.num_layers, TOKENS)
        assert all(number <= bound for number, bound in zip(found, launches, strict=True)), f"{part}: {found}"
        assert kb < factor * least[part], f"{part}: {kb} KB"
    _, backward, kb = of_part(counts, SUMS, LARGE.num_layers, TOKENS)
    assert backward <= 3.5, "keys and values of a group, the scale of the router loss; the loss of the step"
    assert kb < 4


def test_a_layer_with_kernels_launches_few_operations() -> None:
    """31 without products and attention."""
    pytest.importorskip("triton")
    counts = count_step(LARGE, TOKENS, use_kernels=True)
    outside = {*PER_STEP, *LINEAR}
    launches = sum(count.operations for (part, _), count in counts.items() if part not in outside)
    assert launches / LARGE.num_layers <= 31.5, "half an operation is the seed of the step's backward pass"


def test_every_operation_belongs_to_a_part(counts: Counts) -> None:
    assert {part for part, _ in counts} <= {*BOUNDS, *LINEAR, *PER_STEP}
    rest = sum(count.bytes for (part, _), count in counts.items() if part == "rest")
    assert rest < 0.1 * sum(count.bytes for count in counts.values()), "the final norm, the RoPE table, the statistics"


def test_no_part_moves_less_than_it_must(counts: Counts) -> None:
    """Otherwise the counter misses something, or the minimum is wrong."""
    for part, least in minimum_kb(LARGE, TOKENS).items():
        assert of_part(counts, part, LARGE.num_layers, TOKENS)[2] > 0.99 * least, part


def test_a_small_step_on_the_cpu_stays_within_its_bounds() -> None:
    """The same on real tensors: what one token and layer of the tiny model costs, in fp32."""
    model = tiny_model()
    counts = count_step(model, 128, device="cpu", dtype="fp32")
    inside = [count for (part, _), count in counts.items() if part not in (*LINEAR, *PER_STEP)]
    operations = sum(count.operations for count in inside) / model.num_layers
    kb = sum(count.bytes for count in inside) / model.num_layers / 128 / 1000
    assert operations <= 295
    assert kb <= 21.7


# --- the counter ------------------------------------------------------------------------------------------------------

A = torch.zeros(4, 8)
OPERATIONS: dict[str, tuple[Any, int]] = {
    "sum of two": (lambda: A + A, 2 * 128),  # one tensor, read once
    "in place": (lambda: A.add_(1), 2 * 128),
    "overwritten": (lambda: A.copy_(torch.ones(8)), 32 + 32 + 128),  # ones writes 32
    "to bf16": (lambda: A.to(torch.bfloat16), 128 + 64),
    "a row for all": (lambda: A * torch.empty(8).expand(4, 8), 128 + 32 + 128),
    "views": (lambda: A.t().view(8, 2, 2).split(4), 0),
    "new memory": (lambda: torch.empty(100), 0),
    "rows": (lambda: A.index_select(0, torch.empty(2, dtype=torch.int64).fill_(1)), 16 + 64 + 16 + 64),
    "out": (lambda: torch.mul(A, 2, out=torch.empty(4, 8, dtype=torch.bfloat16)), 128 + 64),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_reads_and_writes_each_element_once(name: str) -> None:
    operation, expected = OPERATIONS[name]
    with StepBytes() as counter:
        operation()
    assert sum(count.bytes for count in counter.counts.values()) == expected


def test_a_backward_operation_belongs_to_the_part_of_its_forward_pass() -> None:
    x = torch.zeros(10, requires_grad=True)
    with StepBytes() as counter:
        with counter.part("first"):
            y = x.exp()
        with counter.part("second"):
            z = y.sin() + y.cos()
        loss = z.sum()
        counter.watch(loss)
        loss.backward()
    assert counter.counts["first", "backward"].operations == 1, "exp's"
    assert counter.counts["second", "backward"].operations == 5, "cos and mul; sin, neg and mul"
    assert counter.counts[SUMS, "backward"].operations >= 1, "y was used twice"


def test_a_launch_counts_the_tensors_handed_to_the_kernel() -> None:
    jit = pytest.importorskip("triton.runtime.jit")

    class Kernel(jit.KernelInterface):  # type: ignore[name-defined,misc]
        launched = 0

        def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            self.launched += 1
            args[0].add_(1)  # not counted: it stands for the kernel

    kernel, on_meta = Kernel(), Kernel()
    counter = StepBytes()
    with counter, counter.launches():
        kernel[(1,)](A, A.t(), 3, BLOCK=8)
        on_meta[(1,)](A.to("meta"), BLOCK=8)
    assert (kernel.launched, on_meta.launched) == (1, 0)
    copied_to_meta = 2 * 128
    assert counter.counts["rest", "forward"].bytes == 2 * 128 + copied_to_meta + 128


def test_a_gradient_already_in_main_grad_is_not_added_again() -> None:
    weight: Any = torch.nn.Parameter(torch.zeros(2))
    weight.main_grad, weight.grad = torch.zeros(2), torch.ones(2)
    add_to_main_grad(weight)
    weight.grad_added_to_main_grad = True
    add_to_main_grad(weight)
    assert weight.main_grad.tolist() == [1, 1]


def test_the_table_has_a_line_for_each_part() -> None:
    pytest.importorskip("triton")
    model = ModelConfig(**HUNYUAN_LARGE | {"hidden_size": 320, "num_attention_heads": 4, "num_query_groups": 2})
    text = markdown(table(model, 4096))
    for part in BOUNDS:
        assert f"| {part}" in text


@pytest.mark.parametrize("kernels", ["auto", "never"])
def test_the_plan_knows_the_bytes(counts: Counts, kernels: Literal["auto", "never"]) -> None:
    """Within 3% by direction; what is left out are numbers per row. Norms, and the residual that they add, are left out
    on both sides: without kernels the plan has Transformer Engine's."""
    if kernels == "auto":
        pytest.importorskip("triton")
    found = count_step(LARGE, TOKENS, use_kernels=True) if kernels == "auto" else counts
    fields = {"name": "x", "run_dir": "x", "tokenizer": "x", "model": LARGE, "optimizer": {"lr": 1.0}}
    planned = traffic(Experiment.model_construct(**fields, runtime=RuntimeConfig(kernels=kernels)))
    hidden_bytes = 2 * LARGE.hidden_size
    of_norms = ((6, 2), (8, 4)) if kernels == "auto" else ((4 + 3, 2), (6, 2))  # rows, launches
    for number, (way, (norms, launches)) in enumerate(zip(("forward", "backward"), of_norms, strict=True)):
        parts = [one for part, one in found.items() if part[1] == way and part[0] not in (*PER_STEP, *LINEAR, "norms")]
        counted = sum(part.bytes for part in parts) / LARGE.num_layers / TOKENS
        assert planned.layer_bytes[number] - norms * hidden_bytes == pytest.approx(counted, rel=0.03)
        operations = sum(part.operations for part in parts) / LARGE.num_layers
        assert planned.layer_launches[number] - launches == pytest.approx(operations, abs=1)
    loss = found["cross-entropy", "forward"].bytes
    assert loss_bytes(LARGE, planned.logit_bytes, TOKENS, 1, 4) == pytest.approx(loss, rel=0.02)
    assert planned.embedding_bytes == pytest.approx(
        [found["embedding", way].bytes / TOKENS for way in ("forward", "backward")], rel=0.01
    )
