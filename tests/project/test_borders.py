"""What this project uses of third-party packages must still exist: every imported name, and every argument that it
passes by name.

`make test-latest` runs this, and the tests of third-party interfaces, with the newest version of everything.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hunyuan_pretrain.train  # noqa: F401  lets megatron-core run without a GPU

ROOT = Path(__file__).parents[2]
OWN = ("hunyuan_pretrain", "data_tools", "launch", "tests", "environment")
SKIPPED = ("transformer_engine", "transformers", "apex", "vllm", "mlflow", "datasets", "lm_eval", "nltk")
"""Absent from this environment, or tested name by name elsewhere (tests/reference, tests/vllm, test_sinks.py)."""

ARGUMENTS = {
    "megatron.core.parallel_state:initialize_model_parallel": "tensor_model_parallel_size pipeline_model_parallel_size "
    "virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size expert_tensor_parallel_size "
    "distributed_timeout_minutes create_gloo_process_groups",
    "megatron.core.parallel_state:RankGenerator": "tp ep dp pp cp order",
    "megatron.core.optimizer:get_megatron_optimizer": "config model_chunks config_overrides",
    "megatron.core.optimizer:OptimizerConfig": "optimizer lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad "
    "bf16 fp16 "
    "params_dtype "
    "use_distributed_optimizer overlap_param_gather optimizer_cpu_offload optimizer_offload_fraction",
    "megatron.core.distributed:DistributedDataParallelConfig": "grad_reduce_in_fp32 overlap_grad_reduce "
    "overlap_param_gather "
    "use_distributed_optimizer average_in_collective bucket_size",
    "megatron.core.distributed:DistributedDataParallel": "config ddp_config module disable_bucketing",
    "megatron.core.distributed:finalize_model_grads": "model num_tokens",
    "megatron.core.tensor_parallel:VocabParallelEmbedding": "num_embeddings embedding_dim init_method config tp_group",
    "megatron.core.tensor_parallel:ColumnParallelLinear": "input_size output_size config init_method bias "
    "gather_output "
    "tp_group",
    "megatron.core.tensor_parallel:RowParallelLinear": "input_size output_size config init_method bias "
    "input_is_parallel "
    "tp_group",
    "megatron.core.dist_checkpointing:load": "sharded_state_dict checkpoint_dir",
    "megatron.core.dist_checkpointing.mapping:ShardedTensor.from_rank_offsets": "key data replica_id",
    "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining": "forward_step_func data_iterator model "
    "num_microbatches "
    "seq_length micro_batch_size forward_only pg_collection",
    "torch.utils.checkpoint:checkpoint": "use_reentrant",
    "torch.distributed:init_process_group": "backend timeout store rank world_size",
    "pydantic:ConfigDict": "extra frozen",
    "pydantic:Field": "default description ge gt le",
    "typer:Typer": "name help no_args_is_help add_completion pretty_exceptions_enable",
    "typer:Option": "help min max metavar show_default",
    "typer:Argument": "metavar help show_default",
    "tokenizers:AddedToken": "content special normalized",
    "tokenizers.models:BPE": "vocab merges",
    "tokenizers.pre_tokenizers:Split": "pattern behavior invert",
    "datatrove.executor:LocalPipelineExecutor": "pipeline tasks workers logging_dir depends skip_completed",
    "datatrove.executor:SlurmPipelineExecutor": "pipeline tasks time partition logging_dir job_name qos env_command "
    "sbatch_args depends",
    "datatrove.executor:RayPipelineExecutor": "pipeline tasks workers logging_dir depends skip_completed",
}
"""Module and name -> arguments that are passed by name."""

OPERATORS = {
    "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal attn_mask scale",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "grad_out query key value out logsumexp dropout_p "
    "is_causal "
    "attn_mask scale",
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
    "_scaled_dot_product_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k "
    "max_q max_k "
    "dropout_p "
    "is_causal philox_seed philox_offset scale",
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
    "silu_backward": "grad_output self",
}
"""Operators of torch without a public name -> their arguments, in order; versions may add others with defaults."""


def foreign_names() -> list[str]:
    """module:name of every `from module import name`, and module of every `import module`, for third-party packages
    outside the standard library."""
    found = set()
    for folder in ("hunyuan_pretrain", "data_tools", "launch", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(imports_of(ast.parse(path.read_text(encoding="utf-8"))))
    return sorted(found)


def imports_of(tree: ast.Module) -> Iterator[str]:
    import sys

    ours = (*OWN, *SKIPPED, *sys.stdlib_module_names, "__future__")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] not in ours)
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and not node.level
            and node.module.partition(".")[0] not in ours
        ):
            yield from (f"{node.module}:{alias.name}" for alias in node.names)


def find(place: str) -> Any:
    """The object that `module:name` or `module` names."""
    module, _, names = place.partition(":")
    found = importlib.import_module(module)
    for name in names.split(".") if names else ():
        if not hasattr(found, name):  # a submodule
            return importlib.import_module(f"{module}.{name}")
        found = getattr(found, name)
    return found


def test_every_imported_name_exists() -> None:
    gone = []
    for place in foreign_names():
        try:
            find(place)
        except (ImportError, AttributeError) as error:
            gone.append(f"{place}: {error}")
    assert gone == []


@pytest.mark.parametrize("place", ARGUMENTS)
def test_every_argument_passed_by_name_exists(place: str) -> None:
    found = find(place)
    if isinstance(found, type) and issubclass(found, dict):
        names = set(found.__annotations__)
    else:
        names = (
            set(inspect.signature(found).parameters)
            if place.partition(":")[0] != "tokenizers"
            else rust_arguments(found)
        )
    assert set(ARGUMENTS[place].split()) <= names or "kwargs" in names


def rust_arguments(found: Any) -> set[str]:
    """The keyword arguments of a class that has no signature of its own."""
    found("x", special=True, normalized=False)
    return {"content", "special", "normalized"}


@pytest.mark.parametrize("name", OPERATORS)
def test_private_operators_of_torch_have_unchanged_arguments(name: str) -> None:
    arguments, expected = getattr(torch.ops.aten, name).default._schema.arguments, OPERATORS[name].split()
    assert [argument.name for argument in arguments[: len(expected)]] == expected
    assert all(argument.has_default_value() for argument in arguments[len(expected) :])
