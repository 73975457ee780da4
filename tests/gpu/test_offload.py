"""Activations in the host's memory on a GPU: copies beside the computation change no bit, and device memory falls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
from hunyuan_pretrain.model.hunyuan_config import transformer_config
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model
from hunyuan_pretrain.model.inputs import ModelInputs
from hunyuan_pretrain.model.routing import TrainingRouting
from hunyuan_pretrain.runtime.seeding import use_deterministic_algorithms
from tests.helpers import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, LAYERS = 8192, 12
SIZES: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 1024,
    "moe_ffn_hidden_size": 1024,
    "padded_vocab_size": 1024,
    "moe_routing_group_tokens": 1024,
}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    use_deterministic_algorithms(True)
    yield
    use_deterministic_algorithms(False)


def step(choice: str, layers: int, in_kernels: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of the second of two equal micro-batches, which reuses memory that the first has freed, and
    the device memory that its forward pass adds."""
    model = tiny.tiny_model(**SIZES)
    parallel = ParallelConfig(recompute=choice, cpu_offloading_num_layers=layers)
    config = transformer_config(model, parallel, PrecisionConfig(dtype="bf16"), use_kernels=in_kernels)
    (built,) = build_model(config, tiny.world_of_one(), 1)
    for _ in range(2):
        for parameter in built.parameters():
            parameter.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = built(inputs(built))[0]
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in built.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients, kept


def inputs(model: HunyuanModel) -> ModelInputs:
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(0, model.config.model.padded_vocab_size, (TOKENS,), generator=generator).cuda()
    groups = TOKENS // model.config.model.moe_routing_group_tokens
    return ModelInputs(
        tokens_T=tokens_T,
        labels_T=tokens_T.roll(-1),
        positions_T=torch.arange(TOKENS // 2, device="cuda").repeat(2),
        cu_seqlens=[0, TOKENS // 2, TOKENS],
        rope_alpha=1.0,
        loss_weight_T=torch.full((TOKENS,), 1.0 / TOKENS, device="cuda"),
        routing=TrainingRouting(3, 5, torch.arange(groups, device="cuda"), groups),
    )


@pytest.mark.parametrize("in_kernels", [False, True], ids=["torch", "kernels"])
def test_offloaded_activations_come_back_in_time(in_kernels: bool) -> None:
    loss, gradients, kept = step("none", 0, in_kernels)
    for choice, layers, at_most in (
        ("none", LAYERS - 2, 0.4),
        ("swiglu+norms", 0, 0.9),
        ("swiglu+norms", LAYERS - 2, 0.4),
        ("selective+norms", LAYERS - 2, 0.3),
        ("cla_group", LAYERS - 2, 0.1),
    ):
        other_loss, others, less = step(choice, layers, in_kernels)
        assert torch.equal(loss, other_loss), choice
        assert less < at_most * kept, (choice, layers)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, others[name]), (choice, layers, name)
