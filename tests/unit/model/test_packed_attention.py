"""Packed attention against softmax with explicit masks in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hunyuan_pretrain.model import packed_attention as module
from hunyuan_pretrain.model.packed_attention import Block, context_blocks, document_blocks, packed_attention
from hunyuan_pretrain.parallel.context_parallel import rows_of_ranks

LENGTHS = [1, 37, 2, 88, 1, 63, 52, 12]
"""Two sequences of 128 tokens; the last document is padding; documents 88 and 63 lie on several ranks."""
BORDERS = [sum(LENGTHS[:number]) for number in range(len(LENGTHS) + 1)]
TOKENS = BORDERS[-1]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
"""Largest error relative to the largest entry. bf16 has 8 bits, and the CPU kernel sums key gradients in it, query
block after query block."""


def inputs(num_heads: int, num_groups: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of the output, in the layouts of the model: q and k head by head, v a part of a wider
    projection."""
    generator = torch.Generator().manual_seed(seed)
    q_NTH, k_GTH = (
        torch.randn(heads, TOKENS, 16, generator=generator, dtype=torch.float64) for heads in (num_heads, num_groups)
    )
    qkv_TGXH = torch.randn(TOKENS, num_groups, 3, 16, generator=generator, dtype=torch.float64)
    grad_TNH = torch.randn(TOKENS, num_heads, 16, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (q_NTH.transpose(0, 1), k_GTH.transpose(0, 1), qkv_TGXH[:, :, 2], grad_TNH)]


def plain_attention(q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor) -> Tensor:
    """Attention over all documents at once, under one mask."""
    document_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    is_seen_TT = (document_T[:, None] == document_T) & torch.ones(TOKENS, TOKENS).tril().bool()
    k_TNH, v_TNH = (x.repeat_interleave(q_TNH.shape[1] // x.shape[1], dim=1) for x in (k_TGH, v_TGH))
    scores_NTT = torch.einsum("tnh,snh->nts", q_TNH, k_TNH) / q_TNH.shape[-1] ** 0.5
    return torch.einsum("nts,snh->tnh", scores_NTT.masked_fill(~is_seen_TT, -torch.inf).softmax(-1), v_TNH)


def with_gradients(function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *arguments) -> list[Tensor]:
    """[output, gradients of q, k, v]"""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def over_ranks(cp_size: int, unit_tokens: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """[output, gradients] of all ranks together: rows in their global positions, key gradients summed."""
    results = [torch.zeros_like(x) for x in (grad, q, k, v)]
    for ranges in rows_of_ranks(BORDERS, 2, cp_size, unit_tokens):
        rows = torch.cat([torch.arange(start, end) for start, end in ranges])
        out, grad_q, *grads_kv = with_gradients(
            packed_attention, q[rows], k, v, grad[rows], context_blocks(BORDERS, ranges)
        )
        results[0][rows], results[1][rows] = out, grad_q
        for result, gradient in zip(results[2:], grads_kv, strict=True):
            result += gradient
    return results


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for name, found, wanted in zip(
        ("output", "gradient of q", "gradient of k", "gradient of v"), actual, expected, strict=True
    ):
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        difference = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert difference <= TOLERANCE[dtype], f"{name}: differs by {difference:.1e} of its largest entry"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 2), (3, 3), (4, 1)])
def test_packed_attention_is_softmax_attention_in_each_document(num_heads, num_groups, dtype):
    tensors = inputs(num_heads, num_groups, dtype)
    expected = with_gradients(plain_attention, *(x.double() for x in tensors))
    assert_close(with_gradients(packed_attention, *tensors, document_blocks(BORDERS)), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cp_size", "unit_tokens"), [(2, 64), (2, 8), (4, 8), (4, 32)])
def test_context_ranks_together_equal_one_rank(cp_size, unit_tokens, dtype):
    tensors = inputs(4, 2, dtype)
    expected = with_gradients(plain_attention, *(x.double() for x in tensors))
    assert_close(over_ranks(cp_size, unit_tokens, *tensors), expected, dtype)


def test_plain_kernel_is_softmax_attention_too(monkeypatch):
    """The kernel for what flash kernels do not support."""
    monkeypatch.setattr(module, "_kernel", lambda q_TNH: module._Kernel(module._plain, module._plain_backward))
    tensors = inputs(4, 2, torch.float64)
    expected = with_gradients(plain_attention, *tensors)
    assert_close(with_gradients(packed_attention, *tensors, document_blocks(BORDERS)), expected, torch.float64)
    assert_close(over_ranks(4, 8, *tensors), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_in_a_pack_do_not_attend_to_each_other(dtype):
    tensors = inputs(4, 2, dtype)
    changed = range(BORDERS[3], BORDERS[4])
    others = [row for row in range(TOKENS) if row not in changed]
    noise = [x.clone() for x in tensors]
    for x, new in zip(noise, inputs(4, 2, dtype, seed=1), strict=True):
        x[changed.start : changed.stop] = 100 * new[changed.start : changed.stop]
    for attend in (
        lambda *x: with_gradients(packed_attention, *x, document_blocks(BORDERS)),
        lambda *x: over_ranks(4, 8, *x),
    ):
        before, after = attend(*tensors), attend(*noise)
        assert all(torch.equal(x[others], y[others]) for x, y in zip(before, after, strict=True))
        assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_heads_that_are_not_contiguous_are_read_correctly():
    """The kernels would silently read the next number in memory as the head's next element."""
    *qkv, grad = inputs(4, 2, torch.float32)
    expected = with_gradients(packed_attention, *qkv, grad, document_blocks(BORDERS))
    for number in range(3):
        mine = [x.mT.contiguous().mT if place == number else x for place, x in enumerate(qkv)]
        assert mine[number].stride(-1) != 1
        found = with_gradients(packed_attention, *mine, grad, document_blocks(BORDERS))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_large_scores_do_not_overflow_when_parts_are_merged():
    """The keys of one part outweigh those of the other by more than fp32 can hold."""
    q, k, v, grad = inputs(4, 2, torch.float32)
    q, k = 100 * q, 100 * k
    expected = with_gradients(packed_attention, q, k, v, grad, document_blocks(BORDERS))
    # Where one key takes all the weight, gradients of q and k are differences of equal terms: what is left is rounding
    # of the terms, and another CPU rounds them otherwise.
    terms = (
        grad.abs().amax() * v.abs().amax() * q.shape[-1] ** 0.5 * torch.maximum(q.abs().amax(), k.abs().amax())
    ).item()
    scales = [expected[0].abs().max().item(), terms, terms, expected[3].abs().max().item()]
    for found, wanted, scale in zip(over_ranks(4, 8, q, k, v, grad), expected, scales, strict=True):
        assert found.isfinite().all()
        assert (found - wanted).abs().max() <= 1e-6 * scale


def test_blocks_of_a_rank():
    assert document_blocks([0, 3, 10]) == [Block(0, 3, 0, 3), Block(3, 10, 3, 10)]
    blocks = context_blocks([0, 3, 10, 16], [(2, 5), (8, 14)])
    assert blocks == [Block(0, 1, 0, 3), Block(1, 3, 3, 5), Block(3, 5, 3, 10), Block(5, 9, 10, 14)]
    rows = [row for ranges in [[(2, 5), (8, 14)]] for start, end in ranges for row in range(start, end)]
    assert [block.k_end - 1 for block in blocks] == [rows[block.q_end - 1] for block in blocks]
    assert all(before.q_end == after.q_start for before, after in pairwise(blocks))
