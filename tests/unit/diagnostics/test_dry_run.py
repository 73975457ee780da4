"""A dry run of a job: healthy layouts pass, and a planted fault is found and named.

They run one after another in one fork, because a rank is process-wide state: each must leave none."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import typer

from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.schema import Experiment
from tests.helpers.ranks import fork_ranks

pytestmark = pytest.mark.slow

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "moe_ffn_hidden_size": 40,
    "num_moe_experts": 4,
    "padded_vocab_size": 256,
    "moe_routing_group_tokens": 32,
    "moe_aux_loss_coeff": 0.01,
}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
ETP = {"expert_tensor_parallel_size": 2}
DROPLESS = {"moe_expert_capacity_factor": None, "recycle_routing": False}
UNEVEN = DROPLESS | {"num_moe_experts": 12, "moe_routing_group_tokens": 16}
EIGHT = {"num_layers": 8}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: ranks, fields of parallel, of model, of precision
    "one rank": (1, {}, {}, {"dtype": "bf16"}),
    "data, no capacity": (4, EP | {"recompute": "cla_group"}, DROPLESS, {"dtype": "bf16"}),
    "uneven counts of rows": (4, TP | EP | ETP, UNEVEN, {"dtype": "bf16"}),
    "many ranks, uneven counts": (64, TP | EP | PP | {"pipeline_layout": [6, 2]}, UNEVEN | EIGHT, {"dtype": "bf16"}),
    "pipeline of two, messages over all ranks": (
        8,
        TP | PP | EP | {"virtual_pipeline_model_parallel_size": 2, "recompute": "swiglu+norms"},
        EIGHT,
        {"dtype": "bf16", "grad_reduce_in_fp32": False},
    ),
    "context, tensor": (8, TP | CP | {"recompute": "selective+norms"}, {"qk_layernorm": False}, {"dtype": "fp32"}),
    "context, Ulysses, one optimizer": (
        4,
        CP | PP | {"context_parallel_method": "all_to_all", "use_distributed_optimizer": False},
        {"share_embeddings_and_output_weights": False},
        {"dtype": "fp32"},
    ),
    "offloaded": (4, PP | {"cpu_offloading_num_layers": 2}, {}, {"dtype": "bf16"}),
    "fine-tuning": (4, TP | EP, {}, {"dtype": "fp32"}),
    "adapters": (4, TP | EP, {}, {"dtype": "fp32"}),
    "preferences": (4, TP | CP, {}, {"dtype": "fp32"}),
    "fp8": (4, TP | EP, {"hidden_size": 64, "num_attention_heads": 4}, {"dtype": "bf16", "fp8_recipe": "delayed"}),
}


def experiment_of(name: str) -> tuple[Experiment, int]:
    ranks, parallel, model, precision = LAYOUTS[name]
    stage = {"name": "s", "tokens": 100_000, "sequence_length": 128, "micro_batch_sequences": 1, "lr_end": 1.0}
    fields = {
        "name": "tiny",
        "run_dir": "none",
        "tokenizer": "none",
        "model": MODEL | model,
        "parallel": parallel,
        "precision": precision,
        "optimizer": {"lr": 1e-2, "expert_lr_ratio": 0.5},
        "stages": [stage | {"global_batch_sequences": 8 * ranks, "data": [{"path": "none"}]}],
    }
    if name in ("fine-tuning", "adapters"):
        fields["stages"][0]["task"] = "sft"
    if name == "preferences":
        fields["stages"][0]["task"] = "dpo"
    if name == "adapters":
        fields["tuning"] = {"lora": {"rank": 4, "alpha": 8}}
    if name in ("adapters", "preferences"):
        fields["checkpoint"] = {"init_from": "none"}
    if name == "offloaded":
        fields["optimizer"]["cpu_offload_fraction"] = 0.5
    if name == "data, no capacity":  # left out: its numbers are not in the plan
        fields["optimizer"]["measure_noise_scale_every_steps"] = 1
    return Experiment.model_validate(fields), ranks


Found = tuple[list[str], list[tuple[str, str, str]], list[int]]


def run(name: str, fault: str | None = None) -> Found:
    """Problems, printed rows and built ranks."""
    import torch.distributed as dist

    from hunyuan_pretrain.diagnostics import dry_run, dry_run_checks

    with FAULTS[fault]() if fault else nullcontext():
        ran = dry_run.dry_run(*experiment_of(name))
        problems = dry_run_checks.find_problems(ran)
    assert not dist.is_initialized(), "the last rank has not been left"
    assert "meta" not in dist.Backend.default_device_backend_map
    return problems, dry_run_checks.rows(ran), [built.rank for built in ran.ranks]


def run_all() -> tuple[dict[str, Found], dict[str, Found], dict[str | None, int]]:
    return (
        {name: run(name) for name in LAYOUTS},
        {fault: run(layout, fault) for fault, layout, _ in EXPECTED},
        {fault: status_of_the_command(fault) for fault in (None, "forgotten_weight")},
    )


def status_of_the_command(fault: str | None) -> int:
    from hunyuan_pretrain.cli import planning

    with FAULTS[fault]() if fault else nullcontext():
        try:
            planning._dry_run(*experiment_of("one rank"))
        except typer.Exit as stop:
            return stop.exit_code
    return 0


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, Found], dict[str, Found], dict[str | None, int]]:
    """Of each layout, of each fault, and the command's exit status."""
    return fork_ranks(1, run_all, timeout_s=1200)[0]


# --- healthy layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_healthy_layout_has_no_problems(name: str, found: Any) -> None:
    problems, rows, built = found[0][name]
    assert problems == []
    assert rows[0][1] == f"{len(built)} of {LAYOUTS[name][0]}"


def test_a_torch_without_the_private_parts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "hunyuan_pretrain.parallel.fake_world"
    importlib.import_module(module)  # what else it needs is there
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch.testing._internal.distributed.fake_pg", None)
    with pytest.raises(ConfigError, match=r"lacks what a dry run needs: .*fake_pg"):
        importlib.import_module(module)


def test_of_many_ranks_the_first_and_the_last_of_each_pipeline_rank_are_built(found: Any) -> None:
    assert found[0]["many ranks, uneven counts"][2] == [0, 31, 32, 63]


# --- planted faults ---------------------------------------------------------------------------------------------------


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def skipped_reduction() -> Any:
    """Rank 5 leaves out the reduction of the largest logit in the first chunk of the loss."""
    import torch.distributed as dist

    from hunyuan_pretrain.model import cross_entropy

    done = []

    def make(before: Any) -> Any:
        def reduced(x: Any, group: Any, op: Any) -> Any:
            if dist.get_rank() == 5 and not done:
                done.append(True)
                return x
            return before(x, group, op)

        return reduced

    return _replaced(cross_entropy, "reduced", make)


def other_size() -> Any:
    """The last rank exchanges the rows of its experts in fp32."""
    import torch.distributed as dist

    from hunyuan_pretrain.model import dispatch

    def make(before: Any) -> Any:
        def exchange(group: Any, rows: Any, *splits: Any) -> Any:
            wide = rows.float() if dist.get_rank() == 7 else rows
            return before(group, wide, *splits).to(rows.dtype)

        return exchange

    return _replaced(dispatch, "all_to_all", make)


def other_counts() -> Any:
    """Rank 1 expects one row more of each rank than is sent."""
    import torch.distributed as dist

    from hunyuan_pretrain.model import dispatch

    def make(before: Any) -> Any:
        def exchange(group: Any, rows: Any, received: Any = None, sent: Any = None) -> Any:
            if dist.get_rank() == 1 and received is not None:
                found = before(group, rows, [number + 1 for number in received], sent)
                return found[: sum(received)]
            return before(group, rows, received, sent)

        return exchange

    return _replaced(dispatch, "all_to_all", make)


def longer_message() -> Any:
    """The second pipeline rank expects activations of another width."""
    from hunyuan_pretrain.parallel.fake_world import Recorder

    def make(before: Any) -> Any:
        def record(self: Any, call: Any) -> Any:
            found = before(self, call)
            return found._replace(sizes=(found.sizes[0] + 1,)) if found.kind == "recv" and found.peer == 0 else found

        return record

    return _replaced(Recorder, "_record", make)


def wrong_replica() -> Any:
    """Every tensor-parallel rank writes the norms."""
    from dataclasses import replace

    from hunyuan_pretrain.model import hunyuan_model

    def make(before: Any) -> Any:
        def placement_of(name: str, *arguments: Any, **options: Any) -> Any:
            found = before(name, *arguments, **options)
            return replace(found, replica=(0, 0, found.replica[2])) if "final_layernorm" in name else found

        return placement_of

    return _replaced(hunyuan_model, "placement_of", make)


def wrong_shape() -> Any:
    """A matmul on rank 3 does not fit."""
    import torch.distributed as dist

    from hunyuan_pretrain.model.experts import RoutedExperts

    def make(before: Any) -> Any:
        return lambda self, rows, splits: before(self, rows[:, :-1] if dist.get_rank() == 3 else rows, splits)

    return _replaced(RoutedExperts, "_whole_ffn", make)


def forgotten_weight() -> Any:
    """The plan forgets a buffer."""
    from hunyuan_pretrain.plan import counts

    def make(before: Any) -> Any:
        return lambda *arguments: before(*arguments)[1:]

    return _replaced(counts, "buffers_of_stage", make)


FAULTS: dict[str, Callable[[], Any]] = {
    found.__name__: found
    for found in (
        skipped_reduction,
        other_size,
        other_counts,
        longer_message,
        wrong_replica,
        wrong_shape,
        forgotten_weight,
    )
}


EXPECTED: list[tuple[str, str, str]] = [
    # fault, layout, part of the message
    (
        "skipped_reduction",
        "pipeline of two, messages over all ranks",
        r"rank 5 \(pipeline rank 1\), call \d+ of tensor model parallel group \[ranks 4, 5\]: issues all_reduce of "
        r"256 float32 in .*, but rank 4 issues all_reduce of 128 float32 in .*\(cross_entropy.py:\d+ reduced\)",
    ),
    (
        "other_size",
        "pipeline of two, messages over all ranks",
        r"rank 7 \(pipeline rank 1\), call 1 of expert model parallel group \[ranks 6, 7\]: issues all_to_all of "
        r"[\d,]+ float32 in layer 2, forward .*, but rank 6 issues all_to_all of [\d,]+ bfloat16 in layer 2, forward",
    ),
    (
        "other_counts",
        "uneven counts of rows",
        r"rank \d, call \d+ of expert model parallel group \[.*\]: sends [\d,]+ rows to rank 1, which expects",
    ),
    (
        "longer_message",
        "pipeline of two, messages over all ranks",
        r"rank 0 \(pipeline rank 0\) and rank 4 \(pipeline rank 1\), message 1: the first issues send of 2,048 "
        r"bfloat16 in .*, the second issues recv of 2,049 bfloat16",
    ),
    (
        "wrong_replica",
        "context, tensor",
        r"decoder.final_layernorm.weight, \(32,\): ranks 0, 1 write part \(0,\) of \(1,\); exactly one rank has to",
    ),
    (
        "wrong_shape",
        "uneven counts of rows",
        r"rank 3 fails in layer 0, forward: RuntimeError: .*\(grouped_linear.py:\d+ forward\)",
    ),
    (
        "forgotten_weight",
        "one rank",
        r"rank 0: its weights take [\d,]+ bytes, by the plan [\d,]+",
    ),
]


@pytest.mark.parametrize(("fault", "told"), [(fault, told) for fault, _, told in EXPECTED])
def test_a_planted_fault_is_found_and_named(fault: str, told: str, found: Any) -> None:
    problems, _, _ = found[1][fault]
    assert any(re.search(told, problem) for problem in problems), "\n".join(problems) or "nothing was found"


def test_the_command_exits_with_status_2_if_the_job_cannot_run(found: Any) -> None:
    assert found[2] == {None: 0, "forgotten_weight": 2}
