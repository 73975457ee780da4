"""The shared expert on a CUDA stream of its own: bit by bit what one stream gives, many times over. `make test-gpu`
runs this."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.tiny import packed_inputs, tiny_model, world_of_one

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"num_layers": 2, "hidden_size": 512, "ffn_hidden_size": 2048, "moe_ffn_hidden_size": 1024}


@pytest.fixture
def moe() -> Any:
    from hunyuan_pretrain.config.schema import ParallelConfig, PrecisionConfig
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model

    torch.use_deterministic_algorithms(True)
    groups = world_of_one()
    config = transformer_config(tiny_model(**SIZES), ParallelConfig(), PrecisionConfig(dtype="bf16"))
    (model,) = build_model(config, groups, 1)
    yield model.decoder.layers[1].mlp
    torch.use_deterministic_algorithms(False)


def results(moe: Any, is_overlapped: bool) -> list[torch.Tensor]:
    moe.overlaps_shared_expert = is_overlapped
    routing = packed_inputs(tiny_model(), (1024, 2048, 1024)).routing
    routing = routing._replace(group_n=routing.group_n.cuda())  # type: ignore[union-attr]
    generator = torch.Generator(device="cuda").manual_seed(4)
    leaf_TD = torch.randn(4096, 512, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    hidden_TD = leaf_TD * 1.0
    output_TD, _ = moe(hidden_TD, hidden_TD, routing)
    del hidden_TD
    moe.zero_grad()
    output_TD.backward(torch.ones_like(output_TD))
    return [output_TD.detach(), leaf_TD.grad, *(weight.grad.clone() for weight in moe.parameters())]  # type: ignore[list-item]


def test_a_side_stream_changes_no_bit(moe: Any) -> None:
    expected = results(moe, False)
    for _ in range(20):
        actual = results(moe, True)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
