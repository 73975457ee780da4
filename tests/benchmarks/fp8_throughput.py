"""Tokens/s and TFLOP/s of a training step on one GPU in bf16 and in every FP8 recipe that it supports, beside
megatron-core's GPTModel.

    python tests/benchmarks/fp8_throughput.py [--steps 10] [--on-stand-ins]

Both have Transformer Engine's layers, the same shapes, tokens and AdamW. Each contender runs in a separate process, one
after the other, and the median step counts. TFLOP/s: 6 x active parameters x tokens, ignoring attention. GPTModel has
no CLA and no recycling, and drops no token. --on-stand-ins: tiny sizes with the tests' stand-ins instead of kernels, to
check that everything runs; the figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
RECIPES = (None, "delayed", "tensorwise", "blockwise", "mxfp8")
ON_GPU = {
    "layers": 4,
    "hidden": 2048,
    "heads": 16,
    "groups": 4,
    "ffn": 5632,
    "experts": 8,
    "vocab": 32768,
    "length": 4096,
    "sequences": 4,
}
ON_STAND_INS = {
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "groups": 2,
    "ffn": 64,
    "experts": 4,
    "vocab": 128,
    "length": 64,
    "sequences": 2,
}
MICRO_BATCHES = 2
Step = Callable[[], float]


def ours(size: SimpleNamespace, recipe: str | None, engine: bool = True) -> tuple[Step, int]:
    """This project's step with every feature on; returns (step, active parameters)."""
    import torch

    from hunyuan_pretrain.config.schema import (
        DataSource,
        Experiment,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        StageConfig,
    )
    from hunyuan_pretrain.data.loader import MicroBatch
    from hunyuan_pretrain.model.engine.fp8 import training_step
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from hunyuan_pretrain.parallel.groups import build_groups
    from hunyuan_pretrain.plan.counts import parameters
    from hunyuan_pretrain.train.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
    from hunyuan_pretrain.train.run import Run
    from hunyuan_pretrain.train.step import train_step

    stage = StageConfig(
        name="bench",
        tokens=10**9,
        sequence_length=size.length,
        global_batch_sequences=size.sequences,
        micro_batch_sequences=size.sequences // MICRO_BATCHES,
        lr_end=1.0,
        data=(DataSource(path="none"),),
    )
    experiment = Experiment(
        name="bench",
        run_dir="none",
        tokenizer="none",
        stages=(stage,),
        model=ModelConfig(
            num_layers=size.layers,
            hidden_size=size.hidden,
            num_attention_heads=size.heads,
            num_query_groups=size.groups,
            ffn_hidden_size=size.ffn,
            num_moe_experts=size.experts,
            padded_vocab_size=size.vocab,
            moe_routing_group_tokens=size.length,
        ),
        precision=PrecisionConfig(dtype="bf16", fp8_recipe=recipe),
        optimizer=OptimizerConfig(lr=1e-4),
    )
    groups = build_groups(experiment.parallel, 600)
    config = transformer_config(experiment.model, experiment.parallel, experiment.precision, engine, engine)
    chunks = wrap_data_parallel(build_model(config, groups, 0), experiment, groups)
    optimizer = build_optimizer(chunks, experiment, groups)
    set_learning_rate(optimizer, 1e-4, 0.31)
    tokens, labels = sample_tokens(size)
    rows = size.sequences // MICRO_BATCHES * size.length
    batches = [
        MicroBatch(
            tokens_T=tokens[start : start + rows],
            labels_T=labels[start : start + rows],
            loss_mask_T=torch.ones(rows),
            positions_T=torch.arange(size.length).repeat(rows // size.length),
            max_seqlen=size.length,
            sequence_ids=torch.arange(start, start + rows, size.length) // size.length,
            cu_seqlens=torch.arange(0, rows + 1, size.length, dtype=torch.int32),
        )
        for start in range(0, size.sequences * size.length, rows)
    ]
    # the parts of a run that a step uses: no data on disk, no log
    loader: Any = SimpleNamespace(micro_batches=lambda step: batches)
    run = Run(experiment, device(), groups, [], chunks, optimizer, loader, None, 0, log=None)
    steps = itertools.count()

    def step() -> float:
        with training_step(chunks, groups):
            return train_step(run, stage, next(steps)).loss

    return step, parameters(experiment.model).active


def megatron_gpt(size: SimpleNamespace, recipe: str | None) -> tuple[Step, int]:
    """megatron-core's GPTModel with its own Transformer Engine spec; returns (step, active parameters)."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from hunyuan_pretrain.config.schema import ParallelConfig
    from hunyuan_pretrain.parallel.groups import build_groups

    groups = build_groups(ParallelConfig(), 600)
    model_parallel_cuda_manual_seed(1)
    formats: dict[str, Any] = (
        {"fp8": "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid", "fp8_recipe": recipe} if recipe else {}
    )
    if recipe == "delayed":
        formats |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    config = TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_query_groups=size.groups,
        ffn_hidden_size=size.ffn,
        moe_ffn_hidden_size=size.ffn,
        moe_shared_expert_intermediate_size=size.ffn,
        num_moe_experts=size.experts,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=1e-3,
        moe_router_load_balancing_type="aux_loss",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        qk_layernorm=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        moe_router_padding_for_quantization=recipe is not None,
        use_cpu_initialization=device().type == "cpu",
        **formats,
    )
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=size.experts, moe_grouped_gemm=True, qk_layernorm=True
    )
    with output_layer_without_apex():
        gpt = GPTModel(
            config,
            spec,
            vocab_size=size.vocab,
            max_sequence_length=size.length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
        ).to(device(), torch.bfloat16)
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True), gpt
    )
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False, pg_collection=groups)
    config.finalize_model_grads_func = finalize_model_grads
    tokens, labels = (x.view(MICRO_BATCHES, -1, size.length).to(device()) for x in sample_tokens(size))
    position = torch.arange(size.length, device=device()).expand(tokens.shape[1], -1)

    def forward(numbers: Iterator[int], model: torch.nn.Module) -> tuple:
        number = next(numbers)
        return model(tokens[number], position, None, labels=labels[number]), lambda losses: (
            losses.mean(),
            losses.mean().detach(),
        )

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(range(MICRO_BATCHES)),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=size.length,
            micro_batch_size=tokens.shape[1],
            forward_only=False,
        )
        optimizer.step()
        return losses[0].item()

    total = sum(parameter.numel() for parameter in gpt.parameters())
    return step, total - size.layers * (size.experts - 1) * 3 * size.hidden * size.ffn


@contextmanager
def output_layer_without_apex() -> Iterator[None]:
    """GPTModel's output layer is core's own and accumulates its gradient inside the GEMM only with Apex's extension, so
    it is disabled there; GPTModel's other layers, from Transformer Engine, still accumulate."""
    from megatron.core.tensor_parallel import layers

    construct = layers.ColumnParallelLinear.__init__

    def without_fusion(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False
        construct(self, *args, config=config, **kwargs)

    with patch.object(layers.ColumnParallelLinear, "__init__", without_fusion):
        yield


def sample_tokens(size: SimpleNamespace) -> tuple:
    """The same pseudo-text for every contender: token ids with a Zipf-like distribution, and the next tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = (
        (size.vocab ** torch.rand(size.sequences * size.length + 1, generator=generator))
        .long()
        .clamp(max=size.vocab - 1)
    )
    return ids[:-1].clone(), ids[1:].clone()


def device() -> Any:
    """The GPU, or the CPU with --on-stand-ins."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


CONTENDERS: dict[str, Callable[[SimpleNamespace], tuple[Step, int]]] = {
    "hunyuan-pretrain, own layers, bf16": lambda size: ours(size, None, engine=False),
    **{f"hunyuan-pretrain, {recipe or 'bf16'}": lambda size, recipe=recipe: ours(size, recipe) for recipe in RECIPES},
    **{f"GPTModel, {recipe or 'bf16'}": lambda size, recipe=recipe: megatron_gpt(size, recipe) for recipe in RECIPES},
}


def worker(name: str, num_steps: int, on_stand_ins: bool) -> None:
    """Print the seconds of each step after two, as JSON."""
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(ROOT))
    if on_stand_ins:
        from tests.helpers import gpt_on_cpu, transformer_engine_stub

        transformer_engine_stub.install((10, 0))
        if name.startswith("GPTModel"):
            gpt_on_cpu.install()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # before anything asks for a GPU
    import torch

    from hunyuan_pretrain.parallel.groups import destroy_groups, initialize_distributed

    initialize_distributed("gloo" if on_stand_ins else "nccl", 600)
    size = SimpleNamespace(**(ON_STAND_INS if on_stand_ins else ON_GPU))
    step, active = CONTENDERS[name](size)
    seconds = []
    for _ in range(num_steps + 2):
        started = time.perf_counter()
        loss = step()  # reading it waits for the GPU
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    tokens = size.sequences * size.length
    print(
        json.dumps({"seconds": seconds[2:], "loss": loss, "active": active, "tokens": tokens, "peak_gib": peak}),
        flush=True,
    )
    destroy_groups()


def supported(on_stand_ins: bool) -> list[str]:
    """Contenders that this GPU can run."""
    sys.path.insert(0, str(ROOT))
    from hunyuan_pretrain.config import recipe as recipes
    from hunyuan_pretrain.runtime.device import probe
    from hunyuan_pretrain.runtime.policy import missing_for_fp8

    machine = probe()
    if not on_stand_ins and not machine.gpus:
        sys.exit("fp8_throughput.py: this machine has no usable CUDA device")
    names = list(CONTENDERS)
    for name, recipe in recipes.RECIPES.items():
        if machine.gpus and missing_for_fp8(recipe, machine.gpus[0].capability, machine.cuda):
            names = [contender for contender in names if not contender.endswith(f", {name}")]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS))
    parser.add_argument("--on-stand-ins", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.steps, arguments.on_stand_ins)
        return
    print(f"{'':36} {'tokens/s':>10} {'TFLOP/s':>8} {'peak GiB':>9} {'loss':>7}")
    for name in arguments.only or supported(arguments.on_stand_ins):
        command = [sys.executable, __file__, "--worker", name, "--steps", str(arguments.steps)]
        command += ["--on-stand-ins"] if arguments.on_stand_ins else []
        # nothing to compile for
        environment = os.environ | ({"TORCHDYNAMO_DISABLE": "1"} if arguments.on_stand_ins else {})
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode:
            print(f"{name:36} failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
            continue
        report = json.loads(run.stdout.splitlines()[-1])
        speed = report["tokens"] / statistics.median(report["seconds"])
        teraflops = 6 * report["active"] * speed / 1e12
        print(f"{name:36} {speed:10,.0f} {teraflops:8.1f} {report['peak_gib']:9.1f} {report['loss']:7.3f}", flush=True)


if __name__ == "__main__":
    main()
