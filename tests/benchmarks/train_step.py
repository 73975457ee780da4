"""Tokens/s of one training step on CPU: this trainer, megatron-core's GPTModel, transformers' HunYuanMoEV1, and the
machine's limit.

    python tests/benchmarks/train_step.py [--rounds 5] [--steps 3] [--json FILE]

Every contender runs in a separate process with two threads, fp32, the same shapes (about 32M parameters), the same
tokens and AdamW. The contenders take turns in one run, and the median over the rounds counts. The limit takes its turns
too: the step's matmuls alone (6 x active parameters x tokens floating-point operations, on the model's own shapes) and
torch's fused AdamW over as many weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUM_LAYERS, HIDDEN, HEADS, GROUPS, FFN, EXPERTS, VOCAB = 8, 256, 8, 2, 512, 8, 8192
SEQUENCES, SEQUENCE_LENGTH = 2, 512
TOKENS = SEQUENCES * SEQUENCE_LENGTH
THREADS = 2
Step = Callable[[], float]


def ours(cla_share_factor: int, num_micro_batches: int = 1, **parallel: object) -> tuple[Step, int, int]:
    """This project's step with every feature on, in the ranks of this job; returns (step, parameters, active
    parameters)."""
    import torch

    from hunyuan_pretrain.runtime import cpu_megatron

    cpu_megatron.install()

    from hunyuan_pretrain.config.schema import (
        DataSource,
        Experiment,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        PrecisionConfig,
        StageConfig,
    )
    from hunyuan_pretrain.data.loader import MicroBatch
    from hunyuan_pretrain.model.hunyuan_config import transformer_config
    from hunyuan_pretrain.model.hunyuan_model import build_model
    from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed
    from hunyuan_pretrain.plan.counts import parameters
    from hunyuan_pretrain.runtime.environment import keep_freed_memory
    from hunyuan_pretrain.runtime.policy import fuses_wgrad_accumulation
    from hunyuan_pretrain.train.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
    from hunyuan_pretrain.train.run import Run
    from hunyuan_pretrain.train.step import train_step

    stage = StageConfig(
        name="bench",
        tokens=10**9,
        sequence_length=SEQUENCE_LENGTH,
        global_batch_sequences=SEQUENCES,
        micro_batch_sequences=1,
        lr_end=1.0,
        data=(DataSource(path="none"),),
    )
    experiment = Experiment(
        name="bench",
        run_dir="none",
        tokenizer="none",
        stages=(stage,),
        model=ModelConfig(
            num_layers=NUM_LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            ffn_hidden_size=FFN,
            num_moe_experts=EXPERTS,
            padded_vocab_size=VOCAB,
            cla_share_factor=cla_share_factor,
            moe_routing_group_tokens=SEQUENCE_LENGTH // 2,
        ),
        parallel=ParallelConfig(use_distributed_optimizer=False, **parallel),
        precision=PrecisionConfig(dtype="fp32"),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    keep_freed_memory()
    initialize_distributed("gloo", 60)
    groups = build_groups(experiment.parallel, 60)
    config = transformer_config(experiment.model, experiment.parallel, experiment.precision, fuses_wgrad_accumulation())
    chunks = wrap_data_parallel(build_model(config, groups, 0), experiment, groups)
    optimizer = build_optimizer(chunks, experiment, groups)
    set_learning_rate(optimizer, 1e-3, 0.31)
    sequences = torch.arange(SEQUENCES).view(groups.dp.size(), num_micro_batches, -1)[groups.dp.rank()]
    tokens, labels = (x.view(SEQUENCES, SEQUENCE_LENGTH) for x in sample_tokens())
    batches = [
        MicroBatch(
            tokens_T=tokens[ids].flatten(),
            labels_T=labels[ids].flatten(),
            loss_mask_T=torch.ones(len(ids) * SEQUENCE_LENGTH),
            positions_T=torch.arange(SEQUENCE_LENGTH).repeat(len(ids)),
            max_seqlen=SEQUENCE_LENGTH,
            sequence_ids=ids,
            cu_seqlens=torch.arange(0, len(ids) * SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH, dtype=torch.int32),
        )
        for ids in sequences
    ]
    stage = stage.model_copy(update={"micro_batch_sequences": sequences.shape[1]})
    # the parts of a run that a step uses: no data on disk, no log
    loader: Any = SimpleNamespace(micro_batches=lambda step: batches)
    run = Run(experiment, torch.device("cpu"), groups, [], chunks, optimizer, loader, None, 0, log=None)
    steps = itertools.count(1)

    def step() -> float:
        return train_step(run, stage, next(steps)).loss

    counts = parameters(experiment.model)
    return step, counts.total, counts.active


def megatron_gpt(num_micro_batches: int = 1, **parallel: int) -> tuple[Step, int, int]:
    """megatron-core's GPTModel, local spec, on the same CPU shim, with core's DDP, schedule and optimizer as in
    Megatron."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.helpers import gpt_on_cpu

    gpt_on_cpu.install()
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from hunyuan_pretrain.config.schema import ParallelConfig
    from hunyuan_pretrain.parallel.groups import build_groups, initialize_distributed

    initialize_distributed("gloo", 60)
    groups = build_groups(ParallelConfig(**parallel), 60)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=FFN,
        num_moe_experts=EXPERTS,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=1e-3,
        moe_router_load_balancing_type="aux_loss",
        moe_token_dispatcher_type="alltoall",
        qk_layernorm=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        **parallel,
    )
    layer = get_gpt_layer_local_spec(
        num_experts=EXPERTS, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    spec: Any = layer
    if parallel.get(
        "sequence_parallel"
    ):  # which core's local norm refuses, and core wants for experts under tensor parallelism
        norm, attention = gpt_on_cpu.sequence_parallel_norm(), layer.submodules.self_attention.submodules
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = attention.q_layernorm = (
            attention.k_layernorm
        ) = norm
        spec = TransformerBlockSubmodules(layer_specs=[layer] * (NUM_LAYERS // groups.pp.size()), layer_norm=norm)
    gpt = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE_LENGTH,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=1.0),
        [model],
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    config.finalize_model_grads_func = finalize_model_grads
    sequences = torch.arange(SEQUENCES).view(groups.dp.size(), num_micro_batches, -1)[groups.dp.rank()]
    inputs = [x.view(SEQUENCES, SEQUENCE_LENGTH) for x in sample_tokens()]
    position = torch.arange(SEQUENCE_LENGTH).expand(sequences.shape[1], -1)
    mask = torch.triu(torch.ones(1, 1, SEQUENCE_LENGTH, SEQUENCE_LENGTH), 1).bool()

    def forward(micro_batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple:
        ids = next(micro_batches)
        return model(inputs[0][ids], position, mask, labels=inputs[1][ids]), lambda losses: (
            losses.mean(),
            losses.mean().detach(),
        )

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(sequences),
            model=[model],
            num_microbatches=num_micro_batches,
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=sequences.shape[1],
            forward_only=False,
        )
        optimizer.step()
        return losses[0].item() if losses else 0.0

    total = sum(p.numel() for p in gpt.parameters())
    expert = 3 * HIDDEN * FFN
    return step, total, total - NUM_LAYERS * (EXPERTS - 1) * expert


def transformers_hunyuan() -> tuple[Step, int, int]:
    """transformers' native HunYuanMoEV1ForCausalLM with torch's AdamW in its default form."""
    import torch
    from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

    torch.manual_seed(1)
    config = HunYuanMoEV1Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HIDDEN // HEADS,
        num_experts=EXPERTS,
        moe_topk=1,
        tie_word_embeddings=True,
    )
    model = HunYuanMoEV1ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    tokens_T, _ = sample_tokens()
    tokens = tokens_T.view(SEQUENCES, SEQUENCE_LENGTH)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    total = sum(p.numel() for p in model.parameters())
    return step, total, total - NUM_LAYERS * (EXPERTS - 1) * 3 * HIDDEN * FFN


def limit() -> tuple[Step, int, int]:
    """Lower bound of a step on this machine: the step's matmuls alone, and torch's fused AdamW over its weights."""
    import torch

    kv = 2 * GROUPS * HIDDEN // HEADS
    dense = [(HIDDEN, HIDDEN + kv * (layer % 2 == 0)) for layer in range(NUM_LAYERS)] + [(HIDDEN, HIDDEN)] * NUM_LAYERS
    dense += [(HIDDEN, 2 * FFN), (FFN, HIDDEN)] * NUM_LAYERS + [(HIDDEN, VOCAB)]
    routed = [(HIDDEN, 2 * FFN), (FFN, HIDDEN)] * NUM_LAYERS
    shapes = [(1, TOKENS, *shape) for shape in dense] + [(EXPERTS, TOKENS // EXPERTS, *shape) for shape in routed]
    products = []
    for experts, rows, inner, outer in shapes:
        x, w, y = (
            torch.randn(experts, rows, inner),
            torch.randn(experts, inner, outer) * 0.02,
            torch.empty(experts, rows, outer),
        )
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        products += [(x, w, y), (y, w.transpose(1, 2), dx), (x.transpose(1, 2), y, dw)]
    total = sum(experts * inner * outer for experts, _, inner, outer in shapes)
    weight = torch.nn.Parameter(torch.zeros(total))
    weight.grad = torch.zeros(total)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)

    def step() -> float:
        for a, b, out in products:
            torch.bmm(a, b, out=out)
        optimizer.step()
        return 0.0

    return step, total, sum(inner * outer for _, _, inner, outer in shapes)


def sample_tokens() -> tuple:
    """The same pseudo-text for every contender: token ids with a Zipf-like distribution, and the next tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = (VOCAB ** torch.rand(TOKENS + 1, generator=generator)).long().clamp(max=VOCAB - 1)
    return ids[:-1].clone(), ids[1:].clone()


CONTENDERS: dict[str, Callable[[], tuple[Step, int, int]]] = {
    "hunyuan-pretrain": lambda: ours(2),
    "hunyuan-pretrain, no CLA": lambda: ours(1),
    "megatron-core GPTModel": megatron_gpt,
    "transformers HunYuanMoEV1": transformers_hunyuan,
    "limit": limit,
}


def worker(name: str, started: float) -> None:
    """Answer every line on stdin (a number of steps) with the seconds of each, as JSON."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(THREADS)
    step, total, active = CONTENDERS[name]()
    loss = step()
    print(
        json.dumps({"first_step_s": time.time() - started, "total": total, "active": active, "loss": loss}), flush=True
    )
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mib": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.started)
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    processes, reports = {}, {}
    for name in arguments.only:  # one after the other, so that start-up times do not disturb each other
        command = [sys.executable, __file__, "--worker", name, "--started", str(time.time())]
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        reports[name] = json.loads(processes[name].stdout.readline()) | {"seconds": []}
    for round_number in range(arguments.rounds + 1):  # the first round warms up
        for name, process in processes.items():
            process.stdin.write(f"{arguments.steps}\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            reports[name] |= {"loss": answer["loss"], "peak_mib": answer["peak_mib"]}
            reports[name]["seconds"] += answer["seconds"] if round_number else []
    for process in processes.values():
        process.stdin.close()
        process.wait()
    tokens_per_s = {name: TOKENS / statistics.median(report["seconds"]) for name, report in reports.items()}
    print(f"{'':28} {'tokens/s':>9} {'of limit':>9} {'first step':>11} {'peak MiB':>9} {'parameters':>12} {'loss':>7}")
    for name, report in reports.items():
        report["tokens_per_s"] = tokens_per_s[name]
        share = f"{tokens_per_s[name] / tokens_per_s['limit']:9.0%}" if "limit" in tokens_per_s else f"{'':9}"
        print(
            f"{name:28} {tokens_per_s[name]:9,.0f} {share} {report['first_step_s']:9.1f} s {report['peak_mib']:9,.0f} "
            f"{report['total']:12,} {report['loss']:7.3f}"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(reports, file, indent=1)


if __name__ == "__main__":
    main()
