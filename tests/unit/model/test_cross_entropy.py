"""Memory of the output layer's loss. That the loss equals the plain one is tested with the model."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS
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
    assert logits_bytes(LOSS_CHUNK_TOKENS["cuda"], 128_512) == 1_052_770_304
