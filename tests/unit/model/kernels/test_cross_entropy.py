"""The kernels of the loss against the plain function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from hunyuan_pretrain.model.cross_entropy import chunk_loss as plain_chunk_loss
from hunyuan_pretrain.model.cross_entropy import linear_cross_entropy
from hunyuan_pretrain.model.kernels.cross_entropy import BLOCK, chunk_loss
from tests.helpers.ranks import fork_ranks
from tests.helpers.tiny import world_of_one

ALONE: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def inputs(tokens: int, ids: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(ids)
    logits_cV = 4 * torch.randn(tokens, ids, generator=generator)
    label_c1 = torch.randint(0, ids, (tokens, 1), generator=generator)
    weight_c1 = torch.rand(tokens, 1, generator=generator)
    return logits_cV.to(device, dtype), label_c1.to(device), weight_c1.to(device)


def assert_same(logits_cV: Tensor, label_c1: Tensor, weight_c1: Tensor) -> None:
    """Loss to 1e-5, gradients to one rounding (2^-8 of a number in bf16, 2^-7 by the interpreter, which cuts the bits
    off) of those computed in fp32."""
    found_cV, exact_cV = logits_cV.clone(), logits_cV.float()
    found = chunk_loss(found_cV, label_c1, weight_c1, 0, ALONE, True)
    exact = plain_chunk_loss(exact_cV, label_c1, weight_c1, 0, ALONE, True)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    rounding = 0.0 if logits_cV.dtype == torch.float32 else 2**-8 if logits_cV.is_cuda else 2**-7
    torch.testing.assert_close(found_cV.float(), exact_cV, rtol=1e-5 + rounding, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "ids"), [(1, 1), (7, 50), (3, BLOCK), (2, 2 * BLOCK + 5)], ids=str)
def test_loss_and_gradient_are_those_of_the_plain_function(
    tokens: int, ids: int, dtype: torch.dtype, device: str
) -> None:
    assert_same(*inputs(tokens, ids, dtype, device))


def test_no_tokens(device: str) -> None:
    assert_same(*inputs(0, 50, torch.float32, device))


def test_a_token_without_weight_has_no_gradient(device: str) -> None:
    logits_cV, label_c1, weight_c1 = inputs(3, 50, torch.float32, device)
    weight_c1[1] = 0.0
    chunk_loss(logits_cV, label_c1, weight_c1, 0, ALONE, True)
    assert (logits_cV[1] == 0).all()
    assert (logits_cV[0] != 0).all()


def test_large_logits_overflow_nowhere(device: str) -> None:
    """The largest in the first, in the last block; all equal; a label of probability 0 and one of probability 1."""
    logits_cV = torch.full((4, BLOCK + 9), -3e4, device=device)
    logits_cV[0, 0], logits_cV[1, -1] = 3e4, 3e4
    label_c1 = torch.tensor([0, 5, 7, BLOCK + 8], device=device)[:, None]
    assert_same(logits_cV, label_c1, torch.ones(4, 1, device=device))


def test_labels_and_weights_of_any_stride_are_read_rightly(device: str) -> None:
    logits_cV, label_c1, weight_c1 = inputs(5, 60, torch.float32, device)
    wide = torch.stack((label_c1, label_c1 + 1), dim=1).flatten(1)
    for weights in (torch.stack((weight_c1, weight_c1), dim=1).flatten(1)[:, :1], weight_c1[:1].expand(5, 1)):
        assert_same(logits_cV, wide[:, :1], weights)


def test_a_block_of_ids_that_are_excluded_takes_no_part(device: str) -> None:
    logits_cV, label_c1, weight_c1 = inputs(3, 2 * BLOCK, torch.float32, device)
    logits_cV[:, :BLOCK] = -torch.inf
    assert_same(logits_cV, label_c1 % BLOCK + BLOCK, weight_c1)


def test_logits_that_are_nan_give_a_loss_that_is_nan(device: str) -> None:
    logits_cV, label_c1, weight_c1 = inputs(3, 50, torch.float32, device)
    logits_cV[1, 3] = torch.nan
    assert chunk_loss(logits_cV, label_c1, weight_c1, 0, ALONE, True).isnan()


def test_rows_of_a_wider_tensor_are_overwritten_in_place(device: str) -> None:
    wide, label_c1, weight_c1 = inputs(5, 60, torch.float32, device)
    label_c1 %= 50
    before, expected = wide.clone(), wide[:, 4:54].clone()
    chunk_loss(wide[:, 4:54], label_c1, weight_c1, 0, ALONE, True)
    plain_chunk_loss(expected, label_c1, weight_c1, 0, ALONE, True)
    torch.testing.assert_close(wide[:, 4:54], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(wide[:, :4], before[:, :4])
    assert torch.equal(wide[:, 54:], before[:, 54:])


def test_without_a_gradient_the_logits_stay(device: str) -> None:
    logits_cV, label_c1, weight_c1 = inputs(5, 60, torch.float32, device)
    before = logits_cV.clone()
    chunk_loss(logits_cV, label_c1, weight_c1, 0, ALONE, False)
    assert torch.equal(logits_cV, before)


def test_the_loss_of_a_model_is_that_of_the_plain_function(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_TD, weight_VD = (torch.randn(rows, 16, generator=generator).to(device) for rows in (300, 1000))
    label_T = torch.randint(0, 1000, (300,), generator=generator).to(device)
    loss_weight_T = torch.rand(300, generator=generator).to(device)
    found = []
    for function in (plain_chunk_loss, chunk_loss):
        leaves = hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, label_T, loss_weight_T, world_of_one().tp, None, function)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for plain, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-6 * plain.abs().max().item())


# --- a vocabulary over two ranks --------------------------------------------------------------------------------------


def on_this_rank() -> list[Any]:
    """Loss, and the gradient of this rank's logits, by the plain function and by the kernels."""
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    logits_cV, label_c1, weight_c1 = inputs(6, 80, torch.float32, "cpu")
    label_c1[0], label_c1[1] = 0, 79
    results = []
    for function in (plain_chunk_loss, chunk_loss):
        mine_cV = logits_cV[:, 40 * rank : 40 * rank + 40].clone()
        results += [function(mine_cV, label_c1, weight_c1, 40 * rank, group, True), mine_cV]
    whole_cV = logits_cV.clone()
    results += [chunk_loss(whole_cV, label_c1, weight_c1, 0, ALONE, True), whole_cV[:, 40 * rank : 40 * rank + 40]]
    dist.destroy_process_group()
    return [x.numpy() for x in results]


def test_ranks_that_share_the_vocabulary_agree_with_one_rank() -> None:
    for arrays in fork_ranks(2, on_this_rank):
        results = [torch.as_tensor(x) for x in arrays]
        for loss, grad_cV in (results[:2], results[4:]):
            torch.testing.assert_close(results[2], loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(results[3], grad_cV, rtol=1e-5, atol=1e-7)


def test_what_the_kernel_would_misread_is_refused(device: str) -> None:
    logits_cV, label_c1, weight_c1 = inputs(5, 60, torch.float32, device)
    with pytest.raises(ValueError, match=r"the cross-entropy kernel: logits has shape \(60, 5\), strides \(1, 60\)"):
        chunk_loss(logits_cV.t(), label_c1, weight_c1, 0, ALONE, True)
