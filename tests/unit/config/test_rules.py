"""Each rule refuses what it should, with its own message, and accepts the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_pretrain.config import noise_rules, rules
from hunyuan_pretrain.config.errors import ConfigError
from hunyuan_pretrain.config.load import load_experiment, load_model, parse, read, validate
from hunyuan_pretrain.config.nearest import nearest_divisors, nearest_multiples
from hunyuan_pretrain.config.schema import Experiment

DEMO = Path(__file__).parents[3] / "configs/dev/demo_cpu.yaml"
LARGE = Path(__file__).parents[3] / "configs/model/hunyuan_large.yaml"


def experiment_with(*overrides: str) -> Experiment:
    """The demo with overrides, with types but not rules checked."""
    return validate(Experiment, read(DEMO, overrides))


def refusal(*overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        rules.check(experiment_with(*overrides), world_size)
    return str(caught.value)


RECORDED = [
    (["runtime.device=cpu"], "runtime.device=cpu: CUDA graphs are of CUDA devices (set it to auto or cuda, or this to"),
    (["precision.dtype=fp32"], "precision.dtype=fp32: no attention kernel for fp32 reads the boundaries of documents"),
    (["model.moe_expert_capacity_factor=null", "model.recycle_routing=false"], "model.moe_expert_capacity_factor=null"),
    (
        ["parallel.pipeline_model_parallel_size=2"],
        "parallel.pipeline_model_parallel_size=2: an exchange between stages has never",
    ),
    (["parallel.context_parallel_size=2"], "parallel.context_parallel_size=2: which rows a rank has depends on"),
    (
        ["parallel.overlap_shared_expert=true", "parallel.expert_model_parallel_size=2"],
        "parallel.overlap_shared_expert=true: while a graph is recorded, memory that two streams use is not used again",
    ),
    (["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather=true: a replay cannot wait for a gather"),
    (["parallel.cpu_offloading_num_layers=2"], "parallel.cpu_offloading_num_layers=2: copies to the host"),
    (
        ["precision.fp8_recipe=blockwise", "precision.fp8_parameters=true"],
        "precision.fp8_parameters=true: an update may put the transposed weights into other memory (set it to false",
    ),
    (
        ["runtime.attention_backend=per_document"],
        "runtime.attention_backend=per_document: it does not read the boundaries of documents from memory (set it to "
        "auto or one of cudnn, flash_attn_3, flash_attn_2, torch_varlen, or this to false)",
    ),
    (["runtime.attention_backend=torch_batched"], "runtime.attention_backend=torch_batched: it does not read"),
]
"""What a step with runtime.cuda_graphs cannot contain."""

MEASURED = [
    (["runtime.cuda_graphs=true"], "runtime.cuda_graphs=true: in a recorded step nothing can be read between two"),
    (["parallel.context_parallel_size=2"], "parallel.context_parallel_size=2: a rank's gradient is that of a part of"),
    (
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        "parallel.virtual_pipeline_model_parallel_size=2: in the interleaved schedule the first micro-batch is not the "
        "only one whose gradients are there (set it to 1, or this to null)",
    ),
    (
        ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=1"],
        "parallel.expert_model_parallel_size * expert_tensor_parallel_size=1: no multiple of "
        "tensor_model_parallel_size 2, so a rank's experts see a part of each sequence (make it a multiple of 2, or "
        "this to null)",
    ),
    (
        ["stages.1.balance_attention=deal"],
        "stages.1.balance_attention=deal: a rank's first micro-batch is its dearest, and no random sample of the batch "
        "(set it to off, or this to null)",
    ),
    (
        [],
        "stages.0 has 1 micro-batch per data-parallel rank; to tell the first from the whole batch, at least 2 are "
        "needed (use global_batch_sequences 16 or smaller micro-batches, or this null)",
    ),
    (
        ["parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=1"],
        "stages.0 has 2 micro-batches per data-parallel rank; to tell the first from the whole batch with 2 pipeline "
        "ranks, at least 3 are needed (use global_batch_sequences 12",
    ),
]
"""Where the gradient noise scale cannot be measured."""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["checkpoint.resume_from=40", "checkpoint.resume=false", "checkpoint.init_from=x"],
            "checkpoint.resume_from=40: checkpoint.resume is false, which refuses to resume (set one of them)\n"
            "  checkpoint.resume_from=40: takes the whole state of a checkpoint, and checkpoint.init_from=x the "
            "weights only "
            "(set one of them, the other null)",
        ),
        (
            ["checkpoint.keep_every_steps=90"],
            "checkpoint.keep_every_steps=90: checkpoints are saved every 60 steps, so only every 180th step would be "
            "kept (use 60 or 120)",
        ),
        (
            ["checkpoint.keep_every_steps=60", "checkpoint.keep_last=null", "checkpoint.save_every_steps=null"],
            "checkpoint.keep_every_steps=60: checkpoint.keep_last is null, which keeps every checkpoint (set "
            "checkpoint.keep_last, or use null)\n"
            "  checkpoint.keep_every_steps=60: checkpoint.save_every_steps is null: no checkpoint is saved after a "
            "given step (set checkpoint.save_every_steps, or use null)",
        ),
        (
            ["model.kv_channels=null", "model.hidden_size=260"],
            "model.hidden_size=260: 8 heads, 260 % 8 != 0 and model.kv_channels is null (use 256 or 264, or set "
            "model.kv_channels)",
        ),
        (
            ["runtime.transformer_engine=required", "runtime.device=cpu", "precision.dtype=bf16"],
            "runtime.transformer_engine=required: it runs on CUDA devices only, but runtime.device is cpu (use "
            "auto or never)",
        ),
        (
            ["runtime.transformer_engine=required", "precision.dtype=fp32"],
            "runtime.transformer_engine=required: it multiplies fp32 matrices in TF32, with 10 bits of precision, "
            "but precision.dtype is "
            "fp32 (use precision.dtype=bf16, or auto, which uses the local layers for fp32)",
        ),
        (["model.num_query_groups=3"], "model.num_query_groups=3: 8 heads, 8 % 3 != 0 (use 2 or 4)"),
        (["model.num_query_groups=16"], "model.num_query_groups=16: 8 heads, 8 % 16 != 0 (use 8)"),
        (
            ["model.kv_channels=33"],
            "model.kv_channels=33: head width 33 must be even and at least 4, since RoPE rotates pairs",
        ),
        (["model.kv_channels=2"], "(use a head width of 4)"),
        (
            ["model.kv_channels=null", "model.hidden_size=8"],
            "model.num_attention_heads=8: head width 1 must be even and at least 4",
        ),
        (
            ["model.num_layers=5"],
            "model.num_layers=5: CLA groups of 2 layers, 5 % 2 != 0 (use 4 or 6, or cla_share_factor 1)",
        ),
        (["model.num_layers=1"], "(use 2, or cla_share_factor 1)"),
        (
            ["model.moe_router_topk=9"],
            "model.moe_router_topk=9: more than the 8 experts of model.num_moe_experts (use 1 to 8)",
        ),
        (
            ["model.moe_expert_capacity_factor=null"],
            "model.recycle_routing=true: without a capacity no expert is ever full, so nothing can be recycled",
        ),
        (
            ["parallel.expert_model_parallel_size=3", "parallel.world_size=null"],
            "parallel.expert_model_parallel_size=3: 8 experts, 8 % 3 != 0 (use 2 or 4)",
        ),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel=true: splits over the tensor-parallel ranks, but there is only one "
            "(set parallel.tensor_model_parallel_size above 1, or false)",
        ),
        (
            ["parallel.tensor_model_parallel_size=2"],
            "parallel.sequence_parallel=false: 2 tensor-parallel ranks would route the same tokens to the "
            "experts (set true)",
        ),
        (
            ["parallel.pipeline_model_parallel_size=3"],
            "parallel.pipeline_model_parallel_size=3: 4 layers in CLA groups of 2 = 2 groups, not divisible by 3 ranks "
            "(use 2 stages, or set parallel.pipeline_layout)",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
            "4 layers in CLA groups of 2 = 2 groups, not divisible by 2 ranks * 2 chunks (use 2 stages",
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            "parallel.virtual_pipeline_model_parallel_size=2: interleaves the chunks of several pipeline ranks, "
            "but there is only one "
            "(set parallel.pipeline_model_parallel_size above 1, or 1)",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[1, 3]"],
            "parallel.pipeline_layout=[1, 3]: a stage of 1 layers would cut a CLA group of 2 (use 2 layers)",
        ),
        (
            ["model.num_layers=8", "parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[3, 5]"],
            "parallel.pipeline_layout=[3, 5]: a stage of 3 layers would cut a CLA group of 2 (use 2 or 4 layers)",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[2, 4]"],
            "parallel.pipeline_layout=[2, 4]: adds up to 6 layers, but the model has 4 (make it 4)",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[4]"],
            "parallel.pipeline_layout=[4]: 1 stages, but 2 pipeline ranks with 1 chunks each have 2 (give 2 numbers)",
        ),
        (
            ["parallel.context_parallel_size=4", "parallel.context_parallel_method=all_to_all"],
            "parallel.context_parallel_size=4: each tensor-parallel rank has 2 key/value heads, 2 % 4 != 0, and "
            "all_to_all gives every "
            "rank whole heads (use 2, or parallel.context_parallel_method all_gather)",
        ),
        (
            [
                "parallel.tensor_model_parallel_size=2",
                "parallel.sequence_parallel=true",
                "parallel.context_parallel_size=2",
                "parallel.context_parallel_method=all_to_all",
            ],
            "parallel.context_parallel_size=2: each tensor-parallel rank has 1 key/value heads, 1 % 2 != 0",
        ),
        (
            ["parallel.context_parallel_size=4"],
            "stages.0.sequence_length=512: 4 context-parallel ranks cannot share 2 routing groups of 256 tokens evenly "
            "(use sequences of 1024 tokens, or parallel.context_parallel_size 2, or model.moe_routing_group_tokens "
            "128, which changes the routing)",
        ),
        (
            [
                "parallel.tensor_model_parallel_size=2",
                "parallel.sequence_parallel=true",
                "model.moe_routing_group_tokens=512",
                "stages.1.micro_batch_sequences=1",
            ],
            "stages.1.micro_batch_sequences=1: 2 tensor-parallel ranks cannot share a micro-batch of 1 routing "
            "groups of 512 tokens evenly "
            "(use 2, or parallel.tensor_model_parallel_size 1, or model.moe_routing_group_tokens 256, which changes "
            "the routing)",
        ),
        (
            [
                "parallel.tensor_model_parallel_size=2",
                "parallel.sequence_parallel=true",
                "model.moe_routing_group_tokens=512",
                "evaluation.micro_batch_sequences=3",
            ],
            "evaluation.micro_batch_sequences=3: 2 tensor-parallel ranks cannot share a micro-batch of 3 routing "
            "groups of 512 tokens evenly (use 2 or 4, or parallel.tensor_model_parallel_size 1, or "
            "model.moe_routing_group_tokens 256, which changes the routing)",
        ),
        (
            ["parallel.tensor_model_parallel_size=4"],
            "parallel.tensor_model_parallel_size=4: must divide the model: num_query_groups 2 % 4 != 0 (use 2)",
        ),
        (
            ["parallel.expert_tensor_parallel_size=3"],
            "parallel.expert_tensor_parallel_size=3: routed experts have width 512, 512 % 3 != 0 (use 2 or 4)",
        ),
        (
            ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"],
            "parallel.overlap_param_gather=true: needs parallel.overlap_grad_reduce (set "
            "parallel.overlap_grad_reduce to true",
        ),
        (
            [
                "parallel.overlap_param_gather=true",
                "parallel.overlap_grad_reduce=false",
                "parallel.use_distributed_optimizer=false",
            ],
            "needs parallel.use_distributed_optimizer and parallel.overlap_grad_reduce",
        ),
        (
            ["parallel.overlap_shared_expert=true", "parallel.expert_model_parallel_size=1"],
            "parallel.overlap_shared_expert=true: there is no exchange to run beside: "
            "parallel.expert_model_parallel_size is 1 (set it to false)",
        ),
        (
            [
                "parallel.overlap_shared_expert=true",
                "parallel.expert_model_parallel_size=2",
                "parallel.tensor_model_parallel_size=2",
                "parallel.sequence_parallel=true",
            ],
            "parallel.overlap_shared_expert=true: the tensor-parallel ranks of the shared expert would communicate "
            "during the exchange",
        ),
        *(
            (
                ["parallel.overlap_shared_expert=true", "parallel.expert_model_parallel_size=2", f"parallel.{other}"],
                f"parallel.overlap_shared_expert=true: with parallel.{other} both streams read what one of them brings",
            )
            for other in ("recompute=swiglu+norms", "cpu_offloading_num_layers=2")
        ),
        (
            ["optimizer.cpu_offload_fraction=1.5"],
            "optimizer.cpu_offload_fraction=1.5: a fraction of the optimizer state (use 1 to offload all of it)",
        ),
        (
            ["optimizer.cpu_offload_fraction=0.5", "parallel.use_distributed_optimizer=false"],
            "optimizer.cpu_offload_fraction=0.5: core's offloaded optimizer takes its weights and gradients from "
            "the distributed optimizer "
            "(set parallel.use_distributed_optimizer to true, or this to 0)",
        ),
        (
            ["parallel.cpu_offloading_num_layers=1"],
            "parallel.cpu_offloading_num_layers=1: a CLA group of 2 layers goes to the host as a whole, 1 % 2 != 0 "
            "(use 2)",
        ),
        (
            ["parallel.cpu_offloading_num_layers=4"],
            "parallel.cpu_offloading_num_layers=4: no stage has more than 2 layers to offload; the model's last CLA "
            "group stays on the device (use 2)",
        ),
        (
            ["stages.1.sequence_length=640"],
            "stages.1.sequence_length=640: not a multiple of model.moe_routing_group_tokens 256 "
            "(use 512 or 768, or a routing group of 128)",
        ),
        (
            ["optimizer.expert_lr_ratio=null"],
            "optimizer.expert_lr_ratio=null: expert_lr_ratio and expert_lr_noise_scale_tokens are both null",
        ),
        (
            ["optimizer.expert_lr_noise_scale_tokens=1e6"],
            "optimizer.expert_lr_ratio=0.31: expert_lr_noise_scale_tokens=1e+06 is set too",
        ),
        (["optimizer.adam_beta1=1.0"], "optimizer.adam_beta1=1: must be at least 0 and below 1 (use 0.9 or 0.95)"),
        (["optimizer.adam_beta2=-0.1"], "optimizer.adam_beta2=-0.1: must be at least 0 and below 1 (use 0)"),
        (["optimizer.ema_decay=1"], "optimizer.ema_decay=1: must be above 0 and below 1 (use 0.999)"),
        (
            ["optimizer.ema_decay=0"],
            "optimizer.ema_decay=0: must be above 0 and below 1 (use null for the weights themselves)",
        ),
        (["stages.2.name=warmup"], "stages.2.name=warmup: stages.0 already has this name (use warmup_2)"),
        (
            ["stages.0.lr_end=2"],
            "stages.0.lr_end=2: a fraction of optimizer.lr, which is the peak (use 1.0, or raise optimizer.lr)",
        ),
        (["stages.0.lr_end=0"], "stages.0.lr_end=0: the learning rate is 0 throughout the stage"),
        (
            ["stages.1.lr_end=0", "stages.1.lr_shape=constant"],
            "stages.1.lr_end=0: the learning rate is 0 throughout the stage",
        ),
        (
            ["stages.0.global_batch_sequences=12"],
            "stages.0.global_batch_sequences=12: not a multiple of micro_batch_sequences 4 * 2 data-parallel "
            "ranks = 8 (use 8 or 16)",
        ),
        (
            ["stages.0.global_batch_sequences=2", "parallel.world_size=null"],
            "stages.0.global_batch_sequences=2: not a multiple of micro_batch_sequences 4 = 4 (use 4)",
        ),
        (
            [
                "model.num_layers=8",
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
                "parallel.world_size=4",
            ],
            "stages.0.global_batch_sequences=8: 1 micro-batches per rank; the interleaved schedule needs a "
            "multiple of 2 (use 16)",
        ),
        *(
            (["runtime.cuda_graphs=true", "precision.dtype=bf16", *overrides], f"runtime.cuda_graphs=true: {expected}")
            for overrides, expected in RECORDED
        ),
        *(
            (["optimizer.measure_noise_scale_every_steps=5", *overrides], f"every_steps=5: {expected}")
            for overrides, expected in MEASURED
        ),
        (
            ["optimizer.measure_noise_scale_every_steps=121"],
            "every_steps=121: the run has 120 steps, so nothing would be measured (use 120 or fewer)",
        ),
        (
            ["optimizer.expert_lr_noise_scale_tokens=measured"],
            "optimizer.expert_lr_noise_scale_tokens=measured: optimizer.measure_noise_scale_every_steps is null, so "
            "nothing measures it (set that to 10, or this to a number)",
        ),
        (
            ["optimizer.expert_lr_noise_scale_tokens=measured", "optimizer.expert_lr_ratio=null"],
            "optimizer.expert_lr_ratio=null: the first stage uses it, before anything is measured (use 0.31)",
        ),
        (["parallel.world_size=3"], "parallel.world_size=3: not a multiple of 2, which"),
        (
            ["parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=4", "parallel.world_size=6"],
            "parallel.world_size=6: not a multiple of 4, which tensor_model_parallel_size * "
            "pipeline_model_parallel_size * "
            "context_parallel_size and expert_tensor_parallel_size * expert_model_parallel_size * "
            "pipeline_model_parallel_size must divide "
            "(use 4 or 8)",
        ),
    ],
)
def test_a_broken_rule_is_refused_with_its_own_message(overrides: list[str], expected: str) -> None:
    assert f"{expected}" in refusal(*overrides)


DPO = ["stages.0.task=dpo", "stages.1.task=dpo", "stages.2.task=dpo", "checkpoint.init_from=runs/sft"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.1.task=sft", "stages.1.task=sft: the reference of a stage with task=dpo is the start of the run"),
        (
            "stages.1.routing=model",
            "stages.1.routing=model: with a capacity, what a pair is given depends on the other",
        ),
        ("stages.1.loss_average=conversations", "stages.1.loss_average=conversations: has no effect with task=dpo"),
        ("stages.1.rope_alpha=1000", "all stages with task=dpo have one reference, and stage"),
        ("checkpoint.init_from=null", "checkpoint.init_from: task=dpo compares with the weights that the run"),
        ("precision.fp8_recipe=blockwise", "precision.fp8_recipe=blockwise: with task=dpo, scales that change"),
        (
            "optimizer.measure_noise_scale_every_steps=1",
            "optimizer.measure_noise_scale_every_steps=1: not with task=dpo",
        ),
    ],
)
def test_what_preferences_need_is_said(override: str, expected: str) -> None:
    assert expected in refusal(*DPO, override)


def test_preferences_are_accepted_and_their_settings_need_the_task() -> None:
    rules.check(experiment_with(*DPO, "stages.0.dpo_beta=0.2"))
    rules.check(experiment_with(*DPO, "checkpoint.init_from=null", "checkpoint.resume_from=3"))
    assert "stages.0.dpo_beta=0.2: has no effect without task=dpo" in refusal("stages.0.dpo_beta=0.2")


def test_the_demo_breaks_no_rule_and_causes_no_warning() -> None:
    rules.check(load_experiment(DEMO), world_size=2)
    assert rules.find_warnings(load_experiment(DEMO)) == []


def test_the_size_of_the_job_must_match_the_config() -> None:
    expected = "parallel.world_size=2: the job has 4 ranks (start 2 ranks, or set parallel.world_size to 4 or null)"
    assert expected in refusal(world_size=4)
    assert "parallel.world_size=3: not a multiple of 2" in refusal("parallel.world_size=null", world_size=3)
    rules.check(
        experiment_with("parallel.world_size=null", *(f"stages.{i}.micro_batch_sequences=2" for i in range(3))),
        world_size=4,
    )


def test_every_violation_is_in_one_message() -> None:
    text = refusal(
        "model.num_layers=5", "parallel.expert_model_parallel_size=3", "optimizer.adam_beta1=1", "stages.2.name=decay"
    )
    assert text.startswith("demo_cpu: 5 problems\n")
    for path in (
        "model.num_layers",
        "parallel.expert_model_parallel_size",
        "optimizer.adam_beta1",
        "stages.2.name",
        "parallel.world_size",
    ):
        assert f"\n  {path}=" in text


def test_every_violation_of_a_layout_is_in_one_message() -> None:
    text = refusal(
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_layout=[3, 3]",
        "parallel.context_parallel_size=4",
        "parallel.context_parallel_method=all_to_all",
        "parallel.expert_tensor_parallel_size=3",
        "parallel.world_size=null",
        "evaluation.data=null",
    )
    paths = [line.strip().split("=")[0] for line in text.splitlines()[1:]]
    assert paths == [
        "parallel.expert_tensor_parallel_size",
        "parallel.sequence_parallel",
        *["parallel.pipeline_layout"] * 3,  # its length, its sum, the split group
        "parallel.context_parallel_size",
        *[f"stages.{stage}.sequence_length" for stage in range(3)],
    ]


def test_layouts_that_fit_are_accepted() -> None:
    fit = ["parallel.world_size=null", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    rules.check(experiment_with(*fit), world_size=4)
    rules.check(
        experiment_with(*fit, "parallel.expert_tensor_parallel_size=2", "parallel.context_parallel_size=2"),
        world_size=4,
    )
    pipeline = ["model.num_layers=8", "parallel.pipeline_model_parallel_size=2"]
    rules.check(experiment_with(*fit, *pipeline, "parallel.pipeline_layout=[2, 6]"), world_size=4)
    rules.check(experiment_with(*fit, *pipeline, "parallel.virtual_pipeline_model_parallel_size=2"), world_size=4)


def test_constant_may_follow_a_stage_that_ended_at_zero() -> None:
    rules.check(experiment_with("stages.1.lr_end=0", "stages.2.lr_shape=constant"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.moe_expert_capacity_factor=0.5", "the experts have room for 50% of the tokens; the others are dropped"),
        ("stages.0.lr_end=0.5", "optimizer.lr=0.002: no stage reaches it: the highest lr_end is 0.5"),
        (
            "optimizer.ema_decay=0.9999",
            "optimizer.ema_decay=0.9999: after the run's 120 steps the average still is 99% the weights it began with "
            "(use 0.962351, which leaves 1%)",
        ),
        ("checkpoint.save_every_steps=null", "checkpoint.keep_last=2: checkpoint.save_every_steps is null"),
        (
            "checkpoint.save_every_steps=301",
            "checkpoint.save_every_steps=301: the run has 120 steps, so only its end is saved",
        ),
        (
            "checkpoint.keep_every_steps=180",
            "checkpoint.keep_every_steps=180: the run has 120 steps, so it keeps none beside the newest",
        ),
    ],
)
def test_settings_with_little_effect_cause_a_warning(override: str, expected: str) -> None:
    (warning,) = rules.find_warnings(experiment_with(override))
    assert expected in str(warning)


def test_offloading_from_the_cpu_to_the_cpu_causes_a_warning() -> None:
    (warning,) = rules.find_warnings(experiment_with("optimizer.cpu_offload_fraction=0.5", "runtime.device=cpu"))
    assert str(warning).startswith(
        "optimizer.cpu_offload_fraction=0.5: runtime.device is cpu: the state is in host memory anyway"
    )
    (warning,) = rules.find_warnings(experiment_with("parallel.cpu_offloading_num_layers=2", "runtime.device=cpu"))
    assert str(warning).startswith(
        "parallel.cpu_offloading_num_layers=2: runtime.device is cpu: activations are in host"
    )


def test_offloading_what_is_too_small_causes_a_warning() -> None:
    small = ["parallel.cpu_offloading_num_layers=2", "stages.1.micro_batch_sequences=1"]
    (warning,) = rules.find_warnings(experiment_with(*small))
    assert str(warning) == (
        "parallel.cpu_offloading_num_layers=2: in stages.1 a layer's input has 524,288 bytes, and blocks below "
        "1,048,576 stay on the device (use 0, or larger micro-batches)"
    )
    assert not rules.find_warnings(experiment_with(small[0]))


def test_the_refused_value_is_never_its_own_suggestion() -> None:
    for value in range(1, 40):
        for number in (1, 8, 12, 37):
            if number % value:
                assert str(value) not in nearest_divisors(value, number).split()
        for step in range(1, 12):
            if value % step:
                assert str(value) not in nearest_multiples(value, step).split()


def test_positions_follow_a_replaced_list() -> None:
    tree = parse("a: [{b: 1}]\n", "one")
    tree.merge(parse("c: 1\na:\n - b: 2\n", "two"))
    assert tree.data == {"a": [{"b": 2}], "c": 1}
    assert tree.position(("a", 0, "b")) == "two:3"


def test_validation_sets_need_names_that_are_valid_in_metrics() -> None:
    sets = (
        "evaluation.sets=[{name: code, path: a}, {name: 'my books/2', path: b}, {name: code, path: c}, {name: '..', "
        "path: d}]"
    )
    text = refusal(sets)
    rule = "must consist of letters, digits, dots, hyphens and underscores: it becomes part of metric names"
    assert f"evaluation.sets.1.name=my books/2: {rule} (use my_books_2)" in text
    assert "evaluation.sets.2.name=code: evaluation.sets.0 already has this name (use code_2)" in text
    assert f"evaluation.sets.3.name=..: {rule} (use set3)" in text
    made = experiment_with("evaluation.sets=[{name: zh-2.1_x, path: a, max_sequences: 4}]", "evaluation.data=b")
    assert made.evaluation.paths == ("b", "a")


def test_tasks_in_training_are_named_once_and_their_settings_need_them() -> None:
    text = refusal("evaluation.tasks=[piqa, 'a,b', piqa, hunyuan-base, hunyuan-instruct]")
    assert "evaluation.tasks.1=a,b: must be the name of one task or group" in text
    assert "evaluation.tasks.2=piqa: is named twice (remove one)" in text
    assert "hunyuan-base is without the chat template, hunyuan-instruct with it" in text
    text = refusal("evaluation.tasks_every_steps=5", "evaluation.tasks_data=x", "evaluation.tasks_limit=2")
    for setting in ("tasks_every_steps=5", "tasks_data=x", "tasks_limit=2"):
        assert f"evaluation.{setting}: has no effect without evaluation.tasks (name tasks, or remove this)" in text
    made = experiment_with("evaluation.tasks=[piqa, mmlu_anatomy]", "evaluation.tasks_limit=2").evaluation
    assert (made.tasks, made.tasks_every_steps, made.of_nothing().tasks) == (("piqa", "mmlu_anatomy"), None, ())


def test_the_nearest_legal_choices_for_routing_groups_are_legal() -> None:
    """Hunyuan-Large at 4,096 tokens under TP 8, PP 8, EP 8: each of the three choices in the hint is accepted."""
    large = [f"model.{name}={value}" for name, value in load_model(LARGE).model_dump().items() if value is not None]
    layout = [f"parallel.{name}_model_parallel_size=8" for name in ("tensor", "pipeline", "expert")]
    base = [*large, *layout, "parallel.sequence_parallel=true", "evaluation.data=null", "parallel.world_size=512"]
    stages = [f"stages.{n}.{key}" for n in range(3) for key in ("sequence_length=4096", "global_batch_sequences=2048")]
    base += [*stages, *(f"stages.{n}.micro_batch_sequences=1" for n in range(3))]
    with pytest.raises(ConfigError) as caught:
        load_experiment(DEMO, base)
    assert len(caught.value.problems) == 3
    assert (
        "stages.0.micro_batch_sequences=1: 8 tensor-parallel ranks cannot share a micro-batch of 4 routing groups of "
        "1024 tokens evenly (use 2, or parallel.tensor_model_parallel_size 4, or model.moe_routing_group_tokens 512, "
        "which changes the routing)"
    ) in str(caught.value)
    for choice in (
        [f"stages.{n}.micro_batch_sequences=2" for n in range(3)],
        ["parallel.tensor_model_parallel_size=4"],
        ["model.moe_routing_group_tokens=512"],
    ):
        load_experiment(DEMO, [*base, *choice])


def test_only_a_stage_that_is_measured_must_not_be_balanced() -> None:
    """The first stage has 10 steps, all three 120."""
    first = experiment_with(
        "stages.0.balance_attention=deal", *(f"stages.{i}.micro_batch_sequences=2" for i in range(3))
    )
    steps = first.stages[0].num_steps
    for every, is_refused in ((steps, True), (steps + 1, False)):
        optimizer = first.optimizer.model_copy(update={"measure_noise_scale_every_steps": every})
        found = [str(problem) for problem in rules.find_problems(first.model_copy(update={"optimizer": optimizer}))]
        assert ["stages.0.balance_attention=deal" in problem for problem in found] == [True] * is_refused, found


def test_experts_of_three_ranks_and_two_tensor_parallel_ranks_see_parts_of_sequences() -> None:
    base = experiment_with("optimizer.measure_noise_scale_every_steps=5")
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 3}
    experiment = base.model_copy(update={"parallel": base.parallel.model_copy(update=sizes)})
    refused = [str(problem) for problem in noise_rules.noise_scale_can_be_measured(experiment)]
    assert len(refused) == 1
    assert "expert_tensor_parallel_size=3: no multiple of tensor_model_parallel_size 2" in refused[0]


def test_a_noise_scale_is_measured_before_the_stage_that_uses_it() -> None:
    measured = ["optimizer.measure_noise_scale_every_steps=5", "optimizer.expert_lr_noise_scale_tokens=measured"]
    smaller = [f"stages.{index}.micro_batch_sequences=2" for index in range(3)]
    rules.check(experiment_with(*measured, *smaller))
    experiment = experiment_with(*measured, *smaller)
    # 114 steps before the last stage: 10 measurements, or 9
    rules.check(experiment_with(*measured, *smaller, "optimizer.measure_noise_scale_every_steps=11"))
    with pytest.raises(ConfigError) as caught:
        rules.check(experiment_with(*measured, *smaller, "optimizer.measure_noise_scale_every_steps=12"))
    assert (
        "optimizer.expert_lr_noise_scale_tokens=measured: a stage uses it after 10 measurements; before the last one "
        "there are 9, in 114 steps (use optimizer.measure_noise_scale_every_steps 11 or less, or a number here)"
    ) in str(caught.value)
    one_stage = experiment.model_copy(update={"stages": experiment.stages[:1]})
    assert "each stage uses what was measured before it, and there is only one" in str(
        [str(problem) for problem in rules.find_problems(one_stage)]
    )
