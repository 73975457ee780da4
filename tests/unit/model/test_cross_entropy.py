"""Memory of the output layer's loss, and where its weight gradient goes. That the loss equals the plain one is tested
with the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS
from hunyuan_pretrain.model import cross_entropy
from hunyuan_pretrain.model.cross_entropy import linear_cross_entropy
from tests.helpers.tiny import world_of_one

CHUNK, VOCAB, HIDDEN = LOSS_CHUNK_TOKENS["cpu"], 1024, 16


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return result


def inputs(num_tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, HIDDEN, generator=generator).requires_grad_()
    weight_VD = torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()
    return (
        hidden_TD,
        weight_VD,
        torch.randint(0, VOCAB, (num_tokens,), generator=generator),
        torch.rand(num_tokens, generator=generator),
    )


@pytest.mark.parametrize("num_chunks", [2, 16])
def test_the_full_logits_never_exist(num_chunks):
    """Besides tensors of the inputs' sizes, nothing is larger than one chunk of logits, forward and backward, for any
    sequence length."""
    hidden_TD, weight_VD, label_T, loss_weight_T = inputs(num_chunks * CHUNK)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden_TD, weight_VD, label_T, loss_weight_T, world_of_one().tp).backward()
    assert largest.elements == CHUNK * VOCAB
    assert largest.elements < num_chunks * CHUNK * VOCAB


def test_bytes_avoided_at_256k_tokens_of_hunyuan_large():
    """The figure that the plan prints: fp32 logits of 262,144 tokens and 128,512 ids, against one chunk of them."""
    from hunyuan_pretrain.plan.counts import logits_bytes

    assert logits_bytes(262_144, 128_512) == 134_754_598_912
    assert logits_bytes(LOSS_CHUNK_TOKENS["cuda"], 128_512) == 2_105_540_608


def accumulated(loss_scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of three chunks: of the hidden states, and main_grad, which started at one."""
    hidden_TD, weight_VD, label_T, loss_weight_T = inputs(3 * CHUNK)
    weight_VD.main_grad = torch.ones(weight_VD.shape)
    loss = linear_cross_entropy(hidden_TD, weight_VD, label_T, loss_weight_T, world_of_one().tp, "only use")
    (loss * loss_scale).backward()
    assert weight_VD.grad_added_to_main_grad
    return hidden_TD.grad, weight_VD.main_grad


def test_added_in_the_forward_pass_the_gradient_is_the_same(monkeypatch):
    """As on a GPU in bf16. The chunks are added to main_grad one by one instead of as one sum, so the last bits of an
    entry may differ: three additions, each rounded to half a unit in the last place."""
    later = accumulated()
    monkeypatch.setattr(cross_entropy, "_gemm_adds_in_fp32", lambda x: True)
    at_once = accumulated()
    assert torch.equal(at_once[0], later[0])
    torch.testing.assert_close(at_once[1], later[1], rtol=3 * 2**-24, atol=3 * 2**-24 * later[1].abs().max().item())


def test_a_scaled_loss_whose_gradient_is_already_in_main_grad_is_refused(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_gemm_adds_in_fp32", lambda x: True)
    with pytest.raises(RuntimeError, match="the loss that accumulates in main_grad was scaled"):
        accumulated(loss_scale=2.0)


def test_a_validation_computes_no_gradient(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_gemm_adds_in_fp32", lambda x: True)
    monkeypatch.setattr(cross_entropy, "_add_product", lambda *args, **kwargs: pytest.fail("a gradient"))
    hidden_TD, weight_VD, label_T, loss_weight_T = inputs(CHUNK)
    weight_VD.main_grad = torch.ones(weight_VD.shape)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden_TD, weight_VD, label_T, loss_weight_T, world_of_one().tp, "only use")
    assert loss > 0
    assert bool((weight_VD.main_grad == 1).all())


def test_in_bf16_the_loss_and_gradients_are_the_plain_ones_rounded_once():
    """Against fp32 arithmetic on the same bf16 logits: the logits' gradient is rounded once, at the label too."""
    hidden_TD, weight_VD, label_T, _ = inputs(CHUNK)
    hidden_TD, weight_VD = (x.detach().bfloat16().requires_grad_() for x in (hidden_TD, weight_VD))
    ones_T = torch.ones(CHUNK)
    loss = linear_cross_entropy(hidden_TD, weight_VD, label_T, ones_T, world_of_one().tp)
    loss.backward()
    logits_TV = (hidden_TD @ weight_VD.t()).detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits_TV, label_T, reduction="sum")
    expected.backward()
    assert logits_TV.grad is not None
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=0)
    rounded_TV = logits_TV.grad.bfloat16()
    torch.testing.assert_close(hidden_TD.grad, rounded_TV @ weight_VD, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(weight_VD.grad, rounded_TV.t() @ hidden_TD, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_gradient_is_added_to_a_main_grad_of_either_dtype(dtype: torch.dtype, monkeypatch: Any) -> None:
    """Meta tensors take a GPU's branches and refuse what its GEMM refuses: an fp32 product into a bf16 main_grad."""
    monkeypatch.setitem(LOSS_CHUNK_TOKENS, "meta", CHUNK)
    hidden_TD, weight_VD = (
        torch.empty(rows, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True) for rows in (CHUNK, VOCAB)
    )
    weight_VD.main_grad = torch.empty(VOCAB, HIDDEN, dtype=dtype, device="meta")  # type: ignore[attr-defined]
    label_T, loss_weight_T = (torch.empty(CHUNK, dtype=kind, device="meta") for kind in (torch.int64, torch.float32))
    arguments = hidden_TD, weight_VD, label_T, loss_weight_T, world_of_one().tp
    linear_cross_entropy(*arguments, "only use", cross_entropy.chunk_loss).backward()
    assert weight_VD.grad_added_to_main_grad  # type: ignore[attr-defined]
