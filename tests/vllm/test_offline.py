"""vLLM with the plugin computes what the model code of an export computes, from one key/value cache per CLA group."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

LARGE: dict[str, Any] = {}
"""Hunyuan-Large in small: CLA, top-1, norms after RoPE, tied embeddings."""
OTHER: dict[str, Any] = {
    "cla_share_factor": 4,
    "moe_router_topk": 2,
    "qk_layernorm": False,
    "share_embeddings_and_output_weights": False,
    "kv_channels": 64,
    "num_query_groups": 4,
    "moe_ffn_hidden_size": 64,
}
TOP_2 = {"moe_router_topk": 2}

TOLERANCE = 1e-4
"""Of a logprob, in fp32: kernels sum in another order."""


def prompts() -> list[list[int]]:
    """Four prompts. The first two share 48 tokens, more than a block of the cache."""
    draw = random.Random(0)
    texts = [[draw.randrange(256) for _ in range(length)] for length in (40, 70, 17, 5)]
    texts[1][:47] = texts[0][:40] + texts[1][40:47]
    return [[258, *texts[0], *texts[1][40:47]], [258, *texts[1]], [258, *texts[2]], [258, *texts[3]]]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], what: str) -> None:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one["tokens"] == other["tokens"], f"{what}, prompt {number}"
        for name in ("logprobs", "prompt_logprobs"):
            if one[name]:
                assert len(one[name]) == len(other[name])
                worst = max(abs(a - b) for a, b in zip(one[name], other[name], strict=True))
                assert worst <= TOLERANCE, f"{what}, prompt {number}: {name} differ by {worst}"


@pytest.mark.parametrize("changes", [LARGE, OTHER, TOP_2], ids=["large", "other", "top 2"])
def test_logprobs_and_greedy_tokens_are_those_of_our_model_code(
    changes: dict[str, Any],
    exported: Callable[..., Path],
    serve: Callable[..., dict[str, Any]],
    ours: Callable[..., list[dict[str, Any]]],
) -> None:
    """Four prompts in a batch, prefilled in chunks of 32 tokens; then again, from the prefix cache."""
    model = exported(**changes)
    options = {"max_num_batched_tokens": 32, "enable_prefix_caching": True}
    result = serve(model, prompts(), options=options, rounds=[{"prompt_logprobs": True}, {}])
    assert "error" not in result, result["log"]
    expected = ours(model, prompts())
    first, again = result["rounds"]
    assert all(len(one["prompt_logprobs"]) == len(prompt) - 1 for one, prompt in zip(first, prompts(), strict=True))
    assert_same(first, expected, "first round")
    assert_same(again, expected, "second round")
    assert [one["cached_tokens"] for one in again] == [32, 64, 0, 0]


def test_the_cache_holds_twice_the_tokens_of_a_model_without_sharing(
    exported: Callable[..., Path],
    serve: Callable[..., dict[str, Any]],
    ours: Callable[..., list[dict[str, Any]]],
) -> None:
    shared, own = exported(**LARGE), exported(cla_share_factor=1)
    with_sharing, without = (serve(model, prompts()[2:]) for model in (shared, own))
    assert_same(with_sharing["rounds"][0], ours(shared, prompts()[2:]), "with CLA")
    assert_same(without["rounds"][0], ours(own, prompts()[2:]), "without CLA")
    assert with_sharing["block_size"] == without["block_size"] == 32
    assert with_sharing["blocks"] == 2 * without["blocks"]
    # 1 GiB; fp32 keys and values of 2 owners x 2 heads x 32
    assert with_sharing["blocks"] == 2**30 // (32 * 2 * 2 * 2 * 32 * 4)


def test_a_compiled_model_computes_the_same(
    exported: Callable[..., Path],
    serve: Callable[..., dict[str, Any]],
    ours: Callable[..., list[dict[str, Any]]],
) -> None:
    model = exported(**LARGE)
    result = serve(model, prompts(), options={"enforce_eager": False}, rounds=[{"prompt_logprobs": True}])
    assert "error" not in result, result["log"]
    assert_same(result["rounds"][0], ours(model, prompts()), "compiled")


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an export with other tensors."""
    folder.mkdir()
    for file in model.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_problems(
    exported: Callable[..., Path], serve: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        down = "model.layers.0.mlp.experts.1.down_proj.weight"
        tensors[down] = tensors[down][:, :-32].clone()
        tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].clone()

    result = serve(changed(exported(**LARGE), tmp_path / "spoilt", spoil), prompts()[:1])
    assert "the checkpoint does not fit its config.json, 3 problems" in result["error"]
    for problem in (
        "model.layers.1.mlp.experts.2.up_proj.weight: missing",
        "model.layers.0.mlp.experts.1.down_proj.weight: shape (64, 64), but this model has (64, 96)",
        "model.layers.1.self_attn.k_proj.weight: not a tensor of this model",
    ):
        assert problem in result["error"]


def test_a_setting_with_which_a_borrowing_layer_would_read_something_else_is_refused(
    exported: Callable[..., Path], serve: Callable[..., dict[str, Any]]
) -> None:
    result = serve(exported(**LARGE), prompts()[:1], options={"kv_sharing_fast_prefill": True})
    assert "--kv-sharing-fast-prefill cannot be used with CLA" in result["error"]
