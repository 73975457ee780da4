"""Weight gradients that a GPU adds to main_grad in fp32: the output layer's by the GEMM, the embedding's by rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS
from hunyuan_pretrain.model.cross_entropy import linear_cross_entropy
from hunyuan_pretrain.model.hunyuan_model import _RowsAddedToMainGrad
from hunyuan_pretrain.runtime.seeding import use_deterministic_algorithms
from tests.helpers.tiny import world_of_one

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, HIDDEN, VOCAB = 2 * LOSS_CHUNK_TOKENS["cuda"] + 100, 512, 8000


@pytest.fixture(autouse=True)
def deterministic_without_host_waits() -> Iterator[None]:
    use_deterministic_algorithms(True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
    use_deterministic_algorithms(False)


def weight(generator: torch.Generator) -> Any:
    """A bf16 weight with a main_grad of ones."""
    values = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator, device="cuda").bfloat16() * 0.1)
    values.main_grad = torch.ones(VOCAB, HIDDEN, device="cuda")  # type: ignore[attr-defined]
    return values


def distance(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (actual.float() - expected.float()).norm() / expected.float().norm()


def test_cross_entropy_adds_its_gradient_in_fp32_and_always_the_same() -> None:
    """Against fp32 products of the same bf16 factors; only the order of the sums differs."""
    found = []
    for _ in range(2):
        generator = torch.Generator("cuda").manual_seed(0)
        weight_VD = weight(generator)
        hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda").bfloat16().requires_grad_()
        label_T = torch.randint(0, VOCAB, (TOKENS,), generator=generator, device="cuda")
        loss_weight_T = torch.rand(TOKENS, generator=generator, device="cuda")
        loss = linear_cross_entropy(hidden_TD, weight_VD, label_T, loss_weight_T, world_of_one().tp, "only use")
        loss.backward()
        assert hidden_TD.grad is not None
        found.append((loss.detach(), hidden_TD.grad, weight_VD.main_grad - 1))
    torch.cuda.set_sync_debug_mode("default")
    logits_TV = (hidden_TD.detach() @ weight_VD.detach().t()).float().requires_grad_()
    expected = (torch.nn.functional.cross_entropy(logits_TV, label_T, reduction="none") * loss_weight_T).sum()
    expected.backward()
    assert logits_TV.grad is not None
    rounded_TV = logits_TV.grad.bfloat16()
    weight_grad_VD = rounded_TV.float().t() @ hidden_TD.detach().float()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    loss, grad_TD, main_grad_VD = found[0]
    assert abs(loss / expected - 1) < 1e-5
    assert distance(grad_TD, rounded_TV @ weight_VD.detach()) < 2**-8
    assert distance(main_grad_VD, weight_grad_VD) < 1e-4


def test_the_embedding_adds_rows_in_fp32_and_always_the_same() -> None:
    found = []
    for _ in range(2):
        generator = torch.Generator("cuda").manual_seed(0)
        weight_VD = weight(generator)
        tokens_T = torch.randint(0, 50, (TOKENS,), generator=generator, device="cuda")
        grad_TD = torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda").bfloat16()
        rows_TD = _RowsAddedToMainGrad.apply(weight_VD, tokens_T)
        rows_TD.backward(grad_TD)
        found.append(weight_VD.main_grad)
    torch.cuda.set_sync_debug_mode("default")
    expected = torch.ones(VOCAB, HIDDEN, dtype=torch.float64).index_add_(0, tokens_T.cpu(), grad_TD.cpu().double())
    assert torch.equal(*found)
    assert torch.equal(rows_TD, weight_VD[tokens_T])
    assert distance(found[0].cpu(), expected) < 1e-5
