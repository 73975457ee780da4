"""Operations, and bytes read and written, of one training step per token and layer, without a GPU.

    python -m tests.benchmarks.step_bytes [--tokens 8192] [--layers 2] [--json FILE]

Forward and backward of one micro-batch of Hunyuan-Large's width in bf16 run on meta tensors, which have shapes but no
memory. The device is then neither a CPU nor counted as one, so the code takes the branches that it takes on a GPU. The
layers are the local ones: with Transformer Engine the norms and the products are its kernels, the rest is the same.

tests/helpers/byte_counter.py says how bytes are counted.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hunyuan_pretrain.config.derived import LOSS_CHUNK_TOKENS
from hunyuan_pretrain.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from hunyuan_pretrain.runtime import cpu_megatron

cpu_megatron.install()

from hunyuan_pretrain.model import hunyuan_model, packed_attention  # noqa: E402
from hunyuan_pretrain.model.hunyuan_config import transformer_config  # noqa: E402
from hunyuan_pretrain.model.hunyuan_model import HunyuanModel, build_model  # noqa: E402
from hunyuan_pretrain.model.inputs import ModelInputs  # noqa: E402
from hunyuan_pretrain.model.routing import TrainingRouting  # noqa: E402
from tests.helpers.byte_counter import LINEAR, SUMS, Count, StepBytes  # noqa: E402

HUNYUAN_LARGE = {
    "num_layers": 2,
    "hidden_size": 6400,
    "num_attention_heads": 80,
    "num_query_groups": 8,
    "ffn_hidden_size": 18304,
    "num_moe_experts": 16,
    "padded_vocab_size": 128512,
    "moe_routing_group_tokens": 4096,
    "moe_aux_loss_coeff": 0.01,
}
PER_STEP = ("cross-entropy", "embedding", "rest")
"""Parts outside the layers."""


def name_parts(model: HunyuanModel, counter: StepBytes) -> None:
    """Make the model's functions say which part they are."""
    within = counter.within
    model.embedding.forward = within("embedding", model.embedding.forward)  # type: ignore[method-assign]
    model.decoder.final_layernorm.forward = within("rest", model.decoder.final_layernorm.forward)
    for layer in model.decoder.layers:
        attention, moe = layer.self_attention, layer.mlp
        experts = moe.experts
        layer.forward = within(SUMS, layer.forward)  # type: ignore[method-assign]
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            norm.forward = within("norms", norm.forward)
        attention.forward = within("RoPE, head norm", attention.forward)  # type: ignore[method-assign]
        for name in ("linear_qkv", "linear_q"):
            if hasattr(attention, name):
                linear = getattr(attention, name)
                linear.forward = within("qkv", linear.forward)
        attention.core_attention = within("attention", attention.core_attention)
        attention.linear_proj.forward = within("projection", attention.linear_proj.forward)
        moe.router.forward = within("router", moe.router.forward)  # type: ignore[method-assign]
        moe.permute = within("permute", moe.permute)
        moe.combine = within("combine", moe.combine)
        for expert in (experts, moe.shared_experts):
            expert.swiglu = within("SwiGLU", expert.swiglu)
            for linear in (expert.linear_fc1, expert.linear_fc2):
                linear.forward = within("experts", linear.forward)


def micro_batch(model: ModelConfig, num_tokens: int, device: str) -> ModelInputs:
    """Sequences of one routing group each, one document per sequence."""
    length = model.moe_routing_group_tokens
    tokens = torch.arange(num_tokens, device=device) % model.padded_vocab_size
    return ModelInputs(
        tokens_T=tokens,
        labels_T=(tokens + 1) % model.padded_vocab_size,
        positions_T=tokens % length,
        cu_seqlens=list(range(0, num_tokens + 1, length)),
        loss_weight_T=torch.full((num_tokens,), 1.0 / num_tokens, device=device),
        routing=TrainingRouting(
            seed=1,
            step=1,
            group_n=torch.arange(num_tokens // length, device=device),
            num_global_groups=num_tokens // length,
        ),
    )


def count_step(
    model: ModelConfig, num_tokens: int, *, device: str = "meta", dtype: str = "bf16", use_kernels: bool = False
) -> dict[tuple[str, str], Count]:
    """Counts of each part and direction ("forward", "backward") of one micro-batch; gradients of embedding and output
    layer accumulate in main_grad, as in training."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from tests.helpers.tiny import world_of_one

    counter = StepBytes()
    flash = packed_attention._Kernel(packed_attention._flash_cuda, packed_attention._flash_cuda_backward)
    with ExitStack() as stack:
        # core keeps it on the class, on the device of the first loss
        stack.enter_context(patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", None))
        stack.enter_context(patch.dict(LOSS_CHUNK_TOKENS, {"meta": LOSS_CHUNK_TOKENS["cuda"]}))
        if device == "meta":
            stack.enter_context(patch.object(packed_attention, "_kernel", lambda q_TNH: flash))
        with torch.device(device):
            config = transformer_config(
                model, ParallelConfig(), PrecisionConfig(dtype=dtype), device="cpu", use_kernels=use_kernels
            )
            (built,) = build_model(config, world_of_one(), None if device == "meta" else 1)
        config.gradient_accumulation_fusion = True  # only after linear layers, which would want core's extension
        built.embedding.word_embeddings.adds_rows = True
        for parameter in (built.shared_embedding_or_output_weight(), *built.embedding.parameters()):
            parameter.main_grad = torch.zeros(parameter.shape, device=device)  # type: ignore[attr-defined]
        name_parts(built, counter)
        loss_function = counter.within("cross-entropy", hunyuan_model.linear_cross_entropy)
        stack.enter_context(patch.object(hunyuan_model, "linear_cross_entropy", loss_function))
        if use_kernels:
            stack.enter_context(counter.launches())
        inputs = micro_batch(model, num_tokens, device)
        with counter:
            loss = built(inputs)[0]
            counter.watch(loss)
            loss.backward()
            with counter.part("embedding"):
                add_to_main_grad(built.embedding.word_embeddings.weight)
    return dict(counter.counts)


def add_to_main_grad(weight: Any) -> None:
    """What core's hook does with a gradient that is not yet in main_grad."""
    if not getattr(weight, "grad_added_to_main_grad", False):
        weight.main_grad.add_(weight.grad)


# --- the table --------------------------------------------------------------------------------------------------------


def minimum_kb(model: ModelConfig, num_tokens: int) -> dict[str, float]:
    """KB that each part must move in bf16, per token and layer (per token for parts outside the layers): what enters it
    is read once and what leaves it is written once, forward and backward."""
    hidden, heads, head_dim = model.hidden_size, model.num_attention_heads, model.head_dim
    row = 2 * hidden
    keys = model.num_query_groups / model.cla_share_factor
    weight = model.padded_vocab_size * hidden
    table = {
        # forward x, y; backward dy, y, dx; fp32 1/rms of each head twice; cos and sin twice
        "RoPE, head norm": 5 * 2 * head_dim * (heads + keys) + 8 * (heads + keys) + 8 * head_dim,
        # forward gate, up, y; backward gate, up, dy and both gradients; shared and routed expert
        "SwiGLU": 8 * 2 * model.ffn_hidden_size + 8 * 2 * model.expert_ffn_size * model.moe_router_topk,
        # x; x, the gradient of what reads x next, and the sum of that and the router's
        "router": 4 * row,
        "permute": 5 * row,  # x and rows; the gradients of rows and of what reads x next, and their sum
        # routed and shared rows, residual, output; its gradient, routed rows and theirs
        "combine": 7 * row,
        # x, y; then residual, attention, their sum, y; backward of both dy, the residual's gradient, x, dx
        "norms": 2 * row + 4 * row + 2 * 4 * row,
        # bf16 logits written, read for the softmax, read and replaced by their gradient; main_grad read and written
        "cross-entropy": 8 * model.padded_vocab_size + 8 * weight / num_tokens + 3 * row,
        # rows read and written; the gradient's rows added to fp32 rows
        "embedding": 2 * row + row + 2 * 4 * hidden,
    }
    return {part: value / 1000 for part, value in table.items()}


def table(model: ModelConfig, num_tokens: int) -> list[dict[str, Any]]:
    """One row per part: operations per layer (or step), and KB per token and layer (or token), with plain functions and
    with kernels."""
    counts = {kind: count_step(model, num_tokens, use_kernels=kind == "kernels") for kind in ("plain", "kernels")}
    least = minimum_kb(model, num_tokens)
    rows = []
    for part in dict.fromkeys(part for found in counts.values() for part, _ in found):
        layers = 1 if part in PER_STEP else model.num_layers
        row: dict[str, Any] = {"part": part, "is_per_layer": part not in PER_STEP, "minimum_kb": least.get(part)}
        for kind, found in counts.items():
            ways = [found.get((part, way), Count()) for way in ("forward", "backward")]
            row[f"{kind}_operations"] = [way.operations / layers for way in ways]
            row[f"{kind}_kb"] = sum(way.bytes for way in ways) / layers / num_tokens / 1000
            row[f"{kind}_product_kb"] = sum(way.product_bytes for way in ways) / layers / num_tokens / 1000
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as a page shows it."""
    lines = [
        "| part | operations, forward / backward | with kernels | KB | with kernels | KB needed |",
        "|---|---|---|---|---|---|",
    ]

    def line(name: str, rows: list[dict[str, Any]]) -> str:
        operations = (
            " / ".join(f"{sum(row[f'{kind}_operations'][way] for row in rows):,.1f}" for way in (0, 1))
            for kind in ("plain", "kernels")
        )
        kb = (f"{sum(row[key] or 0 for row in rows):,.0f}" for key in ("plain_kb", "kernels_kb", "minimum_kb"))
        return " | ".join(("| " + name, *operations, *kb)) + " |"

    of_layers = [row for row in rows if row["is_per_layer"] and row["part"] not in LINEAR]
    lines += [line(row["part"], [row]) for row in of_layers]
    lines.append(line("all, per token and layer", of_layers))
    lines += [line(f"{row['part']}, per token", [row]) for row in rows if row["part"] in PER_STEP[:2]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the micro-batch; a multiple of 4096")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write every count here")
    arguments = parser.parse_args()
    rows = table(ModelConfig(**HUNYUAN_LARGE | {"num_layers": arguments.layers}), arguments.tokens)
    print(markdown(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
