"""What vLLM does with exports without the plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vllm.test_offline import assert_same, prompts

WITHOUT_PLUGIN = {"VLLM_PLUGINS": "none"}


def test_format_hunyuan_is_unknown(exported: Callable[..., Path], serve: Callable[..., dict[str, Any]]) -> None:
    result = serve(exported(), prompts()[:1], variables=WITHOUT_PLUGIN)
    assert "trust_remote_code" in result["error"]
    result = serve(exported(), prompts()[:1], variables=WITHOUT_PLUGIN, options={"trust_remote_code": True})
    assert "HunYuanForCausalLM" in result["error"]
    assert "not" in result["error"]


def test_format_hunyuan_v1_moe_is_right_where_it_is_exported(
    exported: Callable[..., Path],
    serve: Callable[..., dict[str, Any]],
    ours: Callable[..., list[dict[str, Any]]],
) -> None:
    changes = {"cla_share_factor": 1, "moe_router_topk": 2}
    result = serve(
        exported(format="hunyuan_v1_moe", **changes),
        prompts(),
        variables=WITHOUT_PLUGIN,
        rounds=[{"prompt_logprobs": True}],
    )
    assert "error" not in result, result["log"]
    # vLLM may emit the ids that pad the vocabulary
    assert_same(result["rounds"][0], ours(exported(**changes), prompts(), may_emit_all=True), "hunyuan_v1_moe")
