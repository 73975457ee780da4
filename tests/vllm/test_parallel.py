"""Two processes that share a model compute what one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.test_offline import assert_same, prompts

TENSOR: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
PIPELINE: dict[str, Any] = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
# Without compiling, vLLM's CPU runner does not warm up, and then lacks the buffers of a second stage.
COMPILED = {"enforce_eager": False}


@pytest.mark.parametrize("layout", [TENSOR, PIPELINE | COMPILED], ids=["tensor parallel", "pipeline parallel"])
def test_two_ranks_equal_our_model_code(
    layout: dict[str, Any],
    exported: Callable[..., Path],
    serve: Callable[..., dict[str, Any]],
    ours: Callable[..., list[dict[str, Any]]],
) -> None:
    model = exported()
    result = serve(model, prompts(), options=layout, rounds=[{"prompt_logprobs": True}])
    assert "error" not in result, result["log"]
    assert_same(result["rounds"][0], ours(model, prompts()), "two ranks")


def test_expert_parallel_ranks_load_a_whole_checkpoint(
    exported: Callable[..., Path], serve: Callable[..., dict[str, Any]]
) -> None:
    """Loading only: vLLM's CPU kernel of the experts does not know which of them a rank has, and crashes."""
    result = serve(exported(), [], options=TENSOR | {"enable_expert_parallel": True}, rounds=[])
    assert "error" not in result, result["log"]
    assert result["blocks"] > 0


def test_a_pipeline_stage_that_begins_in_a_cla_group_is_refused(
    exported: Callable[..., Path], serve: Callable[..., dict[str, Any]]
) -> None:
    variables = {"VLLM_PP_LAYER_PARTITION": "1,3"}
    result = serve(exported(), prompts()[:1], options=PIPELINE, variables=variables)
    assert "error" in result
    assert "begins at layer 1, in the middle of a CLA group: each stage must begin at a multiple of 2" in result["log"]
